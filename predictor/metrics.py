"""How well scores find the sources of the two-pass map: per-row functions, a torchmetrics class, intervals.

Every per-row metric has the signature of a loss, and keeps the rows apart:

    metric(scores [B, N], attention [B, N], rule) -> [B] float32

Both the predicted and the true sources are `rule.choose`'s, so a metric counts exactly the patches that would be
edited.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from predictor.losses import normalised_target
from scr_runtime.redistribute import neighbourhoods
from scr_runtime.rule import SourceRule

RowMetric = Callable[[Tensor, Tensor, SourceRule], Tensor]


class Interval(NamedTuple):
    """A mean with its bootstrap interval."""

    mean: float
    low: float
    high: float


def recall_at_k(scores: Tensor, attention: Tensor, rule: SourceRule) -> Tensor:
    """Share of the true K sources that are among the K chosen ones (also the precision), [B]."""
    return hits(rule.choose(scores), rule.choose(attention)).float().mean(dim=-1)


def hits(chosen: Tensor, true: Tensor) -> Tensor:
    """[B, K] bool: which of the chosen sources [B, K] are among the true ones [B, K]."""
    return (chosen[:, :, None] == true[:, None, :]).any(dim=-1)


def ndcg_at_k(scores: Tensor, attention: Tensor, rule: SourceRule) -> Tensor:
    """Normalised discounted cumulative gain of the K chosen patches, [B]; the gain is the attention.

    Järvelin and Kekäläinen, "Cumulated gain-based evaluation of IR techniques", ACM TOIS 2002, with linear
    gains and discount 1 / log2(rank + 1). A row without attention on eligible patches scores 0.
    """
    chosen, best = _attention_chosen(scores, attention, rule)  # [B, K]
    discount = 1.0 / torch.arange(2, chosen.shape[-1] + 2, device=chosen.device).log2()  # [K]
    return _ratio((chosen * discount).sum(dim=-1), (best * discount).sum(dim=-1))


def mass_at_k(scores: Tensor, attention: Tensor, rule: SourceRule) -> Tensor:
    """Attention mass recovered: true attention on the K chosen patches, over that on the best K, [B].

    1 means that the choice holds as much attention as the two-pass choice, even where the patches differ. A
    row without attention on eligible patches scores 0.
    """
    chosen, best = _attention_chosen(scores, attention, rule)  # [B, K]
    return _ratio(chosen.sum(dim=-1), best.sum(dim=-1))


def spearman(scores: Tensor, attention: Tensor, rule: SourceRule) -> Tensor:
    """Rank correlation of scores and attention over all eligible patches, [B]; ties share their mean rank.

    A row whose scores (or whose attention) are all equal scores 0.
    """
    first = _ranks(scores[:, rule.eligible].float())
    second = _ranks(attention[:, rule.eligible].float())
    first = first - first.mean(dim=-1, keepdim=True)
    second = second - second.mean(dim=-1, keepdim=True)
    return _ratio((first * second).sum(dim=-1), first.norm(dim=-1) * second.norm(dim=-1))


def iou(scores: Tensor, attention: Tensor, rule: SourceRule) -> Tensor:
    """Intersection over union of what is edited, [B]: the chosen sources and their neighbours, and the true ones'.

    Neighbours may lie on the border. Each is claimed by some source, so all of the sources' neighbours are edited.
    """
    chosen, true = (_edited(rule.choose(values), rule) for values in (scores, attention))  # [B, N]
    return (chosen & true).sum(dim=-1) / (chosen | true).sum(dim=-1)


METRICS: dict[str, RowMetric] = {
    "recall": recall_at_k,
    "ndcg": ndcg_at_k,
    "mass": mass_at_k,
    "spearman": spearman,
    "iou": iou,
}


class SourceMetrics(Metric):
    """Means of all `METRICS` over the rows of an epoch, and on request the rows themselves.

    One class rather than one per metric: they share their row count and their groups, and `METRICS` stays the
    only list of names. The states are plain sums, so the means are exact over batches of any size and over
    DDP ranks.

    Args:
        keep_rows: Keep each row's values and group for `rows()`, for bootstrap intervals.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    count: Tensor
    sums: Tensor
    row_values: list[Tensor] | Tensor
    row_groups: list[Tensor] | Tensor

    def __init__(self, keep_rows: bool = False) -> None:
        super().__init__()
        self.keep_rows = keep_rows
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("sums", torch.zeros(len(METRICS)), dist_reduce_fx="sum")
        if keep_rows:
            self.add_state("row_values", [], dist_reduce_fx="cat")
            self.add_state("row_groups", [], dist_reduce_fx="cat")

    def update(
        self,
        scores: Tensor,
        attention: Tensor,
        rule: SourceRule,
        keys: Sequence[str] | None = None,
    ) -> None:
        """Adds the rows of a batch.

        Args:
            scores: [B, N].
            attention: [B, N] true map on any scale.
            rule: How sources are chosen on the batch's grid.
            keys: B sample keys; rows of one key are one cluster. Needed if rows are kept.
        """
        scores = scores.detach()
        columns = [metric(scores, attention, rule) for metric in METRICS.values()]
        values = torch.stack(columns, dim=-1)  # [B, M]
        self.sums += values.sum(dim=0)
        self.count += len(values)
        if self.keep_rows:
            if keys is None:
                raise ValueError("SourceMetrics(keep_rows=True) groups rows by key: pass keys=batch['key'].")
            assert isinstance(self.row_values, list) and isinstance(self.row_groups, list)
            self.row_values.append(values)
            self.row_groups.append(group_ids(keys).to(values.device))

    def compute(self) -> dict[str, Tensor]:
        """Returns the mean of each metric; nan before the first update."""
        means = self.sums / self.count
        return dict(zip(METRICS, means.unbind(), strict=True))

    def rows(self) -> dict[str, np.ndarray]:
        """Returns each metric's values [R] and, under "group", the int64 cluster of each row [R].

        Rows of all DDP ranks, rank by rank. Every rank must call it.

        Raises:
            ValueError: Built without `keep_rows=True`.
        """
        if not self.keep_rows:
            raise ValueError("no rows were kept: build SourceMetrics(keep_rows=True).")
        with self.sync_context():
            if self.count == 0:
                return {name: np.empty(0) for name in METRICS} | {"group": np.empty(0, dtype=np.int64)}
            values = dim_zero_cat(self.row_values).cpu().numpy()  # [R, M]
            groups = dim_zero_cat(self.row_groups).cpu().numpy()  # [R]
        return {name: values[:, i] for i, name in enumerate(METRICS)} | {"group": groups}


def group_ids(keys: Sequence[str]) -> Tensor:
    """Maps sample keys to int64 cluster ids [B] that are the same in every process (a 63-bit hash)."""
    digests = (hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return torch.tensor([int.from_bytes(digest) >> 1 for digest in digests], dtype=torch.long)


def bootstrap_interval(
    values: ArrayLike, groups: ArrayLike, repeats: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Mean over rows with a percentile bootstrap interval over clusters.

    Whole groups (the rows of one image) are drawn with replacement, because rows of one image are not
    independent. For a paired comparison of two methods pass the differences of their rows.

    Args:
        values: [R] one value a row.
        groups: [R] cluster of each row, any values that can be compared.
        repeats: Bootstrap draws.
        seed: Of the draws; the same seed draws the same groups for every metric of the same rows.
        level: Coverage of the interval.

    Raises:
        ValueError: No rows, or as many values as groups do not match.
    """
    values, groups = np.asarray(values, dtype=np.float64), np.asarray(groups)
    if values.ndim != 1 or values.shape != groups.shape or not len(values):
        raise ValueError(
            f"bootstrap_interval needs one value and one group for each of 1 or more rows, "
            f"got values of shape {values.shape} and groups of shape {groups.shape}."
        )
    _, index = np.unique(groups, return_inverse=True)  # [R] -> 0..G-1
    sizes = np.bincount(index).astype(np.float64)  # [G]
    sums = np.bincount(index, weights=values)  # [G]
    count = len(sizes)
    generator = np.random.default_rng(seed)
    draws = generator.multinomial(count, np.full(count, 1 / count), size=repeats)  # [repeats, G]
    means = (draws @ sums) / (draws @ sizes)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(values.mean()), float(low), float(high))


def summarise_rows(rows: Mapping[str, np.ndarray], repeats: int = 2000, seed: int = 0) -> dict[str, Interval]:
    """Bootstrap intervals of all metrics of `SourceMetrics.rows()`."""
    return {name: bootstrap_interval(rows[name], rows["group"], repeats, seed) for name in METRICS}


def _attention_chosen(scores: Tensor, attention: Tensor, rule: SourceRule) -> tuple[Tensor, Tensor]:
    """[B, K] shares of the attention on the chosen sources, and on the true ones."""
    target = normalised_target(attention, rule.eligible)
    return target.gather(-1, rule.choose(scores)), target.gather(-1, rule.choose(attention))


def _edited(sources: Tensor, rule: SourceRule) -> Tensor:
    """[B, K] -> [B, N] bool: the sources and their neighbours."""
    near = neighbourhoods(rule.grid, rule.config.connectivity, sources.device)[:, sources]  # [C + 1, B, K]
    edited = torch.zeros(len(sources), len(rule.eligible), dtype=torch.bool, device=sources.device)
    return edited.scatter_(-1, near.transpose(0, 1).flatten(1), True)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Division with 0 / 0 = 0."""
    return numerator / denominator.where(denominator > 0, 1.0)


def _ranks(values: Tensor) -> Tensor:
    """[B, M] -> ranks from 0, the mean rank where values are equal."""
    ordered = values.sort(dim=-1).values
    below = torch.searchsorted(ordered, values, right=False)
    not_above = torch.searchsorted(ordered, values, right=True)
    return (below + not_above - 1).float() / 2
