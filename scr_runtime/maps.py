"""The diagnostic run alone, without an edit: what the harvest collects."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from scr_runtime.attention import hold, release, takes_mask_tensor
from scr_runtime.checks import attention_configs, check_decoder
from scr_runtime.config import SCRConfig
from scr_runtime.diagnostic import Decoder, StateLayerOutput, block_arguments, residual_stream
from scr_runtime.errors import PrefillError
from scr_runtime.families import Family, blocks_of, family_of, generative_model
from scr_runtime.here import Running, here
from scr_runtime.layout import VisualLayout, count_mismatch, visual_layout
from scr_runtime.packing import Packed, pack
from scr_runtime.redistribute import Grid, credit_entropy, state_norms
from scr_runtime.shadows import Shadows


@dataclass(frozen=True)
class Capture:
    """One image of a batch, as the diagnostic run sees it.

    Attributes:
        row: Batch row of the image.
        states: [N, d] states of the patches at ``state_layer``, in the model's dtype.
        attention: [N] float32 attention from text to patches, averaged over text rows, heads and
            ``attention_layers``; not normalised.
        question: [d] float32 mean state of the text after the image.
        grid: Rows and columns of patches.
        entropy: Credit entropy of the states, eq. (2) of arXiv 2602.22469, in nats.
    """

    row: int
    states: Tensor
    attention: Tensor
    question: Tensor
    grid: Grid
    entropy: float


class _Captured(BaseException):
    """Leaves the model once the diagnostic run inside the state layer is done; no ``except Exception`` stops it."""


@torch.no_grad()
def capture(model: nn.Module, config: SCRConfig, inputs: Mapping[str, Any], rows_per_image: int = 1) -> list[Capture]:
    """Runs vision tower, state layer and the diagnostic blocks of a batch; never an edit, later blocks or the head.

    Args:
        model: A model of a supported family in eval mode, or a module that wraps one.
        config: Which block's states and which layers' attention to read.
        inputs: Keyword arguments of the model's forward, as its processor returns them.
        rows_per_image: More than 1: each image of ``pixel_values`` serves so many successive rows, which hold one
            image each. It is encoded once; and where the model's positions and its attention allow, its tokens pass
            through the blocks once, with the texts of all its rows behind them (``scr_runtime.packing``).

    Returns:
        One capture per image in the prompts, in order of appearance over (row, position). Its tensors are on the
        model's device.

    Raises:
        PrefillError: If the batch has no image, or its visual tokens don't fit the images.
        ConfigurationError: If the layers are beyond the model's depth.
        UnsupportedModelError: If the attention of the model's decoder can't be read.
    """
    model = generative_model(model)
    family = family_of(model)
    decoder = Decoder(family, blocks_of(model))
    config.check_depth(len(decoder.blocks))
    check_decoder(model, family, config)
    if not family.brings_images(model, inputs) or not bool(family.visual_tokens(model, inputs["input_ids"]).any()):
        raise PrefillError(
            "a prompt without an image: the diagnostic run needs pixel_values and an image placeholder in the text"
        )
    packed, rows = None, None
    if rows_per_image > 1:
        packed = _pack(model, decoder, inputs, rows_per_image)
        inputs = _packed_inputs(inputs, packed) if packed else _with_images_per_row(model, inputs, rows_per_image)
    layout, rows = _layout(model, family, inputs, packed)
    captures: list[Capture] = []
    thread = threading.get_ident()

    def after_state_layer(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        kwargs, output = rest if len(rest) == 2 else ({}, rest[-1])
        if threading.get_ident() != thread or residual_stream(output).shape[:2] != inputs["input_ids"].shape:
            return  # another call of this model, in another thread or in a user's hook
        call = block_arguments(module, args, kwargs)
        captures.extend(_captures(StateLayerOutput(residual_stream(output), layout, config, decoder, call)))
        raise _Captured

    with ExitStack() as stack:
        _show_attention(model, family, stack)
        stack.callback(decoder.keep_call(model))
        hook = decoder.blocks[config.state_layer].register_forward_hook(after_state_layer, with_kwargs=True)
        stack.callback(hook.remove)
        try:
            here.captures = Running.of(sys._getframe())
            model(**{**inputs, "use_cache": False})
        except _Captured:
            return (
                captures if rows is None else [replace(one, row=row) for one, row in zip(captures, rows, strict=True)]
            )
        finally:
            here.captures = None
    raise PrefillError(
        f"the model ran to its end without passing block {config.state_layer}'s hook; is it compiled as a whole?"
    )


def _show_attention(model: nn.Module, family: Family, stack: ExitStack) -> None:
    """Makes the decoder's attention readable until the stack is closed."""
    owner, shadows = object(), Shadows()
    stack.callback(release, owner)
    stack.callback(shadows.remove)
    if family.tap is None:
        for config in attention_configs(model, family):
            hold(config, owner)
    else:
        for layer, block in enumerate(blocks_of(model)):
            shadows.add(*family.tap(block, layer))


def _captures(state: StateLayerOutput) -> list[Capture]:
    """Runs the diagnostic and gathers what it and the state layer say of each image, in order of appearance."""
    found: dict[int, Capture] = {}
    for group, attention in zip(state.layout.groups, state.diagnose(), strict=True):
        states, question = state.states(group), state.question(group)
        entropies = credit_entropy(state_norms(states)).tolist()
        for index, (image, row, entropy) in enumerate(zip(group.images, group.rows.tolist(), entropies, strict=True)):
            found[image] = Capture(row, states[index], attention[index], question[index], group.grid, entropy)
    return [found[image] for image in sorted(found)]


def _layout(
    model: nn.Module, family: Family, inputs: Mapping[str, Any], packed: Packed | None
) -> tuple[VisualLayout, list[int] | None]:
    """Where the images of a batch are; of one that was packed, once per prompt, with the prompt of each."""
    rows = None
    visual = family.visual_tokens(model, inputs["input_ids"])
    grids = family.image_grids(model, inputs)
    if packed is not None:
        layout, rows = packed.expand(visual_layout(visual, None, grids))
    else:
        layout = visual_layout(visual, inputs.get("attention_mask"), grids)
    if not layout.fits(layout.edge.tolist()):
        raise count_mismatch(layout)
    return layout, rows


def _pack(model: nn.Module, decoder: Decoder, inputs: Mapping[str, Any], rows_per_image: int) -> Packed | None:
    """Packs the rows of each image, if the attention takes a 4-D mask and nothing else comes per token."""
    family = decoder.family
    config = family.text_config(model)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not (
        family.packs
        and kinds == {"full_attention"}
        and takes_mask_tensor(config)
        and {"input_ids", "attention_mask", "pixel_values"} <= set(inputs) <= _KNOWN
    ):
        return None
    visual = family.visual_tokens(model, inputs["input_ids"])
    dtype = next(decoder.blocks[0].parameters()).dtype
    known = None if family.positions is None else family.positions(model, _repeated(inputs, rows_per_image))
    return pack(inputs["input_ids"], inputs["attention_mask"], visual, rows_per_image, dtype, known)


_TABLES = ("image_sizes", "image_grid_thw")  # one entry per image
_PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "position_ids")
_KNOWN = {*_PER_TOKEN, *_TABLES, "pixel_values"} - {"position_ids"}


def _packed_inputs(inputs: Mapping[str, Any], packed: Packed) -> dict[str, Any]:
    """The inputs of a pass over packed prompts; what else came per token belongs to the unpacked ones."""
    others = {key: value for key, value in inputs.items() if key not in _PER_TOKEN}
    return {**others, **{key: getattr(packed, key) for key in ("input_ids", "position_ids", "attention_mask")}}


def _tables(inputs: Mapping[str, Any]) -> list[str]:
    return [key for key in _TABLES if inputs.get(key) is not None]


def _repeated(inputs: Mapping[str, Any], rows_per_image: int) -> dict[str, Any]:
    """The inputs with each image's entry in the tables once per row."""
    tables = {key: inputs[key].repeat_interleave(rows_per_image, 0) for key in _tables(inputs)}
    return {**inputs, **tables}


def _with_images_per_row(model: Any, inputs: Mapping[str, Any], rows_per_image: int) -> dict[str, Any]:
    """Inputs in which each row has its image: by its features, or where tables belong to pixels, by its pixels."""
    if not _tables(inputs):
        return _with_shared_features(model, inputs, rows_per_image)
    pixels: Tensor = inputs["pixel_values"]
    table: Tensor | None = inputs.get("image_grid_thw")
    images = pixels if table is None else pixels.split(table.prod(-1).tolist())  # [M, T, 3, H, W], or patches in a row
    repeated = [image for image in images for _ in range(rows_per_image)]
    return _repeated(inputs, rows_per_image) | {
        "pixel_values": torch.stack(repeated) if table is None else torch.cat(repeated)
    }


def _with_shared_features(model: Any, inputs: Mapping[str, Any], rows_per_image: int) -> dict[str, Any]:
    """Encodes each image once and hands its features to all of its rows."""
    encoded = model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True)
    features = encoded.pooler_output  # LLaVA: a list of [N, d]; others: [M, N, d]
    if isinstance(features, Tensor):
        features = features.repeat_interleave(rows_per_image, 0)
    else:
        features = [feature for feature in features for _ in range(rows_per_image)]
    rest = {key: value for key, value in inputs.items() if key != "pixel_values"}
    return rest | {"mm_encoder_outputs": {"image": SimpleNamespace(pooler_output=features)}}
