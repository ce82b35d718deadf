"""The edit of eq. (1) on sources that are given, and what controls put in its place.

The runtime chooses sources and edits in one prefill. Here sources are chosen beforehand, so the edit is made by hooks
of this room, with the runtime's own plan and arithmetic (`scr_runtime.redistribute`): the same states come out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evaluation.errors import EvaluationError
from scr_runtime.config import SCRConfig
from scr_runtime.diagnostic import residual_stream
from scr_runtime.families import blocks_of
from scr_runtime.layout import VisualLayout
from scr_runtime.redistribute import EditPlan, Grid, apply_edit, claim_neighbours, merge_plans, plan_edit

Act = Callable[[int, Tensor], None]
"""(block, its output [B, S, d]) -> edits it in place."""


@dataclass
class SourceEdit:
    """Moves activation from given sources to their neighbours.

    Args:
        layout: Where the images' patches are.
        sources: Per image in order of appearance, its sources, best first.
        scr: Strength and neighbours.
        radius: 2 takes the 24 patches at most two steps away for neighbours.
    """

    layout: VisualLayout
    sources: Sequence[Sequence[int]]
    scr: SCRConfig
    radius: int = 1

    def __post_init__(self) -> None:
        self._plans: dict[tuple[torch.device, torch.dtype], EditPlan] = {}  # blocks may lie on several devices

    def __call__(self, layer: int, hidden: Tensor) -> None:
        apply_edit(hidden, self.plan(hidden))

    def plan(self, hidden: Tensor) -> EditPlan:
        """The plan of eq. (1) where these states are."""
        key = hidden.device, hidden.dtype
        if key not in self._plans:
            plans: list[EditPlan] = []
            for group in self.layout.groups:
                chosen = torch.tensor([list(self.sources[image]) for image in group.images], device=hidden.device)
                positions = group.positions.to(hidden.device)
                if self.radius == 1:
                    plans.append(plan_edit(chosen, group.grid, self.scr, positions, hidden.dtype))
                else:
                    plans.append(_plan_wide(chosen, group.grid, self.radius, self.scr.strength, positions))
            self._plans[key] = merge_plans(plans)
        return self._plans[key]


@dataclass
class NoiseEdit:
    """Gaussian noise in place of the edit.

    At each block every patch that the edit would change moves as far as the edit would move it, in a random direction.

    Args:
        edit: The edit that it stands in for.
        seed: Of the noise.
    """

    edit: SourceEdit
    seed: int

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)

    def __call__(self, layer: int, hidden: Tensor) -> None:
        plan = self.edit.plan(hidden)
        flat = hidden.view(-1, hidden.shape[-1])
        touched = plan.targets.unique()
        before = flat[touched].clone()
        apply_edit(hidden, plan)
        distance = torch.linalg.vector_norm((flat[touched] - before).float(), dim=-1, keepdim=True)  # [T, 1]
        noise = torch.randn(before.shape, generator=self._generator).to(hidden.device)
        noise = noise * (distance / torch.linalg.vector_norm(noise, dim=-1, keepdim=True))
        flat[touched] = before + noise.to(before.dtype)


@contextmanager
def edited(model: Any, layers: tuple[int, int], length: int, act: Act) -> Iterator[None]:
    """Edits the prefill of one forward pass, or of one `generate`, inside the block.

    Args:
        model: A supported model.
        layers: First and last block whose output is edited.
        length: Tokens of the prompts: later steps, of one token, are left alone.
        act: What is done to each block's output.

    Raises:
        EvaluationError: An edit was not made, or the prefill had another length.
    """
    blocks, fired = blocks_of(model), list[int]()
    wanted = list(range(layers[0], layers[1] + 1))

    def hook(layer: int) -> Callable[..., None]:
        def edit(module: Any, arguments: Any, output: Any) -> None:
            if layer in fired:
                return  # a decode step
            hidden = residual_stream(output)
            if hidden.shape[1] != length:
                raise EvaluationError(f"a prefill of {hidden.shape[1]} tokens, where {length} were to be edited")
            act(layer, hidden)
            fired.append(layer)

        return edit

    handles = [blocks[layer].register_forward_hook(hook(layer)) for layer in wanted]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if fired != wanted:
        raise EvaluationError(f"blocks {wanted} should have been edited, and {fired} were: is the model compiled?")


def owned_neighbours(sources: Sequence[int], grid: Grid, connectivity: int) -> int:
    """How many neighbours the sources write to: the dose of the edit, beside K and strength."""
    _, owned = claim_neighbours(torch.tensor([list(sources)]), grid, connectivity)
    return int(owned[1:].sum())


def owned_by(sources: Sequence[int], grid: Grid, connectivity: int) -> list[list[int]]:
    """The neighbours that each source writes to."""
    patches, owned = claim_neighbours(torch.tensor([list(sources)]), grid, connectivity)
    return [patches[1:, 0, place][owned[1:, 0, place]].tolist() for place in range(len(sources))]


def owned_patches(sources: Sequence[int], grid: Grid, connectivity: int) -> list[int]:
    """The neighbours that the sources write to."""
    return [patch for neighbours in owned_by(sources, grid, connectivity) for patch in neighbours]


def near_patches(grid: Grid, radius: int) -> Tensor:
    """[C + 1, N] int64: each patch, then those at most `radius` steps away; itself in place of those outside."""
    rows, columns = grid
    row, column = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    own = row * columns + column
    steps = range(-radius, radius + 1)
    places = [own]
    for down, right in ((down, right) for down in steps for right in steps if down or right):
        inside = (row + down >= 0) & (row + down < rows) & (column + right >= 0) & (column + right < columns)
        places.append(torch.where(inside, own + down * columns + right, own))
    return torch.stack(places).flatten(1)


def _plan_wide(sources: Tensor, grid: Grid, radius: int, strength: float, positions: Tensor) -> EditPlan:
    """The plan of eq. (1) with wider neighbourhoods: each patch belongs to its best source in reach."""
    images, k = sources.shape
    patches = positions.shape[1]
    near = near_patches(grid, radius).to(sources.device)[:, sources]  # [C + 1, I, K]
    offset = torch.arange(images, device=sources.device)[:, None] * patches
    bids = torch.arange(k, 0, -1, dtype=torch.float32, device=sources.device).expand(near.shape).clone()
    bids[0] += k  # a source is nobody's neighbour
    near = near + offset
    highest = torch.zeros(images * patches, device=sources.device)
    highest.scatter_reduce_(0, near.flatten(), bids.flatten(), "amax")
    owned = highest[near] == bids
    owned[1:] &= near[1:] != near[0]  # outside the grid
    coefficients = owned * (strength - 1.0)
    coefficients[0] = 1.0 / strength - 1.0
    targets = positions.reshape(-1)[near].view(len(near), -1)
    return EditPlan(targets[0], targets, coefficients.view(len(near), -1))
