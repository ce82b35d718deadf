"""The edit itself: choose sources, let them claim neighbours, move activation. Pure, batched tensor functions.

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
from scr_runtime.errors import PrefillError

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
        targets: [M, C + 1] int64, flat positions that each source writes to: its C neighbours, then itself.
        coefficients: [M, C + 1] float32, factor of the source's activation that is added there. Zero where the
            neighbour belongs to another source, is itself a source, or lies outside the grid.
    """

    sources: Tensor
    targets: Tensor
    coefficients: Tensor


@functools.lru_cache(maxsize=64)
def eligible_patches(grid: Grid, exclude_border: bool, device: torch.device | None = None) -> Tensor:
    """Marks the patches that can be sources.

    Args:
        grid: Rows and columns of patches.
        exclude_border: Whether the outer rows and columns are left out.
        device: Where the mask lives.

    Returns:
        [N] bool, N = rows * columns in row-major order. Do not write to it: it is cached.
    """
    rows, columns = grid
    mask = torch.ones(rows, columns, dtype=torch.bool)
    if exclude_border:
        mask[[0, -1], :] = False
        mask[:, [0, -1]] = False
    return mask.flatten().to(device)


def effective_num_sources(grid: Grid, config: SCRConfig) -> int:
    """K for a grid: ``config``'s number or share, at most half of the eligible patches, at least one (decision D4).

    Raises:
        PrefillError: If the grid has no eligible patch.
    """
    rows, columns = grid
    eligible = max(rows - 2, 0) * max(columns - 2, 0) if config.exclude_border else rows * columns
    if eligible == 0:
        raise PrefillError(
            f"a grid of {rows} x {columns} patches has no patch off its border; set exclude_border=False"
        )
    wanted = config.num_sources if config.source_fraction is None else round(config.source_fraction * rows * columns)
    return min(max(wanted, 1), max(eligible // 2, 1))


def select_sources(scores: Tensor, eligible: Tensor, k: int) -> Tensor:
    """Picks the K eligible patches of highest score.

    Args:
        scores: [I, N], one score per patch; any real dtype.
        eligible: [N] or [I, N] bool.
        k: Sources per image.

    Returns:
        [I, K] int64 patch indices in descending score. Equal scores go to the lower index (decision D7).
    """
    masked = scores.float().masked_fill(~eligible, float("-inf"))
    return masked.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def claim_neighbours(sources: Tensor, grid: Grid, connectivity: int) -> tuple[Tensor, Tensor]:
    """Gives each patch next to a source to its adjacent source of best rank.

    The sequential rule of the paper (sources in descending attention, each claims what is left) and this
    parallel one agree: whichever adjacent source comes first has the best rank.

    Args:
        sources: [I, K] int64 patch indices, best first.
        grid: Rows and columns of patches.
        connectivity: 4 or 8.

    Returns:
        ``(neighbours, owned)``: [I, K, C] int64 patch indices (clamped into the grid) and [I, K, C] bool.
    """
    rows, columns = grid
    images, k = sources.shape
    order = torch.arange(k, device=sources.device)
    rank = torch.full((images, rows * columns), k, dtype=torch.float32, device=sources.device)
    rank.scatter_(1, sources, order.float().expand(images, k))  # [I, N], K where the patch is no source

    better = -rank.view(images, 1, rows, columns)
    if connectivity == 8:
        best = torch.nn.functional.max_pool2d(better, 3, stride=1, padding=1)
    else:
        best = torch.maximum(
            torch.nn.functional.max_pool2d(better, (3, 1), stride=1, padding=(1, 0)),
            torch.nn.functional.max_pool2d(better, (1, 3), stride=1, padding=(0, 1)),
        )
    best = -best.view(images, -1)  # [I, N], best rank in the neighbourhood; the patch itself is no source below

    offsets = _offsets(connectivity, sources.device)  # [C, 2]
    row = (sources // columns)[..., None] + offsets[:, 0]  # [I, K, C]
    column = (sources % columns)[..., None] + offsets[:, 1]
    inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    neighbours = row.clamp(0, rows - 1) * columns + column.clamp(0, columns - 1)
    flat = neighbours.view(images, -1)
    free = rank.gather(1, flat).view_as(neighbours) == k
    mine = best.gather(1, flat).view_as(neighbours) == order[:, None]
    return neighbours, inside & free & mine


def plan_edit(sources: Tensor, grid: Grid, config: SCRConfig, positions: Tensor) -> EditPlan:
    """Turns chosen sources into the fixed-shape plan that every edited block uses.

    Args:
        sources: [I, K] int64 patch indices, best first.
        grid: Rows and columns of patches.
        config: Strength and connectivity.
        positions: [I, N] int64, where each patch's token lies in ``hidden.view(-1, d)``.
    """
    neighbours, owned = claim_neighbours(sources, grid, config.connectivity)
    own = torch.full_like(sources, 1, dtype=torch.float32) * (1.0 / config.strength - 1.0)  # [I, K]
    coefficients = torch.cat([owned * (config.strength - 1.0), own[..., None]], dim=-1)  # [I, K, C + 1]
    targets = torch.cat([neighbours, sources[..., None]], dim=-1)
    width = targets.shape[-1]
    return EditPlan(
        sources=positions.gather(1, sources).view(-1),
        targets=positions.gather(1, targets.view(len(sources), -1)).view(-1, width),
        coefficients=coefficients.view(-1, width),
    )


def merge_plans(plans: list[EditPlan]) -> EditPlan:
    """Joins the plans of several grids, so that each edited block writes once."""
    if len(plans) == 1:
        return plans[0]
    return EditPlan(
        sources=torch.cat([plan.sources for plan in plans]),
        targets=torch.cat([plan.targets for plan in plans]),
        coefficients=torch.cat([plan.coefficients for plan in plans]),
    )


def apply_edit(hidden: Tensor, plan: EditPlan) -> None:
    """Applies eq. (1) of arXiv 2602.22469 to a block's output, in place.

    Neighbours gain from the source as it was before it is scaled down: all reads come before the one write.

    Args:
        hidden: [B, S, d] contiguous residual stream after a block.
        plan: The plan of this prefill.
    """
    flat = hidden.view(-1, hidden.shape[-1])  # [B * S, d]
    activation = flat.index_select(0, plan.sources)  # [M, d]
    change = activation[:, None, :] * plan.coefficients.to(flat.dtype)[:, :, None]  # [M, C + 1, d]
    flat.index_add_(0, plan.targets.view(-1), change.view(-1, flat.shape[-1]))


def credit_entropy(norms: Tensor) -> Tensor:
    """Entropy of the credit over patches, eq. (2) of arXiv 2602.22469.

    Args:
        norms: [..., N] l2 norms of the visual tokens, the paper's proxy for credit.

    Returns:
        [...] float32, in nats; at most ln N.
    """
    share = norms.float() / norms.float().sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1)


@functools.lru_cache(maxsize=16)
def _offsets(connectivity: int, device: torch.device) -> Tensor:
    return torch.tensor(_OFFSETS[connectivity], device=device)
