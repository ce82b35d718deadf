"""The images of one step of the engine: where they lie in the flattened batch, and which text asks about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from scr_runtime.errors import PrefillError
from scr_runtime.families import FAMILIES
from scr_runtime.grids import ImageGrid
from scr_runtime.layout import ImageGroup, VisualLayout
from scr_runtime.vllm.settings import RequestSettings

PARTIAL, NO_QUESTION, NO_GRID = "partial", "no question", "no grid"

Grids = Callable[[Mapping[str, Any]], list[ImageGrid]]
"""The processor's values of one image -> its grids, in the order of its tokens."""


@dataclass(frozen=True)
class Feature:
    """An image, or another medium, in a request's prompt.

    Attributes:
        start: Position of its first token in the prompt.
        tokens: How many it takes.
        data: The processor's values for it, of those that grids are made from; ``None`` for what is no image.
    """

    start: int
    tokens: int
    data: Mapping[str, Any] | None

    @property
    def end(self) -> int:
        """Position behind its last token."""
        return self.start + self.tokens


@dataclass(frozen=True)
class Part:
    """One request's part of a step.

    Attributes:
        row: Where its first token lies in the flattened batch.
        computed: Positions whose keys and values are known already.
        scheduled: Positions that this step computes, from there on.
        prompt: Length of the prompt; behind it, a preempted request has tokens that it generated itself.
        features: What is in its prompt, by position.
        asked: The request's own settings.
    """

    row: int
    computed: int
    scheduled: int
    prompt: int
    features: Sequence[Feature]
    asked: RequestSettings = field(default_factory=RequestSettings)

    @property
    def end(self) -> int:
        """Position behind the last one that this step computes."""
        return self.computed + self.scheduled

    def here(self) -> list[Feature]:
        """The features of which some token is computed in this step."""
        return [item for item in self.features if item.start < self.end and item.end > self.computed]


@dataclass(frozen=True)
class FlatImage:
    """One grid of an image in a step.

    Attributes:
        grid: Its grid.
        row: Row of the flattened batch that holds its first token.
        questions: Rows of the text that asks about it; empty for predictors that don't read it.
        strength: lambda of eq. (1) for it; ``None`` is the engine's.
    """

    grid: ImageGrid
    row: int
    questions: tuple[int, ...]
    strength: float | None


@dataclass(frozen=True)
class StepImages:
    """What a step brings.

    Attributes:
        images: Grids to edit.
        left_out: Images that are not edited against the settings, by reason: ``PARTIAL``, ``NO_QUESTION``,
            ``NO_GRID``.
        switched_off: Images of requests that asked for no edit.
    """

    images: list[FlatImage] = field(default_factory=list[FlatImage])
    left_out: dict[str, int] = field(default_factory=dict[str, int])
    switched_off: int = 0


def images_of(parts: Sequence[Part], grids: Grids, *, reads_question: bool) -> StepImages:
    """Finds the images to edit.

    Args:
        parts: The requests of the step that have images.
        grids: Of the model's family.
        reads_question: Whether the predictor reads the question: an image is then edited only where all of its
            question is computed in the same step.
    """
    images: list[FlatImage] = []
    left_out: dict[str, int] = {}
    switched_off = 0
    for part in parts:
        for feature in part.here():
            if not part.asked.edited:
                switched_off += 1
                continue
            reason, found = _grids_of(part, feature, grids)
            rows = _question_rows(part, feature) if reads_question and reason is None else ()
            if reads_question and reason is None and (not rows or part.end < part.prompt):
                reason = NO_QUESTION
            if reason is not None:
                left_out[reason] = left_out.get(reason, 0) + 1
                continue
            row = part.row + feature.start - part.computed
            for grid in found:
                images.append(FlatImage(grid, row, rows, part.asked.strength))
                row += grid.tokens
    return StepImages(images, left_out, switched_off)


def _grids_of(part: Part, feature: Feature, grids: Grids) -> tuple[str | None, list[ImageGrid]]:
    """Why an image can't be edited, and its grids."""
    if feature.start < part.computed or feature.end > part.end:
        return PARTIAL, []
    if feature.data is None:
        return NO_GRID, []
    try:
        found = grids(feature.data)
    except PrefillError:
        return NO_GRID, []
    return (None, found) if sum(grid.tokens for grid in found) == feature.tokens else (NO_GRID, [])


def _question_rows(part: Part, image: Feature) -> tuple[int, ...]:
    """Rows of the prompt's text behind an image (decision D8), of what this step computes."""
    end = min(part.end, part.prompt)
    visual = {place for item in part.features if item.end > image.end for place in range(item.start, item.end)}
    return tuple(part.row + place - part.computed for place in range(image.end, end) if place not in visual)


def family_grids(model_type: str, hf_config: Any) -> Grids:
    """The grids of a family's images, by the family's own function.

    Args:
        model_type: Of the model; a key of ``FAMILIES``.
        hf_config: The model's configuration.
    """
    family, model = FAMILIES[model_type], SimpleNamespace(config=hf_config)
    if family.fixed_grid is not None:
        grid = family.fixed_grid(model, {})
        return lambda data: [grid]

    def grids(data: Mapping[str, Any]) -> list[ImageGrid]:
        return family.image_grids(model, {key: torch.as_tensor(value)[None] for key, value in data.items()})

    return grids


GRID_KEYS = ("image_sizes", "image_grid_thw")
"""What families with grids of their own read of the processor's values."""


@dataclass(frozen=True)
class FlatLayout:
    """The images of a step as the runtime's functions take them.

    Attributes:
        rows: [P + Q] int64, rows of the flattened batch: those of the patches, then those of the questions. All
            positions in ``layout`` are places in it.
        patches: P.
        layout: The images by grid and strength, as one row of a batch.
        strengths: Per group, its images' strength; ``None`` is the engine's.
    """

    rows: Tensor
    patches: int
    layout: VisualLayout
    strengths: list[float | None]


def flat_layout(images: Sequence[FlatImage], device: torch.device) -> FlatLayout:
    """Arranges the images of a step.

    Args:
        images: At least one.
        device: Of the states.
    """
    by_kind: dict[tuple[ImageGrid, float | None], list[int]] = {}
    for index, image in enumerate(images):
        by_kind.setdefault((image.grid, image.strength), []).append(index)
    order = [index for indices in by_kind.values() for index in indices]
    asked = sorted({row for image in images for row in image.questions})
    column = {row: place for place, row in enumerate(asked)}
    pieces = [grid.patches(torch.arange(row, row + grid.tokens)) for grid, row in
              ((images[index].grid, images[index].row) for index in order)]  # fmt: skip
    patches = sum(len(piece) for piece in pieces)
    groups: list[ImageGroup] = []
    start = 0
    for (grid, _), indices in by_kind.items():
        count = grid.grid[0] * grid.grid[1]
        positions = torch.arange(start, start + len(indices) * count).view(len(indices), count)
        start += positions.numel()
        weights = torch.zeros(len(indices), len(asked))
        for line, index in enumerate(indices):
            questions = images[index].questions
            weights[line, [column[row] for row in questions]] = 1 / max(len(questions), 1)
        groups.append(
            ImageGroup(
                grid.grid, grid.tokens, indices, positions.to(device, non_blocking=True),
                torch.zeros(len(indices), dtype=torch.int64, device=device), weights.to(device, non_blocking=True),
            )
        )  # fmt: skip
    rows = torch.cat([*pieces, torch.tensor(asked, dtype=torch.int64)]).to(device, non_blocking=True)
    layout = VisualLayout(len(asked), groups, edge=torch.empty(0, dtype=torch.uint8))
    return FlatLayout(rows, patches, layout, [strength for _, strength in by_kind])
