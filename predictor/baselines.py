"""Floors and a ceiling that a predictor is compared with: scores [B, N] that need no training.

A baseline is a callable `batch -> scores [B, N]` (float32, higher is a likelier source), so `evaluate` and
the metrics treat it like a predictor. The batch is the data module's: `{"states": [B, N, d], "attention": [B,
N], "question": [B, d], "grid": (rows, columns), "key": [B]}`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from predictor.losses import normalised_target
from predictor.metrics import SourceMetrics
from scr_runtime.config import SCRConfig
from scr_runtime.redistribute import Grid, claims_of, effective_num_sources, eligible_patches

Batch = Mapping[str, Any]
Score = Callable[[Batch], Tensor]


def negative_norm(batch: Batch) -> Tensor:
    """Scores each patch by minus the l2 norm of its block-0 state, [B, N]."""
    return -norm(batch)


def norm(batch: Batch) -> Tensor:
    """Scores each patch by the l2 norm of its block-0 state, the paper's proxy of credit, [B, N]."""
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
            raise ValueError("PositionMean needs at least one training map.")
        self._maps = dict(maps)
        self._commonest = max(counts, key=lambda grid: counts[grid])

    @classmethod
    def fit(cls, dataloader: Iterable[Batch], exclude_border: bool = True) -> "PositionMean":
        """Averages the training maps, each normalised over its eligible patches."""
        sums: dict[Grid, Tensor] = {}
        counts: dict[Grid, int] = {}
        for batch in _progress(dataloader, "mean map"):
            grid = _grid(batch)
            target = normalised_target(batch["attention"], eligible_patches(grid, exclude_border))  # [B, N]
            sums[grid] = sums.get(grid, torch.zeros(())) + target.double().sum(dim=0)
            counts[grid] = counts.get(grid, 0) + len(target)
        return cls({grid: (total / counts[grid]).float() for grid, total in sums.items()}, counts)

    def __call__(self, batch: Batch) -> Tensor:
        """Repeats the mean map of the batch's grid, [B, N]."""
        grid, attention = _grid(batch), batch["attention"]
        if grid not in self._maps:
            known = self._maps[self._commonest].view(1, 1, *self._commonest)
            self._maps[grid] = F.interpolate(known, size=grid, mode="bilinear", align_corners=False).flatten()
        return self._maps[grid].to(attention.device).expand(len(attention), -1)


class OtherPrompts:
    """A ceiling: the mean map of the same image under its other prompts, which no one-pass method can know.

    Close to 1, it says that the map hardly depends on the question; a gap between it and a predictor is what
    better visual features could still win.
    """

    def __init__(self, sums: Mapping[str, Tensor], counts: Mapping[str, int], exclude_border: bool) -> None:
        """Keeps each key's sum of normalised maps [N] and number of prompts."""
        self._sums, self._counts = sums, counts
        self._exclude_border = exclude_border

    @classmethod
    def fit(cls, dataloader: Iterable[Batch], exclude_border: bool = True) -> "OtherPrompts":
        """Collects the maps of all prompts of each image of the set that will be scored."""
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        for batch in _progress(dataloader, "maps under other prompts"):
            eligible = eligible_patches(_grid(batch), exclude_border)
            target = normalised_target(batch["attention"], eligible)  # [B, N]
            for key, row in zip(batch["key"], target, strict=True):
                sums[key] = sums.get(key, torch.zeros(())) + row.double()
                counts[key] = counts.get(key, 0) + 1
        return cls(sums, counts, exclude_border)

    def __call__(self, batch: Batch) -> Tensor:
        """Subtracts each row's own map from the sum of its image's maps, [B, N].

        Raises:
            ValueError: An image has a single prompt, or was not in the fitted set.
        """
        lonely = sorted({key for key in batch["key"] if self._counts.get(key, 0) < 2})
        if lonely:
            raise ValueError(
                f"OtherPrompts needs 2 or more prompts of each image, {lonely[0]!r} has "
                f"{self._counts.get(lonely[0], 0)}: harvest with prompts_per_image >= 2."
            )
        own = normalised_target(batch["attention"], eligible_patches(_grid(batch), self._exclude_border))
        total = torch.stack([self._sums[key] for key in batch["key"]])
        return (total - own.double()).float()


def floors(train: Iterable[Batch], exclude_border: bool = True, seed: int = 0) -> dict[str, Score]:
    """Builds every floor by its name in tables: random, position, negative_norm, norm."""
    return {
        "random": RandomScores(seed),
        "position": PositionMean.fit(train, exclude_border),
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
    for batch in _progress(dataloader, name):
        grid, device = _grid(batch), batch["attention"].device
        eligible = eligible_patches(grid, scr.exclude_border, device)
        k, claims = effective_num_sources(grid, scr), claims_of(grid, scr, device)
        metrics.update(score(batch), batch["attention"], eligible, k, grid, batch["key"], claims)
    return metrics.rows()


def _grid(batch: Batch) -> Grid:
    rows, columns = batch["grid"]
    return int(rows), int(columns)


def _progress(dataloader: Iterable[Batch], name: str) -> Iterable[Batch]:
    """Bar on stderr; shown only once it has run for two seconds."""
    return tqdm(dataloader, desc=name, unit="batch", leave=False, delay=2)
