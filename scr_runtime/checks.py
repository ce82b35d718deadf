"""What can be known before any prefill, and so is checked when an SCR is made and when it is attached."""

from __future__ import annotations

import difflib
import math
import os
import sys
from numbers import Real
from typing import Any, get_args

from torch import nn

from scr_runtime.attention import check_selectable, eager_attention
from scr_runtime.config import Mode, SCRConfig
from scr_runtime.errors import ConfigurationError, PrefillError, UnsupportedModelError
from scr_runtime.families import Family, blocks_of
from scr_runtime.network import SourcePredictor
from scr_runtime.places import FORMS
from scr_runtime.redistribute import Grid
from scr_runtime.rule import asked_num_sources, effective_num_sources


def check_arguments(config: Any, predictor: Any, mode: Any, threshold: Any, seed: Any) -> None:
    """Checks the arguments of an SCR by themselves.

    Raises:
        ConfigurationError: If one is of another type, or out of range.
    """
    if mode not in get_args(Mode):
        near = difflib.get_close_matches(str(mode).lower().replace("_", "-"), get_args(Mode), 1)
        hint = f". Did you mean {near[0]!r}?" if near else ""
        raise ConfigurationError(f"mode={mode!r}: expected one of {list(get_args(Mode))}{hint}")
    if not (config is None or isinstance(config, SCRConfig)):
        raise ConfigurationError(f"config={config!r}: expected an SCRConfig; SCRConfig.from_dict makes one of a dict")
    if not (predictor is None or isinstance(predictor, str | os.PathLike | SourcePredictor)):
        raise ConfigurationError(f"predictor={predictor!r}: expected a SourcePredictor, or its place. {FORMS}")
    if not (threshold is None or _is_finite(threshold)):
        raise ConfigurationError(f"threshold={threshold!r}: expected a finite number, or None for the predictor's own")
    if not isinstance(seed, int) or isinstance(seed, bool) or not -(2**63) <= seed < 2**64:
        raise ConfigurationError(f"seed={seed!r}: expected an integer of 64 bits")


def _is_finite(value: Any) -> bool:
    """Whether a value is a number that a float can hold."""
    if not isinstance(value, (int, float, Real)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def check_grid(model: Any, family: Family, config: SCRConfig) -> Grid | None:
    """Checks that sources can be chosen on the grid of a family whose images all have the same one.

    Returns:
        That grid; ``None`` if it is not known before a call.

    Raises:
        ConfigurationError: If no patch of it can be a source.
    """
    if family.fixed_grid is None:
        return None
    try:
        image = family.fixed_grid(model, {})
    except PrefillError:
        return None  # a vision tower that is not known: what a call says of it decides
    try:
        effective_num_sources(image.grid, config)
    except PrefillError as error:
        raise ConfigurationError(f"the images of this model have {error}") from None
    return image.grid


def fewer_sources(grid: Grid, config: SCRConfig) -> str | None:
    """Says that fewer sources are used on a grid than the settings ask for; ``None`` where all are."""
    asked, used = asked_num_sources(grid, config), effective_num_sources(grid, config)
    if used == asked:
        return None
    rows, columns = grid
    return (
        f"{asked} sources are asked for, and {used} are used for an image of {rows} x {columns} = {rows * columns} "
        "patches: at most half of those that can be sources"
    )


def check_decoder(model: Any, family: Family, config: SCRConfig, *, online: bool = False) -> None:
    """Checks that the attention of a model's decoder can be read.

    Args:
        model: The model.
        family: Its family.
        config: Which blocks.
        online: Whether the pass itself is read, in which each block has its own mask, and not a nested run.

    Raises:
        UnsupportedModelError: If not; the message names the modes that need no diagnostic run.
    """
    if family.tap is not None:
        return
    blocks = blocks_of(model)
    first, last = config.attention_layers if online else (config.state_layer + 1, config.attention_layers[1])
    text = family.text_config(model)
    check_selectable(text)
    kinds: list[str] = getattr(text, "layer_types", None) or []
    if not online and len(set(kinds[config.state_layer : last + 1])) > 1:
        raise UnsupportedModelError(
            f"blocks {config.state_layer}-{last} mix attention of different reach "
            f"({sorted(set(kinds[config.state_layer : last + 1]))}); the diagnostic run knows the mask of one. Use "
            "mode='one-pass' or 'uniform'."
        )
    for layer in range(first, last + 1):
        attention = attention_of(blocks[layer])
        problem = _problem(attention, layer, str(text._attn_implementation))
        if problem is not None:
            raise UnsupportedModelError(
                f"SCR can't read the attention of block {layer} ({type(blocks[layer]).__name__}): "
                f"{problem}. Use mode='one-pass' or 'uniform'."
            )


def attention_of(block: nn.Module) -> nn.Module | None:
    """The attention module of a decoder block: the part of it that has its config and knows its layer."""
    for module in block.modules():
        knows = isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "config")
        if knows and "Attention" in type(module).__name__:
            return module
    return None


def attention_configs(model: Any, family: Family) -> list[Any]:
    """The config objects that the attention of a model's decoder reads; one, in all models but odd ones."""
    found = {id(config): config for config in [family.text_config(model)]}
    for block in blocks_of(model):
        config = getattr(attention_of(block), "config", None)
        if hasattr(config, "_attn_implementation"):
            found.setdefault(id(config), config)
    return list(found.values())


def _problem(attention: nn.Module | None, layer: int, implementation: str) -> str | None:
    """Why a block's attention can't be read."""
    if attention is None:
        return "no attention module in it knows its layer"
    name = type(attention).__name__
    if attention.layer_idx != layer:
        return f"{name} says that it is that of layer {attention.layer_idx}"
    files = [sys.modules.get(kind.__module__) for kind in type(attention).__mro__]
    if not any(hasattr(file, "ALL_ATTENTION_FUNCTIONS") for file in files):
        return f"{name} does not use transformers' attention interface"
    if implementation.endswith("eager") and eager_attention(attention) is None:
        return f"{name} has no eager_attention_forward in its file"
    return None
