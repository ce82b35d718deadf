"""Rows of text-to-image attention, taken where the model computes q and k, without any attention matrix.

A wrapper is registered beside the attention implementation that the model uses (sdpa, eager, flash). It passes
every call through unchanged. Only when the nested diagnostic run passes ``scr_rows`` as a keyword argument does it
compute the last rows of softmax(q k^T) from the very q and k it was given, after RoPE and q/k norms.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from scr_runtime.errors import UnsupportedModelError

_PREFIX = "scr_"
_MASKED_BY_TENSOR = ("sdpa", "eager")
_MOST_WEIGHTS = 2**24  # attention weights held at a time: 64 MiB of float32


class MapComplete(Exception):  # noqa: N818 - a signal, not an error
    """Leaves the diagnostic run from inside the last attention that it needs."""


class AttentionRows:
    """Sums the last rows of the attention of several layers, averaged over heads.

    Args:
        layers: First and last block to read, both included.
        rows: How many of the last query positions are kept, T.

    Attributes:
        total: [B, T, S] float32, sum over layers read so far; ``None`` before the first.
    """

    def __init__(self, layers: tuple[int, int], rows: int) -> None:
        self.layers = layers
        self.rows = rows
        self.total: Tensor | None = None

    def read(
        self, layer: int, query: Tensor, key: Tensor, attention_mask: Tensor | None, scaling: float | None
    ) -> None:
        """Adds one layer's rows.

        Args:
            layer: Index of the decoder block.
            query: [B, H, S, h] after RoPE.
            key: [B, H_kv, S, h].
            attention_mask: What the attention implementation was given: [B, 1, S, S] bool or additive,
                [B, S] of kept positions, or ``None`` for plain causal.
            scaling: Factor of q k^T; ``None`` for 1 / sqrt(h).

        Raises:
            MapComplete: When the last layer has been read.
        """
        if layer < self.layers[0]:
            return
        batch, heads, length, size = query.shape
        groups = heads // key.shape[1]
        chunk = max(_MOST_WEIGHTS // (batch * heads * length), 1)  # one chunk, but for prompts of many tiles
        means: list[Tensor] = []
        for first in range(length - self.rows, length, chunk):
            rows = query[:, :, first : first + chunk].unflatten(1, (key.shape[1], groups))  # [B, H_kv, G, t, h]
            weights = torch.matmul(rows, key[:, :, None].transpose(-1, -2))  # [B, H_kv, G, t, S]
            weights = weights.float() * (size**-0.5 if scaling is None else scaling)
            means.append(_masked(weights, attention_mask, first).softmax(-1).mean((1, 2)))  # [B, t, S]
        mean = means[0] if len(means) == 1 else torch.cat(means, dim=1)  # [B, T, S]
        self.total = mean if self.total is None else self.total.add_(mean)
        if layer >= self.layers[1]:
            raise MapComplete


def _masked(weights: Tensor, attention_mask: Tensor | None, first: int) -> Tensor:
    """[B, H_kv, G, t, S] weights of the query positions from ``first`` on, with those masked that they don't see."""
    rows, length = weights.shape[-2:]
    if attention_mask is not None and attention_mask.ndim == 4:
        mask = attention_mask[:, :, first : first + rows, :length][:, :, None]  # [B, 1, 1, t, S]
        if mask.dtype == torch.bool:
            return weights.masked_fill_(~mask, torch.finfo(weights.dtype).min)
        return weights.add_(mask)
    place = torch.arange(length, device=weights.device)
    future = place[None, :] > place[first : first + rows, None]  # [t, S]
    weights = weights.masked_fill_(future, float("-inf"))
    if attention_mask is not None:  # flash attention gets [B, S] or nothing
        hidden = ~attention_mask[:, None, None, None, :length].bool()
        weights = weights.masked_fill_(hidden, torch.finfo(weights.dtype).min)
    return weights


def select_wrapper(config: Any) -> Callable[[], None]:
    """Selects the wrapper of a decoder's attention implementation.

    Both the attention function and its mask function are registered: a name without a mask function would
    silently get no mask.

    Args:
        config: The decoder's config, read by its attention at every call.

    Returns:
        A function that puts the former implementation back.

    Raises:
        UnsupportedModelError: If the implementation is not one that can be wrapped.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    base: str = config._attn_implementation
    functions, masks = AttentionInterface(), AttentionMaskInterface()
    if base not in masks or (base != "eager" and base not in functions):
        known = sorted(name for name in masks if not name.startswith(_PREFIX))
        raise UnsupportedModelError(
            f"attention implementation {base!r} has no mask function that SCR can share; load the model with "
            f"attn_implementation= one of {known}"
        )
    name = _PREFIX + base
    if name not in functions:
        AttentionInterface.register(name, _wrapper(functions[base] if base != "eager" else None))
        AttentionMaskInterface.register(name, masks[base])
    config._attn_implementation = {"": name}  # this config alone: a name by itself would reach its sub-configs

    def restore() -> None:
        config._attn_implementation = {"": base}

    return restore


def takes_mask_tensor(config: Any) -> bool:
    """Whether a decoder's attention implementation, wrapped or not, takes any mask [B, 1, Q, K]."""
    return str(config._attn_implementation).removeprefix(_PREFIX) in _MASKED_BY_TENSOR


def _wrapper(base: Callable[..., Any] | None) -> Callable[..., Any]:
    def attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        scr_rows: AttentionRows | None = None,
        **kwargs: Any,
    ) -> Any:
        if scr_rows is not None:
            scr_rows.read(module.layer_idx, query, key, attention_mask, kwargs.get("scaling"))
        # Every modeling file brings its own eager function, so that one is looked up where the module lives.
        function = base or sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined]
        return function(module, query, key, value, attention_mask, *args, **kwargs)

    return attention
