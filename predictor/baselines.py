"""Floors and a ceiling that a predictor is compared with: scores [B, N] that need no training.

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


class PositionMean:
    """The mean training map: what is known about an image's sources from the position alone.

    A predictor that does not beat it has learnt nothing from the states. Each map counts equally (it is
    sum-normalised first). A grid that was not in the training set gets the mean map of the commonest training
    grid, resampled bilinearly.
    """

    def __init__(self, maps: Mapping[Grid, Tensor], counts: Mapping[Grid, int]) -> None:
        """Keeps mean maps [N] and the number of rows they were made of, for each grid (rows, columns)."""
        if not maps:
            raise FitError("PositionMean needs at least one training map: the train split is empty")
        self._maps = dict(maps)
        self._commonest = max(counts, key=lambda grid: counts[grid])

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
        return cls({grid: (total / counts[grid]).float() for grid, total in sums.items()}, counts)

    def __call__(self, batch: Batch) -> Tensor:
        """Repeats the mean map of the batch's grid, [B, N]."""
        (rows, columns), attention = batch["grid"], batch["attention"]
        grid = int(rows), int(columns)
        if grid not in self._maps:
            known = self._maps[self._commonest].view(1, 1, *self._commonest)
            self._maps[grid] = F.interpolate(known, size=grid, mode="bilinear", align_corners=False).flatten()
        return self._maps[grid].to(attention.device).expand(len(attention), -1)


class OtherPrompts:
    """A ceiling: the mean map of the same image under its other prompts, which no one-pass method can know.

    Close to 1, it says that the map hardly depends on the question; a gap between it and a predictor is what
    better visual features could still win.
    """

    def __init__(self, sums: Mapping[str, Tensor], counts: Mapping[str, int], scr: SCRConfig) -> None:
        """Keeps each key's sum of normalised maps [N] and number of prompts."""
        self._sums, self._counts, self._scr = sums, counts, scr

    @classmethod
    def fit(cls, dataloader: Iterable[Batch], scr: SCRConfig) -> OtherPrompts:
        """Collects the maps of all prompts of each image of the set that will be scored."""
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        for batch in progress(dataloader, "maps under other prompts"):
            target = normalised_target(batch["attention"], rule_of(batch, scr).eligible)  # [B, N]
            for key, row in zip(batch["key"], target, strict=True):
                sums[key] = sums.get(key, torch.zeros(())) + row.double()
                counts[key] = counts.get(key, 0) + 1
        return cls(sums, counts, scr)

    def __call__(self, batch: Batch) -> Tensor:
        """Subtracts each row's own map from the sum of its image's maps, [B, N].

        Raises:
            FitError: An image has a single prompt, or was not in the fitted set.
        """
        single = sorted({key for key in batch["key"] if self._counts.get(key, 0) < 2})
        if single:
            raise FitError(
                f"OtherPrompts needs 2 or more prompts of each image, {single[0]!r} has "
                f"{self._counts.get(single[0], 0)}: harvest with harvest.prompts_per_image >= 2"
            )
        own = normalised_target(batch["attention"], rule_of(batch, self._scr).eligible)
        total = torch.stack([self._sums[key] for key in batch["key"]])
        return (total - own.double()).float()


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
