"""Muon for small matrices on a CPU: in fp32, and all matrices of one shape in one batch.

torch.optim.Muon works one matrix at a time in bfloat16, which takes 2.5 times as long on a CPU without bfloat16 units.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic Newton-Schulz iteration (Jordan et al. 2024)
_ITERATIONS = 5


def orthogonalised(matrices: Tensor) -> Tensor:
    """[G, m, n] -> the nearest semi-orthogonal matrices, roughly: singular values between 0.7 and 1.2."""
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


class Trainer:
    """Muon with Nesterov momentum for hidden matrices, AdamW for everything else, over one cosine schedule.

    Args:
        modules: What is trained. Matrices of attention and feed-forward layers are hidden ones.
        extra: Further parameters, for AdamW.
        rate: Peak learning rate of both; Muon's updates are scaled to the size of Adam's (arXiv 2502.16982).
        steps: Steps of the schedule.
    """

    def __init__(self, modules: Iterable[nn.Module], extra: Sequence[nn.Parameter], rate: float, steps: int) -> None:
        shapes: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
        others = list(extra)
        for module in modules:
            for name, weight in module.named_parameters():
                hidden = weight.ndim == 2 and ("self_attn" in name or "mlp" in name)
                (shapes[tuple(weight.shape)] if hidden else others).append(weight)
        self._groups = list(shapes.values())
        self._momenta = [torch.zeros(len(group), *shape) for shape, group in shapes.items()]
        self._all = [weight for group in self._groups for weight in group] + others
        self._adam = torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
        self._rate, self._steps, self._step = rate, steps, 0

    def step(self, loss: Tensor) -> None:
        """One step down the gradient of a loss, clipped to norm 1."""
        loss.backward()
        nn.utils.clip_grad_norm_([weight for weight in self._all if weight.grad is not None], 1.0)
        warm = max(1, min(100, self._steps // 10))
        share = min((self._step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * min(1.0, self._step / self._steps)))
        for group in self._adam.param_groups:
            group["lr"] = self._rate * share
        self._adam.step()
        with torch.no_grad():
            for group, momentum in zip(self._groups, self._momenta, strict=True):
                self._step_matrices(group, momentum, self._rate * share)
        for weight in self._all:
            weight.grad = None
        self._step += 1

    def _step_matrices(self, group: list[nn.Parameter], momentum: Tensor, rate: float) -> None:
        empty = torch.zeros_like(group[0])
        gradient = torch.stack([empty if weight.grad is None else weight.grad for weight in group])  # [G, m, n]
        momentum.lerp_(gradient, 0.05)
        update = orthogonalised(gradient.lerp(momentum, 0.95))
        scale = 0.2 * math.sqrt(max(group[0].shape))
        for weight, change in zip(group, update, strict=True):
            weight.mul_(1 - rate * 0.02).sub_(change, alpha=rate * scale)
