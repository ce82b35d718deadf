"""SourceRule: which patches of a grid can be sources, how many are chosen, and how clearly.

Runtime, metrics, calibration, baselines, figures and evaluation all ask this one object, so that each of them counts
exactly the patches that are edited.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from scr_runtime.config import SCRConfig
from scr_runtime.errors import PrefillError
from scr_runtime.redistribute import Grid, arange, neighbourhoods


@dataclass(frozen=True, eq=False)
class SourceRule:
    """How sources are chosen on one patch grid. Made by ``source_rule``, which keeps it.

    Attributes:
        config: The method's settings.
        grid: Rows and columns of patches, N = rows * columns.
        eligible: [N] bool, row-major: the patches that can be sources. Do not write to it.
        k: K, sources per image on this grid.
        claims: [C + 1, N] int64: each patch, then the neighbours that it claims as a source (itself in place of those
            outside the grid). ``None`` unless ``config.suppress_claimed``. Do not write to it.
    """

    config: SCRConfig
    grid: Grid
    eligible: Tensor
    k: int
    claims: Tensor | None

    def rank(self, scores: Tensor, k: int | None = None) -> tuple[Tensor, Tensor]:
        """Orders patches by descending score, those that can't be sources last.

        Args:
            scores: [I, N], one score per patch; any real dtype.
            k: How many leading patches obey ``claims``; ``None`` for K.

        Returns:
            ``(values, patches)``: [I, N] float32 and int64. Equal scores go to the lower index (decision D7). With
            ``claims`` each of the first ``k`` patches is the best one that no earlier of them has claimed; where none
            is left, the best one that was claimed.
        """
        masked = torch.where(self.eligible, scores.float(), _minus_infinity(scores.device))
        ranked = masked.sort(dim=-1, descending=True, stable=True)
        if self.claims is None:
            return ranked.values, ranked.indices
        patches = _keep_apart(ranked.indices, self.eligible, self.k if k is None else k, self.claims)
        return masked.gather(1, patches), patches

    def choose(self, scores: Tensor) -> Tensor:
        """[I, K] int64 sources, best first."""
        return self.rank(scores)[1][:, : self.k]

    def gaps(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """How far each source's score lies over the cut, halfway to the first patch that was not chosen.

        Args:
            scores: [I, N] logits of a predictor.

        Returns:
            ``(gaps, sources)``: [I, K] float32 and int64. A gap is infinite on a grid with a single eligible patch,
            where nothing was left out. Under 0 is possible with ``claims`` alone, where claimed patches had to be
            chosen.
        """
        values, patches = self.rank(scores, self.k + 1)
        cut = values[:, self.k - 1 : self.k + 1].mean(-1, keepdim=True)
        return values[:, : self.k] - cut, patches[:, : self.k]

    def confidence(self, scores: Tensor, temperature: Tensor | float = 1.0) -> Tensor:
        """How far the sources stand out from the first patch that was not chosen.

        A patch whose score is near the cut might as well be on its other side; ``sigmoid(gap / temperature)`` is the
        chance that it is on this one, if scores err logistically. (The share of the predicted map on the sources,
        which is the obvious candidate, ranks images far worse by their recall: docs/results.md.)

        Args:
            scores: [I, N] logits of the predictor.
            temperature: Spread of the scores' errors, fitted on validation rows.

        Returns:
            [I] float32, the mean of that chance over the sources: not calibrated, 0.5 to 1 without ``claims``.
        """
        return torch.sigmoid(self.gaps(scores)[0] / temperature).mean(-1)


@functools.lru_cache(maxsize=256)
def source_rule(config: SCRConfig, grid: Grid, device: torch.device | None = None) -> SourceRule:
    """Returns the rule for a grid, made once.

    Args:
        config: The method's settings.
        grid: Rows and columns of patches.
        device: Where its tensors live; ``None`` is the CPU.

    Raises:
        PrefillError: If the grid has no eligible patch.
    """
    claims = neighbourhoods(grid, config.connectivity, device) if config.suppress_claimed else None
    k = effective_num_sources(grid, config)
    return SourceRule(config, grid, eligible_patches(grid, config.exclude_border, device), k, claims)


def effective_num_sources(grid: Grid, config: SCRConfig) -> int:
    """K for a grid: what is asked for, at most half of the eligible patches, at least one (decision D4).

    Raises:
        PrefillError: If the grid has no eligible patch.
    """
    rows, columns = grid
    eligible = max(rows - 2, 0) * max(columns - 2, 0) if config.exclude_border else rows * columns
    if eligible == 0:
        raise PrefillError(
            f"a grid of {rows} x {columns} patches has no patch off its border; set exclude_border=False"
        )
    return min(asked_num_sources(grid, config), max(eligible // 2, 1))


def asked_num_sources(grid: Grid, config: SCRConfig) -> int:
    """K for a grid as ``config`` asks for it, by number or by share; at least one."""
    rows, columns = grid
    wanted = config.num_sources if config.source_fraction is None else round(config.source_fraction * rows * columns)
    return max(wanted, 1)


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
    with torch.inference_mode(False):  # kept for later, so it must not be an inference tensor
        mask = torch.ones(rows, columns, dtype=torch.bool)
        if exclude_border:
            mask[[0, -1], :] = False
            mask[:, [0, -1]] = False
        return mask.flatten().to(device)


def _keep_apart(ranked: Tensor, eligible: Tensor, k: int, claims: Tensor) -> Tensor:
    """[I, N]: ``ranked``, after the K patches that ``claims`` lets through: K small steps, none waits for the device.

    A patch's key is its place in ``ranked``, plus N once it is claimed, 2 N if it can't be a source, 3 N once it is
    chosen: the least key is the next choice.
    """
    images, patches = ranked.shape
    place = torch.empty_like(ranked).scatter_(1, ranked, arange(0, patches, ranked.device).expand(images, -1))
    key = torch.where(eligible, place, place + 2 * patches)
    tiers = torch.full((len(claims),), patches, device=ranked.device)
    tiers[0] = 3 * patches
    sources: list[Tensor] = []
    for _ in range(min(k, patches)):
        best = key.argmin(1)  # [I]
        near = claims.index_select(1, best).T  # [I, C + 1]
        key.scatter_reduce_(1, near, place.gather(1, near) + tiers, "amax")
        sources.append(best)
    first = arange(-len(sources), 0, ranked.device).expand(images, -1)
    return key.scatter_(1, torch.stack(sources, dim=1), first).argsort(1)


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def _minus_infinity(device: torch.device) -> Tensor:
    return torch.full((), float("-inf"), dtype=torch.float32, device=device)
