"""How well scores find the sources of the two-pass map: per-row functions, a torchmetrics class, intervals.

Every per-row metric has the signature of a loss, and the patch grid, and keeps the rows apart:

    metric(scores [B, N], attention [B, N], eligible [N], k, grid, claims) -> [B] float32

`claims` is `scr_runtime.redistribute.claims_of`: None, unless sources that others claim are left out.

Both the predicted and the true sources come from `scr_runtime.redistribute.select_sources`, so a metric
counts exactly the patches that would be edited.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from predictor.losses import normalised_target
from scr_runtime.redistribute import Grid, select_sources

RowMetric = Callable[..., Tensor]


class Interval(NamedTuple):
    """A mean with its bootstrap interval."""

    mean: float
    low: float
    high: float


def recall_at_k(
    scores: Tensor, attention: Tensor, eligible: Tensor, k: int, grid: Grid, claims: Tensor | None = None
) -> Tensor:
    """Share of the true top `k` patches that are among the `k` chosen ones (also the precision), [B]."""
    chosen = select_sources(scores, eligible, k, claims)  # [B, K]
    true = select_sources(attention, eligible, k, claims)  # [B, K]
    return (chosen[:, :, None] == true[:, None, :]).any(dim=-1).float().mean(dim=-1)


def ndcg_at_k(
    scores: Tensor, attention: Tensor, eligible: Tensor, k: int, grid: Grid, claims: Tensor | None = None
) -> Tensor:
    """Normalised discounted cumulative gain of the `k` chosen patches, [B]; the gain is the attention.

    Järvelin and Kekäläinen, "Cumulated gain-based evaluation of IR techniques", ACM TOIS 2002, with linear
    gains and discount 1 / log2(rank + 1). A row without attention on eligible patches scores 0.
    """
    target = normalised_target(attention, eligible)
    chosen = target.gather(-1, select_sources(scores, eligible, k, claims))  # [B, K]
    best = target.gather(-1, select_sources(attention, eligible, k, claims))  # [B, K]
    discount = 1.0 / torch.arange(2, chosen.shape[-1] + 2, device=target.device).log2()  # [K]
    return _ratio((chosen * discount).sum(dim=-1), (best * discount).sum(dim=-1))


def mass_at_k(
    scores: Tensor, attention: Tensor, eligible: Tensor, k: int, grid: Grid, claims: Tensor | None = None
) -> Tensor:
    """Attention mass recovered: true attention on the `k` chosen patches, over that on the best `k`, [B].

    1 means that the choice holds as much attention as the two-pass choice, even where the patches differ. A
    row without attention on eligible patches scores 0.
    """
    target = normalised_target(attention, eligible)
    chosen = target.gather(-1, select_sources(scores, eligible, k, claims)).sum(dim=-1)
    best = target.gather(-1, select_sources(attention, eligible, k, claims)).sum(dim=-1)
    return _ratio(chosen, best)


def spearman(
    scores: Tensor, attention: Tensor, eligible: Tensor, k: int, grid: Grid, claims: Tensor | None = None
) -> Tensor:
    """Rank correlation of scores and attention over all eligible patches, [B]; ties share their mean rank.

    `k` is not used. A row whose scores (or whose attention) are all equal scores 0.
    """
    first = _ranks(scores[:, eligible].float())
    second = _ranks(attention[:, eligible].float())
    first = first - first.mean(dim=-1, keepdim=True)
    second = second - second.mean(dim=-1, keepdim=True)
    return _ratio((first * second).sum(dim=-1), first.norm(dim=-1) * second.norm(dim=-1))


def iou(
    scores: Tensor, attention: Tensor, eligible: Tensor, k: int, grid: Grid, claims: Tensor | None = None
) -> Tensor:
    """Intersection over union of what is edited, [B]: the chosen sources and their 8 neighbours, and the true ones'.

    Neighbours may lie on the border. Each is claimed by some source: what is edited is the sources' 3 x 3 dilation.
    """
    chosen, true = (
        _edited(select_sources(values, eligible, k, claims), grid) for values in (scores, attention)
    )  # [B, N]
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
        keep_rows: Keep each row's values and group for `rows()` (for bootstrap intervals; test time only).
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    count: Tensor
    sums: Tensor
    row_values: list[Tensor] | Tensor
    row_groups: list[Tensor] | Tensor

    def __init__(self, keep_rows: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
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
        eligible: Tensor,
        k: int,
        grid: Grid,
        keys: Sequence[str] | None = None,
        claims: Tensor | None = None,
    ) -> None:
        """Adds the rows of a batch.

        Args:
            scores: [B, N].
            attention: [B, N] true map on any scale.
            eligible: [N] bool.
            k: Number of sources.
            grid: Rows and columns of patches.
            keys: B sample keys; rows of one key are one cluster. Needed if rows are kept.
            claims: As of `claims_of`.
        """
        scores = scores.detach()
        columns = [metric(scores, attention, eligible, k, grid, claims) for metric in METRICS.values()]
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


def _edited(sources: Tensor, grid: Grid) -> Tensor:
    """[B, K] -> [B, N] bool: the patches within one step of a source."""
    marked = torch.zeros(len(sources), 1, *grid, device=sources.device)
    marked.view(len(sources), -1).scatter_(-1, sources, 1.0)
    return F.max_pool2d(marked, 3, stride=1, padding=1).flatten(1) > 0


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Division with 0 / 0 = 0."""
    return numerator / denominator.where(denominator > 0, 1.0)


def _ranks(values: Tensor) -> Tensor:
    """[B, M] -> ranks from 0, the mean rank where values are equal."""
    ordered = values.sort(dim=-1).values
    below = torch.searchsorted(ordered, values, right=False)
    not_above = torch.searchsorted(ordered, values, right=True)
    return (below + not_above - 1).float() / 2
