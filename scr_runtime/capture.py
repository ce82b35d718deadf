"""The diagnostic run alone: what the harvest collects."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scr_runtime.attention import select_wrapper
from scr_runtime.config import SCRConfig
from scr_runtime.errors import PrefillError
from scr_runtime.families import family_of, keep_decoder_call
from scr_runtime.layout import count_mismatch, visual_layout
from scr_runtime.packing import pack
from scr_runtime.redistribute import Grid, credit_entropy
from scr_runtime.sources import Prefill


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


@dataclass(frozen=True)
class _Encoded:
    """Image features in the form in which a forward call takes them."""

    pooler_output: list[Tensor] | Tensor


class _Captured(Exception):  # noqa: N818 - a signal, not an error
    """Leaves the model once the diagnostic run inside the state layer is done."""


@torch.no_grad()
def capture(model: nn.Module, config: SCRConfig, inputs: Mapping[str, Any], rows_per_image: int = 1) -> list[Capture]:
    """Runs vision tower, state layer and the diagnostic blocks of a batch; never an edit, later blocks or the head.

    Args:
        model: A model of a supported family in eval mode, without an SCR attached.
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
    """
    family = family_of(model)
    blocks = family.blocks(model)
    config.check_depth(len(blocks))
    visual = family.visual_tokens(model, inputs["input_ids"])
    if not family.brings_images(model, inputs) or not bool(visual.any()):
        raise PrefillError(
            "a prompt without an image: the diagnostic run needs pixel_values and an image placeholder in the text"
        )
    packed = None
    if rows_per_image > 1:
        if family.name in _PACKED_FAMILIES and _can_be_packed(family.text_config(model), inputs):
            dtype = next(blocks[0].parameters()).dtype
            packed = pack(inputs["input_ids"], inputs["attention_mask"], visual, rows_per_image, dtype)
        inputs = _with_shared_features(model, inputs, rows_per_image if packed is None else 1)
    if packed is None:
        layout = visual_layout(visual, inputs.get("attention_mask"), family.image_grids(model, inputs))
    else:
        inputs = {**inputs, **{k: getattr(packed, k) for k in ("input_ids", "position_ids", "attention_mask")}}
        shared = family.visual_tokens(model, packed.input_ids)
        layout = packed.expand(visual_layout(shared, None, family.image_grids(model, inputs)))
    if not layout.fits(layout.edge.tolist()):
        raise count_mismatch(layout)
    decoder_call: dict[str, Any] = {}
    captures: list[Capture] = []

    def after_state_layer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        prefill = Prefill(hidden, layout, config, blocks, args[1:], kwargs, family, decoder_call)
        found: dict[int, Capture] = {}
        for group, attention in zip(layout.groups, prefill.diagnose(), strict=True):
            states, question = prefill.states(group), prefill.question(group)
            entropy = credit_entropy(torch.linalg.vector_norm(states, dim=-1, dtype=torch.float32))
            for index, (image, row, value) in enumerate(
                zip(group.images, group.rows.tolist(), entropy.tolist(), strict=True)
            ):
                row = row if packed is None else image  # one image per row
                found[image] = Capture(row, states[index], attention[index], question[index], group.grid, value)
        captures.extend(found[image] for image in sorted(found))
        raise _Captured

    with ExitStack() as stack:
        if family.tap is None:
            stack.callback(select_wrapper(family.text_config(model)))
        stack.callback(keep_decoder_call(family, model, decoder_call))
        hook = blocks[config.state_layer].register_forward_hook(after_state_layer, with_kwargs=True)
        stack.callback(hook.remove)
        try:
            model(**{**inputs, "use_cache": False})
        except _Captured:
            return captures
    raise PrefillError(
        f"the model ran to its end without passing block {config.state_layer}'s hook; is it compiled as a whole?"
    )


# Families whose positions are one number per token and whose blocks all see as far: those that
# tests/scr_runtime/test_capture.py has compared, prompt by prompt.
_PACKED_FAMILIES = ("llava",)


def _can_be_packed(text_config: Any, inputs: Mapping[str, Any]) -> bool:
    """Whether attention takes a 4-D mask, and nothing else comes per token."""
    kinds = set(getattr(text_config, "layer_types", None) or ["full_attention"])
    return (
        kinds == {"full_attention"}
        and text_config._attn_implementation in ("sdpa", "eager")
        and set(inputs) == {"input_ids", "attention_mask", "pixel_values"}
    )


def _with_shared_features(model: Any, inputs: Mapping[str, Any], rows_per_image: int) -> dict[str, Any]:
    """Encodes each image once and hands its features to all of its rows."""
    encoded = model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True)
    features = encoded.pooler_output  # LLaVA: a list of [N, d]; others: [M, N, d]
    if isinstance(features, Tensor):
        features = features.repeat_interleave(rows_per_image, 0)
    else:
        features = [feature for feature in features for _ in range(rows_per_image)]
    rest = {key: value for key, value in inputs.items() if key != "pixel_values"}
    return rest | {"mm_encoder_outputs": {"image": _Encoded(features)}}
