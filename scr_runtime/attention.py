"""Rows of text-to-image attention, taken where the model computes q and k, without any attention matrix.

A wrapper is registered beside the attention implementation that the model uses (sdpa, eager, flash). It passes
every call through unchanged. Only inside the nested diagnostic run, and in the prefill itself in mode online, does it
compute the last rows of softmax(q k^T) from the very q and k it was given, after RoPE and q/k norms.

The wrapper is selected in a decoder's config for as long as somebody needs it. A config may be shared (by models made
from one config object, by several SCRs, by an SCR and a capture), so each selection is held by its owners, and what
was there before comes back with the last of them.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from scr_runtime.errors import UnsupportedModelError
from scr_runtime.here import Turns, here
from scr_runtime.redistribute import wide

_PREFIX = "scr_"
_MASKED_BY_TENSOR = ("sdpa", "eager")
_MASKED_BY_FUNCTION = ("flex_attention",)
_MOST_WEIGHTS = 2**24  # attention weights held at a time: 64 MiB of float32


class MapComplete(BaseException):
    """Leaves the diagnostic run from inside the last attention that it needs; no ``except Exception`` stops it."""


class AttentionRows:
    """Sums the last rows of the attention of several layers, averaged over heads.

    Args:
        layers: First and last block to read, both included.
        rows: How many of the last query positions are kept, T.
        past: Positions of the cache that the pass continues, of whose columns none is kept; the pass then goes on
            behind the last layer. ``None`` for a run that is left there, and whose columns are all kept.
        modules: Those whose attention is read, in a pass in which other models' may run; ``None`` for all.

    Attributes:
        total: [B, T, S] float32, sum over layers read so far; ``None`` before the first.
    """

    def __init__(
        self, layers: tuple[int, int], rows: int, past: int | None = None, modules: Container[Any] | None = None
    ) -> None:
        self.layers = layers
        self.rows = rows
        self.past = past
        self.modules = modules
        self.total: Tensor | None = None
        self._next = layers[0]
        self._seen: tuple[Tensor, Tensor] | None = None  # q and k of the layer before
        self._unseen: dict[Any, Tensor] = {}  # causal masks, the same for all layers of a kind

    @torch.no_grad()
    def read(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        window: int | None = None,
    ) -> None:
        """Adds one layer's rows.

        Args:
            layer: Index of the decoder block.
            query: [B, H, S, h] after RoPE.
            key: [B, H_kv, S, h].
            attention_mask: What the attention implementation was given: [B, 1, S, S] bool or additive,
                [B, S] of kept positions, or ``None`` for plain causal.
            scaling: Factor of q k^T; ``None`` for 1 / sqrt(h).
            softcap: c of c tanh(q k^T / c), before the mask; ``None`` without soft-capping.
            sinks: [H] logits of the columns that take attention and give nothing; ``None`` without sinks.
            window: How many positions a query sees, itself included, where the mask is not 4-D; ``None`` for all.

        Raises:
            MapComplete: When the last layer of a run that is left there has been read.
            UnsupportedModelError: If a layer was left out, or has several attentions.
        """
        if layer < self.layers[0] or self._is_repeated(layer, query, key):
            return
        batch, heads, length, size = query.shape
        groups = heads // key.shape[1]
        past = 0 if self.past is None else min(self.past, key.shape[2] - length)  # sliding caches drop the first ones
        chunk = max(_MOST_WEIGHTS // (batch * heads * key.shape[2]), 1)  # one chunk, but for prompts of many tiles
        means: list[Tensor] = []
        for first in range(length - self.rows, length, chunk):
            rows = query[:, :, first : first + chunk].unflatten(1, (key.shape[1], groups))  # [B, H_kv, G, t, h]
            weights = torch.matmul(rows, key[:, :, None].transpose(-1, -2))  # [B, H_kv, G, t, S]
            weights = weights.to(wide(query.dtype)) * (size**-0.5 if scaling is None else scaling)
            if softcap is not None:
                weights = torch.tanh(weights / softcap) * softcap
            weights = self._masked(weights, attention_mask, first, past, window)
            mean = _softmax(weights, sinks).mean((1, 2)).float()  # [B, t, S]
            means.append(mean if self.past is None else mean[..., past : past + length])
        mean = means[0] if len(means) == 1 else torch.cat(means, dim=1)  # [B, T, S]
        self.total = mean if self.total is None else self.total.add_(mean)
        self._next, self._seen = layer + 1, (query, key)
        if self.complete and self.past is None:
            raise MapComplete

    @property
    def complete(self) -> bool:
        """Whether the last layer has been read."""
        return self._next > self.layers[1]

    def _masked(
        self, weights: Tensor, attention_mask: Tensor | None, first: int, past: int, window: int | None
    ) -> Tensor:
        """[B, H_kv, G, t, S] weights of the query positions from ``first`` on, without those that they don't see.

        Without a 4-D mask, ``past`` columns lie before that of the first query position.
        """
        rows, length = weights.shape[-2:]
        lowest = torch.finfo(weights.dtype).min
        if attention_mask is not None and attention_mask.ndim == 4:
            mask = attention_mask[:, :, first : first + rows, :length][:, :, None]  # [B, 1, 1, t, S]
            if mask.dtype == torch.bool:
                return weights.masked_fill_(~mask, lowest)
            return weights.add_(mask)
        known = (past + first, length, window, weights.device)
        if known not in self._unseen:
            place = torch.arange(length, device=weights.device)
            own = place[past + first : past + first + rows, None]
            unseen = place[None, :] > own  # [t, S]
            self._unseen[known] = unseen if window is None else unseen | (place[None, :] <= own - window)
        weights = weights.masked_fill_(self._unseen[known], float("-inf"))
        if attention_mask is not None:  # flash attention gets [B, S] or nothing
            hidden = ~attention_mask[:, None, None, None, :length].bool()
            weights = weights.masked_fill_(hidden, lowest)
        return weights

    def _is_repeated(self, layer: int, query: Tensor, key: Tensor) -> bool:
        """Whether a layer was read already: some ask for the same weights twice, with other values."""
        if layer == self._next:
            return False
        if self._seen is not None and self._seen[0] is query and self._seen[1] is key:
            return True
        raise UnsupportedModelError(
            f"attention of block {layer} where that of block {self._next} was expected: blocks that leave attention "
            "out, or have several, can't be read. Use mode='one-pass' or 'uniform'."
        )


def _softmax(weights: Tensor, sinks: Tensor | None) -> Tensor:
    """[B, H_kv, G, t, S] shares of attention; what goes to the sinks is not among them."""
    if sinks is None:
        return weights.softmax(-1)
    column = sinks.to(weights.dtype).view(1, weights.shape[1], weights.shape[2], 1, 1)
    column = column.expand(len(weights), -1, -1, weights.shape[3], 1)
    return torch.cat([weights, column], dim=-1).softmax(-1)[..., :-1]


@functools.cache
def wrapper(base: Callable[..., Any] | None) -> Callable[..., Any]:
    """Makes the attention function that is registered beside another; the same one each time.

    Args:
        base: The other; ``None`` for eager attention, of which every modeling file brings its own.
    """

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
        if scr_rows is None and not torch.compiler.is_compiling():
            scr_rows = here.rows  # of blocks that don't hand keyword arguments on
        if scr_rows is not None and (scr_rows.modules is None or module in scr_rows.modules):
            _read(scr_rows, module, query, key, attention_mask, kwargs)
        function: Any = base or eager_attention(module)
        return function(module, query, key, value, attention_mask, *args, **kwargs)

    return attention


def _read(
    rows: AttentionRows, module: Any, query: Tensor, key: Tensor, attention_mask: Tensor | None, kwargs: dict[str, Any]
) -> None:
    if kwargs.get("position_bias") is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} adds a bias to its attention, which SCR does not read: use "
            "mode='one-pass' or 'uniform'"
        )
    rows.read(
        module.layer_idx,
        query,
        key,
        attention_mask,
        kwargs.get("scaling"),
        kwargs.get("softcap"),
        kwargs.get("s_aux"),
        kwargs.get("sliding_window"),
    )


def eager_attention(module: Any) -> Callable[..., Any] | None:
    """The eager attention function of the file that an attention module's class, or a base of it, is written in."""
    for kind in type(module).__mro__:
        found = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    return None


# -- selection --------------------------------------------------------------------------------------------------------


class Selected(str):
    """The wrapper's name in a config. A copy or a pickle of that config names what was there before."""

    before: str

    def __deepcopy__(self, memo: dict[int, Any]) -> str:
        """Returns what was there before."""
        return self.before

    def __reduce_ex__(self, protocol: Any) -> tuple[type[str], tuple[str]]:
        """Makes what was there before."""
        return str, (str(self.before),)


@dataclass
class _Held:
    """A config whose attention is wrapped.

    Attributes:
        config: The config object, which transformers can't hash.
        selected: What stands in it.
        owners: By identity; kept here, so that none of them is another object's.
    """

    config: Any
    selected: Selected
    owners: dict[int, object] = field(default_factory=dict[int, object])


_TURNS = Turns()
_HELD: dict[int, _Held] = {}


@_TURNS
def hold(config: Any, owner: object) -> None:
    """Selects the wrapper of a decoder's attention implementation, until ``release``.

    Both the attention function and its mask function are registered: a name without a mask function would
    silently get no mask. They stay registered: a model in another thread may be about to look its name up.

    Args:
        config: The decoder's config, read by its attention at every call.
        owner: Who needs it, any object. An owner holds a config once, however often it asks.

    Raises:
        UnsupportedModelError: If the implementation is not one that can be wrapped.
    """
    check_selectable(config)
    held = _HELD.get(id(config))
    current: str = config._attn_implementation
    if held is None or held.selected is not current:  # nobody has asked, or a user has set another since
        owners = {} if held is None else held.owners
        held = _HELD[id(config)] = _Held(config, _selected(current), owners)
    held.owners[id(owner)] = owner
    _register(held.selected)
    config.__dict__[_place(config)] = held.selected  # this config alone: the property would reach its sub-configs


@_TURNS
def release(owner: object) -> None:
    """Puts back what was in all configs that nobody but ``owner`` holds, unless a user has set something else."""
    for key, held in list(_HELD.items()):
        held.owners.pop(id(owner), None)
        if held.owners:
            continue
        values, place = held.config.__dict__, _place(held.config)
        if values.get(place) is held.selected:
            values[place] = held.selected.before
        _HELD.pop(key, None)


def takes_mask_tensor(config: Any) -> bool:
    """Whether a decoder's attention implementation, wrapped or not, takes any mask [B, 1, Q, K]."""
    return _unwrapped(config) in _MASKED_BY_TENSOR


def check_selectable(config: Any) -> None:
    """Checks that a config's attention implementation can be wrapped.

    Raises:
        UnsupportedModelError: If it has no mask function, or one whose masks are no tensors.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    base = _unwrapped(config)
    functions, masks = AttentionInterface(), AttentionMaskInterface()
    if base in _MASKED_BY_FUNCTION:
        raise UnsupportedModelError(
            f"attention implementation {base!r} has masks that SCR can't read. Use mode='one-pass' or "
            "'uniform', or load the model with attn_implementation='sdpa'."
        )
    if base not in masks or (base != "eager" and base not in functions):
        known = sorted(name for name in masks if not name.startswith(_PREFIX) and name not in _MASKED_BY_FUNCTION)
        raise UnsupportedModelError(
            f"attention implementation {base!r} has no mask function that SCR can share; load the model with "
            f"attn_implementation= one of {known}"
        )


def _place(config: Any) -> str:
    """Where a config keeps the name: transformers has a property in front of it."""
    internal = "_attn_implementation_internal"
    return internal if internal in config.__dict__ else "_attn_implementation"


def _unwrapped(config: Any) -> str:
    return str(config._attn_implementation).removeprefix(_PREFIX)


def _selected(base: str) -> Selected:
    selected = Selected(_PREFIX + str(base).removeprefix(_PREFIX))
    selected.before = base.before if isinstance(base, Selected) else base
    return selected


def _register(selected: Selected) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    functions, masks = AttentionInterface(), AttentionMaskInterface()
    base = str(selected).removeprefix(_PREFIX)
    name = str(selected)
    AttentionMaskInterface.register(name, masks[base])
    AttentionInterface.register(name, wrapper(None if base == "eager" else functions[base]))
