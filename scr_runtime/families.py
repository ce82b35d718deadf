"""Where each VLM family keeps its decoder blocks, its visual tokens and its patch grids.

A new family is one entry in ``FAMILIES`` and the small functions it names; ``docs/families.md`` walks through one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from scr_runtime import grids
from scr_runtime.errors import PrefillError, UnsupportedModelError
from scr_runtime.grids import ImageGrid
from scr_runtime.here import here
from scr_runtime.shadows import Around, Inner

BetweenBlocks = Callable[[int, Tensor, Tensor | None], Tensor]
"""(index of the block that ran, its output [b, S, d], rows of the batch [b] or None for all) -> the next input."""

Tap = Callable[[nn.Module, int], tuple[nn.Module, str, Around]]
"""(block, its index) -> the shadow that shows ``here.rows`` the q and k of its attention: module, method, wrapper."""


# -- visual tokens ---------------------------------------------------------------------------------------------------


def is_image_prefill(call: Mapping[str, Any]) -> bool:
    """Whether a forward call brings images, as pixels or as features that ``generate`` has encoded.

    Raises:
        PrefillError: If it brings a video.
    """
    encoded: Mapping[str, Any] = call.get("mm_encoder_outputs") or {}
    if call.get("pixel_values_videos") is not None or encoded.get("video") is not None:
        raise PrefillError(
            "a prompt with a video: SCR is defined on the patches of still images. Detach SCR for this call, or "
            "give single frames as images."
        )
    return call.get("pixel_values") is not None or encoded.get("image") is not None


# -- Qwen3-VL: DeepStack ---------------------------------------------------------------------------------------------


def _deepstack(call: Mapping[str, Any]) -> BetweenBlocks | None:
    """Qwen3-VL's language model adds features of the vision tower after its first blocks, outside of them."""
    features: list[Tensor] | None = call.get("deepstack_visual_embeds")
    if features is None:
        return None
    visual: Tensor = call["visual_pos_masks"]  # [B, S] bool

    def add(layer: int, hidden: Tensor, rows: Tensor | None) -> Tensor:
        if layer >= len(features):
            return hidden
        placed = hidden.new_zeros(*visual.shape, hidden.shape[-1])  # [B, S, d]
        placed = placed.masked_scatter(visual[..., None], features[layer].to(hidden.dtype))
        placed = placed[:, -hidden.shape[1] :]  # an image session runs the last positions only
        return hidden + (placed if rows is None else placed[rows])

    return add


# -- Qwen-VL (the first one): remote code ----------------------------------------------------------------------------


def _qwen_blocks(model: Any) -> nn.ModuleList:
    if not hasattr(model.transformer, "visual"):
        raise UnsupportedModelError(f"{type(model).__name__} of model_type 'qwen' has no vision tower")
    return model.transformer.h


def _qwen_visual_tokens(model: Any, input_ids: Tensor) -> Tensor:
    """Between the begin and the end token of an image, the prompt spells a path; features take its place."""
    start: int = model.config.visual["image_start_id"]
    begins, ends = input_ids == start, input_ids == start + 1
    return ((begins.cumsum(-1) - ends.cumsum(-1)) > 0) & ~begins


def _qwen_brings_images(model: Any, call: Mapping[str, Any]) -> bool:
    """The model's own test, with its own wait for the device: begin tokens in a call that continues no cache."""
    if call.get("past_key_values") is not None or call.get("input_ids") is None:
        return False
    return bool((call["input_ids"] == model.config.visual["image_start_id"]).any())


def _qwen_grid(model: Any, call: Mapping[str, Any]) -> ImageGrid:
    """256 resampler queries, whose position embedding is that of a 16 x 16 grid."""
    side = math.isqrt(model.config.visual.get("n_queries", 256))
    return ImageGrid((side, side))


def _qwen_grids(model: Any, call: Mapping[str, Any]) -> list[ImageGrid]:
    images = int((call["input_ids"] == model.config.visual["image_start_id"]).sum())
    return [_qwen_grid(model, call)] * images


def _qwen_tap(block: Any, layer: int) -> tuple[nn.Module, str, Around]:
    """Its attention is no transformers interface: the method that gets q and k is shadowed."""

    def show(inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rows = here.rows
        if rows is not None:
            query, key, _, _, attention_mask = args[:5]
            # [B, S] of kept positions, from additive [B, 1, 1, S]
            kept = None if attention_mask is None else attention_mask[:, 0, 0] >= 0
            rows.read(layer, query, key, kept, None)
        return inner(*args, **kwargs)

    return block.attn, "_attn", show


# -- the table -------------------------------------------------------------------------------------------------------


def _mrope(model: Any, call: Mapping[str, Any]) -> Tensor:
    """[3, B, S] positions of M-RoPE, by the model's own rule."""
    given = {key: call.get(key) for key in ("mm_token_type_ids", "image_grid_thw", "attention_mask")}
    return model.model.get_rope_index(call["input_ids"], **given)[0]


def _brings_images(model: Any, call: Mapping[str, Any]) -> bool:
    return is_image_prefill(call)


GridOf = Callable[[Any, Mapping[str, Any]], ImageGrid]


def _one_grid(grid: GridOf) -> dict[str, Any]:
    """For families in which every image has the same grid: it is known before any call."""

    def image_grids(model: Any, call: Mapping[str, Any]) -> list[ImageGrid]:
        return grids.same_grid(grid(model, call), call)

    return {"image_grids": image_grids, "fixed_grid": grid}


@dataclass(frozen=True, kw_only=True)
class Family:
    """How to find one family's parts. The defaults are those of most transformers classes.

    Attributes:
        name: ``config.model_type``; predictor folders and error messages use it.
        image_grids: Model and the call's keyword arguments (``generate``'s own among them) -> one grid per image
            or tile, in order of appearance.
        fixed_grid: Model and keyword arguments -> the grid of every image; ``None`` where images have grids of their
            own.
        several_grids: Whether an image can have several: a thumbnail, tiles.
        base: Model -> the module whose forward turns images and tokens into states: every way into the model leads
            through it.
        blocks: Model -> its decoder blocks, in order.
        text_config: Model -> the config object that its decoder's attention reads.
        visual_tokens: Model and input_ids [B, S] -> [B, S] bool, the positions that image features take.
        brings_images: Model and a forward call's keyword arguments -> whether this is a prefill with images.
        decoder: Model -> the module that calls the blocks; the base itself in some families.
        between_blocks: Keyword arguments of the decoder's call -> what it does to the residual stream between
            its blocks; ``None`` if it does nothing.
        tap: For attention that is no transformers interface; ``None`` for one that is.
        packs: Whether several prompts about one image can be packed into one sequence (``scr_runtime.packing``): all
            blocks see as far, and positions are counted or ``positions`` gives them. Set it once
            tests/scr_runtime/test_maps.py has compared the family prompt by prompt.
        positions: Model and the inputs of all prompts, images repeated -> [A, B, S] positions that the model would
            give their tokens; ``None`` where they count the kept tokens.
    """

    name: str
    image_grids: Callable[[Any, Mapping[str, Any]], list[ImageGrid]]
    fixed_grid: GridOf | None = None
    several_grids: bool = False
    base: Callable[[Any], nn.Module] = lambda model: model.model
    blocks: Callable[[Any], nn.ModuleList] = lambda model: model.model.language_model.layers
    text_config: Callable[[Any], Any] = lambda model: model.model.language_model.config
    visual_tokens: Callable[[Any, Tensor], Tensor] = grids.placeholders
    brings_images: Callable[[Any, Mapping[str, Any]], bool] = _brings_images
    decoder: Callable[[Any], nn.Module] = lambda model: model.model.language_model
    between_blocks: Callable[[Mapping[str, Any]], BetweenBlocks | None] | None = None
    tap: Tap | None = None
    packs: bool = False
    positions: Callable[[Any, Mapping[str, Any]], Tensor] | None = None


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(name="llava", packs=True, **_one_grid(grids.llava_grid)),
        Family(name="llava_next", image_grids=grids.llava_next_grids, several_grids=True, packs=True),
        Family(name="llava_onevision", image_grids=grids.llava_onevision_grids, several_grids=True),
        Family(name="qwen2_vl", image_grids=grids.qwen_vl_grids, packs=True, positions=_mrope),
        Family(name="qwen2_5_vl", image_grids=grids.qwen_vl_grids, packs=True, positions=_mrope),
        Family(
            name="qwen3_vl",
            image_grids=grids.qwen_vl_grids,
            between_blocks=_deepstack,
            packs=True,
            positions=_mrope,
        ),
        Family(
            name="chameleon",
            **_one_grid(grids.chameleon_grid),
            blocks=lambda model: model.model.layers,
            text_config=lambda model: model.config,
            decoder=lambda model: model.model,
        ),
        Family(name="internvl", **_one_grid(grids.internvl_grid), several_grids=True),
        Family(
            name="qwen",
            image_grids=_qwen_grids,
            fixed_grid=_qwen_grid,
            base=lambda model: model.transformer,
            blocks=_qwen_blocks,
            text_config=lambda model: model.config,
            visual_tokens=_qwen_visual_tokens,
            brings_images=_qwen_brings_images,
            decoder=lambda model: model.transformer,
            tap=_qwen_tap,
        ),
    )
}


BATCH_DIMENSION: dict[str, int] = {
    "attention_mask": 0,
    "position_ids": -2,
    "position_embeddings": -3,
    "rotary_pos_emb": 0,
    "registered_causal_mask": 0,
}
"""Where the batch is in the arguments of a decoder block.

M-RoPE puts the three axes of a position before the batch (position_ids [3, B, S], cos and sin [3, B, S, h]) where
other models have [B, S] and [B, S, h]: counted from the end both are the same, and no shape has to be guessed when B
happens to be 3.
"""


def family_of(model: nn.Module) -> Family:
    """Finds a model's family by ``config.model_type``.

    Raises:
        UnsupportedModelError: If the type is not in the table; names the supported ones.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    family = FAMILIES.get(str(model_type))
    if family is None or not hasattr(model, "generate"):
        raise UnsupportedModelError(
            f"{type(model).__name__} (model_type={model_type!r}) is not a model SCR knows. Supported are the "
            f"generative classes of these model types: {sorted(FAMILIES)}. A new family is one entry in "
            "scr_runtime/families.py; docs/families.md shows how."
        )
    return family


def blocks_of(model: Any) -> nn.ModuleList:
    """A model's decoder blocks, in order.

    Raises:
        UnsupportedModelError: If its decoder keeps them elsewhere than the family's decoders do.
    """
    try:
        blocks = family_of(model).blocks(model)
        assert isinstance(blocks, nn.ModuleList)
    except (AttributeError, AssertionError):
        decoder = next((module for module in model.modules() if "language_model" in module._modules), model)
        name = type(decoder._modules.get("language_model", decoder)).__name__
        raise UnsupportedModelError(
            f"the decoder of this {type(model).__name__} ({name}) keeps its blocks elsewhere than SCR's entry for "
            f"{family_of(model).name!r} says (scr_runtime/families.py): it is not a decoder that SCR knows"
        ) from None
    return blocks


def uncompiled(module: nn.Module) -> Any:
    """The module that ``torch.compile`` was given, or the module itself."""
    return module._modules.get("_orig_mod", module)


def generative_model(given: Any) -> Any:
    """The one model of a supported family in a wrapper: a compiled, a parallel, a PEFT model, or any other module.

    Args:
        given: The model itself, or a module that holds it.

    Raises:
        UnsupportedModelError: If there is none, or several, or ``given`` is no torch module.
    """
    if not isinstance(given, nn.Module):
        inside = " Pass the model in it: its .model." if isinstance(getattr(given, "model", None), nn.Module) else ""
        raise UnsupportedModelError(
            f"{type(given).__name__} is not a torch module, and so no model SCR knows.{inside}"
        )
    if _is_generative(given) and not any(map(_is_generative, given.children())):
        return given
    found = [module for module in given.modules() if _is_generative(module)]
    inside = [{id(module) for module in outer.modules()} - {id(outer)} for outer in found]
    found = [outer for outer, held in zip(found, inside, strict=True) if not held & set(map(id, found))]
    if len(found) > 1:
        names = sorted(type(module).__name__ for module in found)
        raise UnsupportedModelError(
            f"{type(given).__name__} holds {len(found)} models that SCR knows ({', '.join(names)}): attach to one of "
            "them"
        )
    if found:
        return found[0]
    family_of(given)  # raises, with the supported types, for most modules that hold no such model
    raise UnsupportedModelError(
        f"{type(given).__name__} holds no model that SCR knows: its config names one, but the model is not among its "
        "modules. Pass the transformers model itself."
    )


def _is_generative(module: nn.Module) -> bool:
    """Whether a module is a model of a supported family itself: what a wrapper passes on doesn't count."""
    family = FAMILIES.get(str(getattr(getattr(module, "config", None), "model_type", None)))
    if family is None or not callable(getattr(type(module), "generate", None)):
        return False
    try:
        base = family.base(module)
    except AttributeError:
        return False
    return any(child is base for child in module._modules.values())
