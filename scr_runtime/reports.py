"""What SCR did to each image of a prefill."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from textwrap import shorten
from typing import NamedTuple

import torch

from scr_runtime.layout import VisualLayout
from scr_runtime.redistribute import Grid, credit_entropy
from scr_runtime.sources import Choice


@dataclass(frozen=True, repr=False)
class ImageReport:
    """What SCR did to one image of the last prefill, or to one grid of an image that has several.

    Attributes:
        provider: Who chose the sources: ``"one-pass"``, ``"two-pass"``, ``"online"`` or ``"uniform"``.
        fallback_reason: Why the diagnostic run stood in for the predictor; ``None`` if it did not.
        sources: The chosen patches in row-major order of the grid, best first.
        confidence: Calibrated expected share of true sources among them; ``None`` if no predictor was asked.
        entropy: Credit entropy of the state layer's output before the edit, eq. (2), in nats.
        entropy_normalised: The same divided by ln N, comparable between grids; 0 where N is 1.
        grid: Rows and columns of patches.
        layers_edited: The decoder blocks whose output was edited.
        drift: How many times wider or narrower the predictor's features reach than those of its fit; ``None`` if it
            was not asked or has no drift guard.
        row: Row of the batch that the model ran; with beams, of the repeated prompts.
        image: Which image of that row's prompt, from 0.
        place: Which grid of that image, from 0: a thumbnail and its tiles are one image.
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
    row: int = 0
    image: int = 0
    place: int = 0

    def __repr__(self) -> str:
        """One line: who chose, how many sources where, and how sure."""
        rows, columns = self.grid
        first, last = (self.layers_edited[0], self.layers_edited[-1]) if self.layers_edited else ("none", "none")
        sure = "" if self.confidence is None else f", confidence {self.confidence:.3f}"
        drift = "" if self.drift is None else f", drift {self.drift:.2f}"
        reason = self.fallback_reason
        why = "" if reason is None else f", because {shorten(reason, 100, placeholder='...')}"
        return (
            f"<ImageReport, row {self.row} image {self.image} grid {self.place}: {self.provider}, {len(self.sources)} "
            f"sources of {rows} x {columns} patches, blocks {first}-{last} edited{sure}{drift}{why}>"
        )


class Origin(NamedTuple):
    """Where a grid comes from, see ``ImageReport``."""

    row: int
    image: int
    place: int


def origins(layout: VisualLayout, tiles: bool) -> list[Origin]:
    """Finds the row and the image of each grid of a prefill, in order of appearance. Waits for the device.

    Args:
        layout: Where the grids are.
        tiles: Whether the family gives an image several grids. Those follow each other patch by patch; between two
            images stands a token that is no patch, in every such family.
    """
    places: dict[int, tuple[int, int, int]] = {}
    for group in layout.groups:
        ends = zip(group.images, group.rows.tolist(), group.positions[:, [0, -1]].tolist(), strict=True)
        places |= {image: (row, first, last) for image, row, (first, last) in ends}
    found: list[Origin] = []
    before = -1
    for row, first, last in (places[image] for image in sorted(places)):
        if not found or found[-1].row != row:
            found.append(Origin(row, 0, 0))
        elif tiles and first == before + 1:
            found.append(found[-1]._replace(place=found[-1].place + 1))
        else:
            found.append(Origin(row, found[-1].image + 1, 0))
        before = last
    return found


def report_prefill(
    layout: VisualLayout,
    choices: list[Choice],
    layers_edited: tuple[int, ...],
    tiles: bool,
) -> list[ImageReport]:
    """Reports on the images of a prefill, in order of appearance. Waits for the device.

    Args:
        layout: Where they are.
        choices: Per group, the sources of those that are no copies.
        layers_edited: The decoder blocks whose output was edited.
        tiles: Whether the family gives an image several grids.
    """
    found: dict[int, ImageReport] = {}
    for group, choice in zip(layout.groups, choices, strict=True):
        images = [group.images[place] for place in layout.firsts(group)]
        found |= zip(images, report_images(choice, layers_edited), strict=True)
    where = origins(layout, tiles)
    return [replace(found[image], **where[image]._asdict()) for image in sorted(found)]


def report_images(choice: Choice, layers_edited: tuple[int, ...]) -> list[ImageReport]:
    """Reports on the images of one group, in the group's order. Waits for the device.

    Args:
        choice: Their sources.
        layers_edited: The decoder blocks whose output was edited.
    """
    scores = choice.scores
    entropies = credit_entropy(choice.norms)  # [I]
    patches = choice.norms.shape[-1]
    normalised = entropies / math.log(patches) if patches > 1 else torch.zeros_like(entropies)
    judged = None
    if scores.predictor is not None and scores.predicted is not None:
        judged = scores.predictor.judge(scores.predicted, scores.spread, scores.rule)
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
