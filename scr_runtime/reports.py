"""What SCR did to each image of a prefill."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from scr_runtime.network import SourcePredictor
from scr_runtime.redistribute import Grid, credit_entropy
from scr_runtime.sources import Choice


@dataclass(frozen=True)
class ImageReport:
    """What SCR did to one image of the last prefill.

    Attributes:
        provider: Who chose the sources: ``"one-pass"``, ``"two-pass"`` or ``"uniform"``.
        fallback_reason: Why the diagnostic run stood in for the predictor; ``None`` if it did not.
        sources: The chosen patches in row-major order of the grid, best first.
        confidence: Calibrated expected share of true sources among them; ``None`` if no predictor was asked.
        entropy: Credit entropy of the state layer's output before the edit, eq. (2), in nats.
        entropy_normalised: The same divided by ln N, comparable between grids; 0 where N is 1.
        grid: Rows and columns of patches.
        layers_edited: The decoder blocks whose output was edited.
        drift: How many times wider or narrower the predictor's features reach than those of its fit; ``None`` if it
            was not asked or has no drift guard.
    """

    provider: str
    fallback_reason: str | None
    sources: list[int]
    confidence: float | None
    entropy: float
    entropy_normalised: float
    grid: Grid
    layers_edited: tuple[int, ...]
    drift: float | None = None


def report_images(
    choice: Choice, predictor: SourcePredictor | None, layers_edited: tuple[int, ...]
) -> list[ImageReport]:
    """Reports on the images of one group, in the group's order. Waits for the device.

    Args:
        choice: Their sources.
        predictor: The one that scored them, if any did.
        layers_edited: The decoder blocks whose output was edited.
    """
    scores = choice.scores
    entropies = credit_entropy(choice.norms)  # [I]
    patches = choice.norms.shape[-1]
    normalised = entropies / math.log(patches) if patches > 1 else torch.zeros_like(entropies)
    judged = None
    if predictor is not None and scores.predicted is not None:
        judged = predictor.judge(scores.predicted, scores.spread, scores.rule)
    reports: list[ImageReport] = []
    for index, (provider, fallback) in enumerate(zip(scores.providers, scores.fallbacks, strict=True)):
        report = ImageReport(
            provider=provider,
            fallback_reason=None if fallback is None else fallback.reason,
            sources=choice.sources[index].tolist(),
            confidence=None if judged is None else float(judged.confidence[index]),
            entropy=float(entropies[index]),
            entropy_normalised=float(normalised[index]),
            grid=scores.rule.grid,
            layers_edited=layers_edited,
            drift=None if judged is None or scores.spread is None else float(judged.drift[index]),
        )
        reports.append(report)
    return reports
