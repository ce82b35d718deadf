"""The edit itself: sources claim neighbours, activation moves. Pure, batched tensor functions.

Everything here has shapes that depend on the grid and K alone, so nothing waits for the device. The method is
that of arXiv 2602.22469: top-K patches are sources, each non-source neighbour belongs to its adjacent source of
best rank, and eq. (1) adds ``(strength - 1) * h_source`` to the neighbour and divides the source by ``strength``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from scr_runtime.config import SCRConfig

Grid = tuple[int, int]  # rows, columns of patches

_OFFSETS = {
    4: ((-1, 0), (0, -1), (0, 1), (1, 0)),
    8: ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)),
}


@dataclass(frozen=True)
class EditPlan:
    """Where one prefill's edit reads and writes, the same for every edited block.

    Attributes:
        sources: [M] int64, flat positions of the M = sum of K source tokens in ``hidden.view(-1, d)``.
        targets: [C + 1, M] int64, flat positions that each source writes to: itself, then its C neighbours.
        coefficients: [C + 1, M] float, factor of the source's activation that is added there. Zero where the
            neighbour belongs to another source, is itself a source, or lies outside the grid.
    """

    sources: Tensor
    targets: Tensor
    coefficients: Tensor


def claim_neighbours(sources: Tensor, grid: Grid, connectivity: int) -> tuple[Tensor, Tensor]:
    """Gives each patch next to a source to its adjacent source of best rank.

    The sequential rule of the paper (sources in descending attention, each claims what is left) and this
    parallel one agree: whichever adjacent source comes first has the best rank. Every source bids its rank for its
    neighbours, and more than any rank for itself; the highest bid owns a patch.

    Args:
        sources: [I, K] int64 patch indices, best first.
        grid: Rows and columns of patches.
        connectivity: 4 or 8.

    Returns:
        ``(patches, owned)``: [C + 1, I, K] int64 and bool. Each source itself, then its C neighbours, as places in
        the [I * N] patches of all images; a neighbour outside the grid is the source itself. ``owned`` marks the
        neighbours the source may write to; never the source itself.
    """
    rows, columns = grid
    images, k = sources.shape
    patches = neighbourhoods(grid, connectivity, sources.device).index_select(1, sources.reshape(-1))
    patches = patches.view(-1, images, k)
    if images > 1:
        patches = patches + _first_patches(images, rows * columns, sources.device)
    bids = _bids(len(patches), images, k, sources.device)  # [C + 1, I, K]
    highest = torch.zeros(images * rows * columns, dtype=torch.float32, device=sources.device)
    highest.scatter_reduce_(0, patches.view(-1), bids.view(-1), "amax")
    return patches, highest[patches] == bids[1]


def plan_edit(
    sources: Tensor, grid: Grid, config: SCRConfig, positions: Tensor, dtype: torch.dtype = torch.float32
) -> EditPlan:
    """Turns chosen sources into the fixed-shape plan that every edited block uses.

    Args:
        sources: [I, K] int64 patch indices, best first.
        grid: Rows and columns of patches.
        config: Strength and connectivity.
        positions: [I, N] int64, where each patch's token lies in ``hidden.view(-1, d)``.
        dtype: Of the coefficients: that of the states to edit, so that no block has to convert them.
    """
    patches, owned = claim_neighbours(sources, grid, config.connectivity)
    itself = _own_coefficients(len(patches), config.strength, dtype, sources.device)  # [C + 1, 1, 1]
    coefficients = torch.add(itself, owned, alpha=config.strength - 1.0)  # [C + 1, I, K]
    targets = positions.reshape(-1)[patches].view(len(patches), -1)
    return EditPlan(targets[0], targets, coefficients.view(len(patches), -1))


def merge_plans(plans: list[EditPlan]) -> EditPlan:
    """Joins the plans of several grids, so that each edited block writes once."""
    if len(plans) == 1:
        return plans[0]
    targets = torch.cat([plan.targets for plan in plans], dim=1)
    return EditPlan(targets[0], targets, torch.cat([plan.coefficients for plan in plans], dim=1))


def apply_edit(hidden: Tensor, plan: EditPlan) -> None:
    """Applies eq. (1) of arXiv 2602.22469 to a block's output, in place.

    Neighbours gain from the source as it was before it is scaled down: all reads come before the one write.

    Args:
        hidden: [B, S, d] contiguous residual stream after a block.
        plan: The plan of this prefill.
    """
    flat = hidden.view(-1, hidden.shape[-1])  # [B * S, d]
    activation = flat.index_select(0, plan.sources)  # [M, d]
    change = activation * plan.coefficients.to(flat.dtype)[:, :, None]  # [C + 1, M, d]
    flat.index_add_(0, plan.targets.view(-1), change.view(-1, flat.shape[-1]))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The float type to compute in: float32, or float64 for what is float64 already."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def state_norms(states: Tensor) -> Tensor:
    """[I, N] float32 l2 norms of states [I, N, d] of any float dtype, the paper's proxy for credit."""
    return torch.linalg.vector_norm(states, dim=-1, dtype=wide(states.dtype)).float()


def credit_entropy(norms: Tensor) -> Tensor:
    """Entropy of the credit over patches, eq. (2) of arXiv 2602.22469.

    Args:
        norms: [..., N] l2 norms of the visual tokens, the paper's proxy for credit.

    Returns:
        [...] float32, in nats; at most ln N.
    """
    share = norms.float() / norms.float().sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1)


# Small constants, made once per shape and device: a kernel each, and a copy to the device, saved in every prefill.
# Not inference tensors, which later calls outside inference mode could not use.


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def neighbourhoods(grid: Grid, connectivity: int, device: torch.device | None) -> Tensor:
    """[C + 1, N] int64: each patch, then its neighbours; the patch itself in place of those outside the grid."""
    rows, columns = grid
    row, column = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    own = row * columns + column
    places = [own]
    for down, right in _OFFSETS[connectivity]:
        inside = (row + down >= 0) & (row + down < rows) & (column + right >= 0) & (column + right < columns)
        places.append(torch.where(inside, own + down * columns + right, own))
    return torch.stack(places).flatten(1).to(device)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _first_patches(images: int, patches: int, device: torch.device) -> Tensor:
    return torch.arange(images, device=device)[:, None] * patches  # [I, 1]


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def arange(start: int, end: int, device: torch.device) -> Tensor:
    """Kept integers from ``start`` up to ``end``. Do not write to them."""
    return torch.arange(start, end, device=device)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _bids(rows: int, images: int, k: int, device: torch.device) -> Tensor:
    """[C + 1, I, K]: K for the neighbours of the best source, 1 for those of the last; K more for itself."""
    bids = torch.arange(k, 0, -1, dtype=torch.float32).repeat(rows, images, 1)
    bids[0] += k
    return bids.to(device)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _own_coefficients(rows: int, strength: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[C + 1, 1, 1]: what a source adds to itself, 1 / strength - 1; then zeros."""
    coefficients = torch.zeros(rows, 1, 1, dtype=wide(dtype))
    coefficients[0] = 1.0 / strength - 1.0
    return coefficients.to(device, dtype)
