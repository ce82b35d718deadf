"""Two-pass maps of a block of prompts, and the sources that two-pass and the controls take from them.

Every image (tile, thumbnail) of a prompt has its own map on its own grid, and so its own sources.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from evaluation.batches import Batch, Row
from evaluation.edits import near_patches, owned_neighbours
from evaluation.errors import EvaluationError
from scr_runtime import SCRConfig, capture
from scr_runtime.redistribute import Grid, neighbourhoods, state_norms
from scr_runtime.rule import SourceRule, source_rule

_STEPS = 4000  # of the search for sources of a given dose


@dataclass(frozen=True)
class ImageMap:
    """What the diagnostic run says of one image of a prompt.

    Attributes:
        grid: Rows and columns of patches.
        attention: [N] float32 attention from the question.
        norms: [N] float32 norms of the states before the edit.
        entropy: Credit entropy of those, eq. (2) of arXiv 2602.22469, in nats.
    """

    grid: Grid
    attention: Tensor
    norms: Tensor
    entropy: float


@torch.no_grad()
def capture_maps(model: Any, scr: SCRConfig, batch: Batch) -> list[list[ImageMap]]:
    """Runs the diagnostic for every row of a batch; the rows of an image share its tokens where the family can.

    Returns:
        Per row, one map per image.
    """
    inputs, repeats, kept = batch.capture
    found: dict[int, list[ImageMap]] = {}
    for one in capture(model, scr, inputs, repeats):
        norms = state_norms(one.states[None])[0].cpu()
        made = ImageMap(one.grid, one.attention.float().cpu(), norms, one.entropy)
        found.setdefault(one.row, []).append(made)
    return [found[row] for row in kept]


@dataclass(frozen=True)
class BlockMaps:
    """The maps of a block, by row.

    Attributes:
        rows: The prompts of the block.
        maps: Per row, one map per image.
        scr: The method's settings.
        seed: Of every draw.
    """

    rows: Sequence[Row]
    maps: Sequence[Sequence[ImageMap]]
    scr: SCRConfig
    seed: int
    _means: dict[tuple[str, Grid], Tensor] = field(default_factory=dict[tuple[str, Grid], Tensor], repr=False)

    def rule(self, grid: Grid) -> SourceRule:
        """How sources are chosen on a grid."""
        return source_rule(self.scr, grid)

    def generator(self, *names: object) -> torch.Generator:
        """A random stream that depends on the seed and these names alone."""
        digest = hashlib.sha256(":".join(map(str, (self.seed, *names))).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

    def places(self, rows: Sequence[Row]) -> list[int]:
        """Where rows stand in the block."""
        return [self._place[row.item] for row in rows]

    @cached_property
    def _place(self) -> dict[int, int]:
        return {row.item: place for place, row in enumerate(self.rows)}

    @cached_property
    def by_image(self) -> dict[str, list[int]]:
        """Image -> places of its rows."""
        found: dict[str, list[int]] = {}
        for place, row in enumerate(self.rows):
            found.setdefault(row.image, []).append(place)
        return found

    def partner(self, place: int) -> int:
        """A row about another image, the next in the block with the same grids, else the next of any.

        Raises:
            EvaluationError: All rows are about one image.
        """
        names = list(self.by_image)
        if len(names) < 2:
            raise EvaluationError(
                "the control swapped takes another image's sources, and there is one image only: ask about more "
                "(evaluation.images), or leave swapped out of evaluation.methods"
            )
        own = self.rows[place].image
        start = names.index(own)
        others = names[start + 1 :] + names[:start]
        wanted = [one.grid for one in self.maps[place]]
        same = [name for name in others if [one.grid for one in self.maps[self.by_image[name][0]]] == wanted]
        rows = self.by_image[(same or others)[0]]
        return rows[self.by_image[own].index(place) % len(rows)]

    def mean_map(self, image: str, grid: Grid) -> Tensor:
        """[N] mean map of the block's other images, each moved to this grid by relative place."""
        if (image, grid) not in self._means:
            total = torch.zeros(grid[0] * grid[1])
            for row, maps in zip(self.rows, self.maps, strict=True):
                for one in maps if row.image != image else ():
                    moved = move(one.attention, one.grid, grid)
                    total += moved / moved.sum().clamp(min=torch.finfo(torch.float32).tiny)
            self._means[image, grid] = total
        return self._means[image, grid]


Sources = list[int]
"""The sources of one image, best first."""


def move(values: Tensor, grid: Grid, target: Grid) -> Tensor:
    """A map [N] on another grid, by relative place: patches that lie in between are interpolated."""
    if grid == target:
        return values
    square = values.view(1, 1, *grid)
    return functional.interpolate(square, size=target, mode="bilinear", align_corners=False).flatten()


def two_pass(block: BlockMaps, place: int, image: int) -> Sources:
    """The sources that the runtime's two-pass chooses: the K patches of most attention."""
    own = block.maps[place][image]
    return _best(block, own.attention, own.grid)


def swapped(block: BlockMaps, place: int, image: int) -> Sources:
    """Two-pass's sources of another image, under its first question: the same for all questions about this one.

    On another grid they are those of its map, moved by relative place.
    """
    first = block.by_image[block.rows[place].image][0]
    own, other = block.maps[place][image], block.maps[block.partner(first)]
    given = other[image % len(other)]
    return _best(block, move(given.attention, given.grid, own.grid), own.grid)


def uniform(block: BlockMaps, place: int, image: int) -> Sources:
    """K patches at random: one draw for each image, whatever the question."""
    grid = block.maps[place][image].grid
    rule = block.rule(grid)
    eligible = rule.eligible.nonzero().flatten()
    order = torch.randperm(len(eligible), generator=block.generator("uniform", block.rows[place].image, image))
    return eligible[order[: rule.k]].tolist()


def dose_matched(block: BlockMaps, place: int, image: int) -> Sources:
    """K random patches that own as many neighbours as two-pass's do: as much is edited, elsewhere.

    A random start, then random exchanges that bring the number of owned neighbours nearer to the wanted one.
    """
    own, row = block.maps[place][image], block.rows[place]
    rule, near = block.rule(own.grid), _near_sets(own.grid, block.scr.connectivity)
    wanted = owned_neighbours(two_pass(block, place, image), own.grid, block.scr.connectivity)
    eligible: list[int] = rule.eligible.nonzero().flatten().tolist()
    generator = block.generator("dose", row.image, row.text, image)
    numbers = iter(torch.rand(_STEPS * 3 + rule.k, generator=generator).tolist())
    order = torch.randperm(len(eligible), generator=generator)
    chosen = [eligible[n] for n in order[: rule.k].tolist()]
    count = _owned(chosen, near)
    for _ in range(_STEPS):
        if count == wanted:
            break
        which, beside, number = int(next(numbers) * len(chosen)), next(numbers), next(numbers)
        reach = eligible
        if count > wanted and beside < 0.5:  # too spread out: try a place beside another source
            reach = sorted(near[chosen[which - 1]] & set(eligible)) or eligible
        new = reach[int(number * len(reach))]
        if new in chosen:
            continue
        tried = [*chosen[:which], new, *chosen[which + 1 :]]
        found = _owned(tried, near)
        if abs(found - wanted) <= abs(count - wanted):
            chosen, count = tried, found
    return chosen


def position(block: BlockMaps, place: int, image: int) -> Sources:
    """The patches that the block's other images attend to most on average: what a map knows without its image."""
    grid = block.maps[place][image].grid
    return _best(block, block.mean_map(block.rows[place].image, grid), grid)


def norm(block: BlockMaps, place: int, image: int) -> Sources:
    """The patches of largest state norm."""
    own = block.maps[place][image]
    return _best(block, own.norms, own.grid)


def least(block: BlockMaps, place: int, image: int) -> Sources:
    """The K patches of least attention."""
    own = block.maps[place][image]
    return _best(block, -own.attention, own.grid)


def _best(block: BlockMaps, scores: Tensor, grid: Grid) -> Sources:
    return block.rule(grid).choose(scores[None])[0].tolist()


_NEAR: dict[tuple[Grid, int], list[set[int]]] = {}


def _near_sets(grid: Grid, connectivity: int) -> list[set[int]]:
    """Per patch, its neighbours."""
    if (grid, connectivity) not in _NEAR:
        table = neighbourhoods(grid, connectivity, None).T.tolist()
        _NEAR[grid, connectivity] = [set(row[1:]) - {patch} for patch, row in enumerate(table)]
    return _NEAR[grid, connectivity]


def _owned(sources: Sequence[int], near: Sequence[set[int]]) -> int:
    """Owned neighbours: each patch beside a source that is none itself has one owner."""
    return len(set().union(*(near[source] for source in sources)) - set(sources))


def reached(sources: Sequence[int], grid: Grid, radius: int) -> int:
    """How many patches lie at most `radius` steps from a source and are none: the dose of wider neighbourhoods."""
    near = near_patches(grid, radius)[:, list(sources)]
    return len(set(near.flatten().tolist()) - set(sources))
