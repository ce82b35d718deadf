"""Floors and a reference that a predictor is compared with: scores [B, N] that need no training.

A baseline is a callable `batch -> scores [B, N]` (float32, higher is a likelier source), so `evaluate` and the
metrics treat it like a predictor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from predictor.batch import Batch, Score, progress, rule_of
from predictor.errors import FitError
from predictor.losses import normalised_target
from predictor.metrics import SourceMetrics
from scr_runtime.config import SCRConfig
from scr_runtime.redistribute import Grid


def negative_norm(batch: Batch) -> Tensor:
    """Scores each patch by minus the l2 norm of its state, [B, N]."""
    return -norm(batch)


def norm(batch: Batch) -> Tensor:
    """Scores each patch by the l2 norm of its state, the paper's proxy of credit, [B, N]."""
    return torch.linalg.vector_norm(batch["states"], dim=-1, dtype=torch.float32)


class RandomScores:
    """Uniform scores: the same seed and order of batches give the same scores."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, batch: Batch) -> Tensor:
        """Draws scores within 0..1, [B, N]."""
        attention: Tensor = batch["attention"]
        return torch.rand(attention.shape, generator=self._generator).to(attention.device)


_PRIOR_ROWS = 32
"""What the mean over all grids counts for, in rows, beside the mean of a grid's own rows."""


class PositionMean:
    """The mean training map: what is known about an image's sources from the position alone.

    A predictor that does not beat it has learnt nothing from the states. Each map counts equally (it is
    sum-normalised first). Where there are several grids, the means of all of them, resampled bilinearly to a grid by
    the relative places of the eligible patches, count as 32 rows beside the grid's own rows: a grid with few rows, or
    none, has a prior all the same. Where there is one grid, its map is the plain mean.
    """

    def __init__(self, means: Mapping[Grid, Tensor], counts: Mapping[Grid, int], scr: SCRConfig) -> None:
        """Keeps mean maps [N] and the number of rows they were made of, for each grid (rows, columns)."""
        if not means:
            raise FitError("PositionMean needs at least one training map: the train split is empty")
        self._means, self._counts, self._scr = dict(means), dict(counts), scr
        self._maps: dict[Grid, Tensor] = {}

    @classmethod
    def fit(cls, dataloader: Iterable[Batch], scr: SCRConfig) -> PositionMean:
        """Averages the training maps, each normalised over its eligible patches."""
        sums: dict[Grid, Tensor] = {}
        counts: dict[Grid, int] = {}
        for batch in progress(dataloader, "mean map"):
            rule = rule_of(batch, scr)
            target = normalised_target(batch["attention"], rule.eligible)  # [B, N]
            sums[rule.grid] = sums.get(rule.grid, torch.zeros(())) + target.double().sum(dim=0)
            counts[rule.grid] = counts.get(rule.grid, 0) + len(target)
        return cls({grid: (total / counts[grid]).float().cpu() for grid, total in sums.items()}, counts, scr)

    def __call__(self, batch: Batch) -> Tensor:
        """Repeats the mean map of the batch's grid, [B, N]."""
        (rows, columns), attention = batch["grid"], batch["attention"]
        grid = int(rows), int(columns)
        if grid not in self._maps:
            self._maps[grid] = self._map(grid)
        return self._maps[grid].to(attention.device).expand(len(attention), -1)

    def _map(self, grid: Grid) -> Tensor:
        """[N] mean map of a grid."""
        if self._means.keys() == {grid}:
            return self._means[grid]
        placed = [count * self._placed(known, grid) for known, count in self._counts.items()]
        pooled = torch.stack(placed).sum(dim=0) / sum(self._counts.values())  # [N]
        rows = self._counts.get(grid, 0)
        own = rows / (rows + _PRIOR_ROWS)
        return own * self._means.get(grid, pooled) + (1 - own) * pooled

    def _placed(self, known: Grid, grid: Grid) -> Tensor:
        """[N] mean map of a known grid at the relative places of another; sums to 1 where there is any attention."""
        border = int(self._scr.exclude_border)
        inner = self._means[known].view(known)[border : known[0] - border, border : known[1] - border]
        rows, columns = (_resampling(old - 2 * border, new - 2 * border) for old, new in zip(known, grid, strict=True))
        found = F.pad(rows @ inner @ columns.T, [border] * 4).flatten()
        return found / found.sum().where(found.sum() > 0, 1.0)


def _resampling(old: int, new: int) -> Tensor:
    """[new, old] weights that resample a line linearly, and wide enough that no entry of a longer one is left out.

    What interpolate(antialias=True) does; that of torch 2.13 is wrong where the new line has a single entry.
    """
    places = (torch.arange(new) + 0.5) * old / new - 0.5
    distance = (torch.arange(old) - places[:, None]).abs() / max(1.0, old / new)
    weights = (1 - distance).clamp_min(0)
    return weights / weights.sum(dim=1, keepdim=True)


class OtherPrompts:
    """A reference: the mean map of the same image under its other prompts, which no one-pass method can know.

    Close to 1, it says that the map hardly depends on the question; a gap between it and a predictor is what
    better visual features could still win.
    """

    def __init__(self, sums: Mapping[_Origin, Tensor], counts: Mapping[_Origin, int], scr: SCRConfig) -> None:
        """Keeps the sum of normalised maps [N] and the number of prompts, for each grid of each image."""
        self._sums, self._counts, self._scr = sums, counts, scr

    @classmethod
    def fit(cls, dataloader: Iterable[Batch], scr: SCRConfig) -> OtherPrompts:
        """Collects the maps of all prompts of each image of the set that will be scored."""
        sums: dict[_Origin, Tensor] = {}
        counts: dict[_Origin, int] = {}
        for batch in progress(dataloader, "maps under other prompts"):
            target = normalised_target(batch["attention"], rule_of(batch, scr).eligible)  # [B, N]
            for origin, row in zip(_origins(batch), target, strict=True):
                sums[origin] = sums.get(origin, torch.zeros(())) + row.double()
                counts[origin] = counts.get(origin, 0) + 1
        return cls(sums, counts, scr)

    def __call__(self, batch: Batch) -> Tensor:
        """Subtracts each row's own map from the sum of its image's maps, [B, N].

        Raises:
            FitError: An image has a single prompt, or was not in the fitted set.
        """
        origins = _origins(batch)
        single = sorted({origin for origin in origins if self._counts.get(origin, 0) < 2})
        if single:
            raise FitError(
                f"OtherPrompts needs 2 or more prompts of each image, {single[0][0]!r} has "
                f"{self._counts.get(single[0], 0)}: harvest with harvest.prompts_per_image >= 2"
            )
        own = normalised_target(batch["attention"], rule_of(batch, self._scr).eligible)
        total = torch.stack([self._sums[origin] for origin in origins])
        return (total - own.double()).float()


_Origin = tuple[str, int]  # key of an image, place of the grid in it


def _origins(batch: Batch) -> list[_Origin]:
    keys = batch["key"]
    return list(zip(keys, batch.get("place", [0] * len(keys)), strict=True))


def floors(train: Iterable[Batch], scr: SCRConfig, seed: int = 0) -> dict[str, Score]:
    """Builds every floor by its name in tables: random, position, negative_norm, norm."""
    return {
        "random": RandomScores(seed),
        "position": PositionMean.fit(train, scr),
        "negative_norm": negative_norm,
        "norm": norm,
    }


@torch.inference_mode()
def evaluate(score: Score, dataloader: Iterable[Batch], scr: SCRConfig, name: str = "evaluate") -> dict[str, Any]:
    """Scores every row of a set and returns its metrics' rows, see `SourceMetrics.rows`.

    Args:
        score: A baseline, or any `batch -> scores [B, N]`.
        dataloader: Batches of the set, unshuffled where rows of two methods are to be paired.
        scr: How sources are chosen.
        name: Of the progress bar.
    """
    metrics = SourceMetrics(keep_rows=True)
    for batch in progress(dataloader, name):
        metrics.update(score(batch), batch["attention"], rule_of(batch, scr), batch["key"])
    return metrics.rows()
