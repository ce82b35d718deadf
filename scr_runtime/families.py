"""Where each VLM family keeps its decoder blocks, its visual tokens and its patch grids.

A new family is one entry in ``FAMILIES`` and the small functions it names; ``docs/families.md`` walks through one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scr_runtime.attention import AttentionRows
from scr_runtime.errors import PrefillError, UnsupportedModelError
from scr_runtime.redistribute import Grid

BetweenBlocks = Callable[[int, Tensor, Tensor | None], Tensor]
"""(index of the block that ran, its output [b, S, d], rows of the batch [b] or None for all) -> the next input."""

Tap = Callable[[nn.Module, int, AttentionRows], Callable[[], None]]
"""(block, its index, where to read to) -> the undo: makes the block's attention show its q and k."""


@dataclass(frozen=True)
class ImageGrid:
    """The patch grid of one image, tile or thumbnail, and the visual tokens around it that are no patches.

    Attributes:
        grid: Rows and columns of patches.
        skip: Visual tokens before the first patch (a class token), never edited.
        row_end: Visual tokens after each row of patches (a newline), never edited.
        tail: Visual tokens after the last row, never edited.
    """

    grid: Grid
    skip: int = 0
    row_end: int = 0
    tail: int = 0

    @property
    def tokens(self) -> int:
        """Visual tokens that the image takes in the prompt."""
        return self.skip + self.grid[0] * (self.grid[1] + self.row_end) + self.tail

    def patches(self, positions: Tensor) -> Tensor:
        """[..., N] positions of the patches, out of the [..., tokens] positions of all the image's tokens."""
        rows, columns = self.grid
        body = positions[..., self.skip : positions.shape[-1] - self.tail]
        return body.unflatten(-1, (rows, columns + self.row_end))[..., :columns].flatten(-2)


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


def _placeholders(model: Any, input_ids: Tensor) -> Tensor:
    return input_ids == model.config.image_token_id


# -- grids -----------------------------------------------------------------------------------------------------------


def _encoded_lengths(call: Mapping[str, Any]) -> list[int] | None:
    """Visual tokens of each image whose features ``generate`` has computed already; ``None`` where it has not."""
    encoded = (call.get("mm_encoder_outputs") or {}).get("image")
    return None if encoded is None else [feature.shape[-2] for feature in encoded.pooler_output]


def _mismatch(found: list[int], expected: list[int]) -> PrefillError:
    return PrefillError(
        f"images came with {sorted(set(found))} visual tokens, but their grids have {sorted(set(expected))} "
        f"({len(found)} and {len(expected)} images). A chunked prefill splits images: set prefill_chunk_size=None. "
        "An image of a size that the model's config doesn't name has no known grid."
    )


def _same_grid(grid: ImageGrid, call: Mapping[str, Any]) -> list[ImageGrid]:
    """For families in which every image has the same grid."""
    lengths = _encoded_lengths(call)
    if lengths is None:
        return [grid] * len(call["pixel_values"])
    if set(lengths) - {grid.tokens}:
        raise _mismatch(lengths, [grid.tokens] * len(lengths))
    return [grid] * len(lengths)


def _own_grids(images: list[list[ImageGrid]], model: Any, call: Mapping[str, Any]) -> list[ImageGrid]:
    """For families in which each image has its own grids; repeats them as ``generate`` does for beams."""
    lengths = _encoded_lengths(call)
    if lengths is not None and len(lengths) > len(images):
        # Each prompt's images are repeated as a group, so how many a prompt has matters: transformers waits for
        # the device to count them too, and only where there are beams.
        copies = len(lengths) // len(images)
        queue, images = list(reversed(images)), []
        for tokens in _placeholders(model, call["input_ids"]).sum(-1).tolist()[::copies]:
            group: list[list[ImageGrid]] = []
            while tokens > 0 and queue:
                group.append(queue.pop())
                tokens -= sum(grid.tokens for grid in group[-1])
            images += group * copies
    expected = [sum(grid.tokens for grid in image) for image in images]
    if lengths is not None and lengths != expected:
        raise _mismatch(lengths, expected)
    return [grid for image in images for grid in image]


def _needed(call: Mapping[str, Any], key: str) -> list[list[int]]:
    """A small table of sizes, as a list. The model reads it on the host too, before it does anything else."""
    table: Tensor | None = call.get(key)
    if table is None:
        raise PrefillError(
            f"the patch grid of an image is unknown: {key} is missing. The processor returns it; pass it to "
            "forward or generate, beside mm_encoder_outputs too."
        )
    return table.tolist()


_CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}  # tokens of a vision tower before its patches


def _tower(model: Any, call: Mapping[str, Any]) -> tuple[int, int]:
    """Patches along one side of a tile, and tokens before the first patch, of LLaVA's vision towers."""
    vision = model.config.vision_config
    strategy = call.get("vision_feature_select_strategy") or model.config.vision_feature_select_strategy
    before: int | None = _CLASS_TOKENS.get(vision.model_type)
    if before is None or (strategy == "default" and before == 0):
        raise PrefillError(
            f"the patch grid of vision tower {vision.model_type!r} with vision_feature_select_strategy={strategy!r} "
            f"is unknown; known towers and their class tokens: {_CLASS_TOKENS} ('default' drops one)."
        )
    return vision.image_size // vision.patch_size, before - (strategy == "default")


def _llava_grids(model: Any, call: Mapping[str, Any]) -> list[ImageGrid]:
    """LLaVA-1.5: a square grid of image_size / patch_size; strategy "full" keeps the class token first."""
    side, before = _tower(model, call)
    return _same_grid(ImageGrid((side, side), skip=before), call)


def _anyres_grids(model: Any, call: Mapping[str, Any], shrink: Callable[[Grid, int], Grid]) -> list[ImageGrid]:
    """LLaVA-NeXT: a thumbnail, then the tiles joined into one grid without padding, a newline after each row."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    side, before = _tower(model, call)
    if before:
        raise PrefillError("tiles with a class token have no grid; set vision_feature_select_strategy='default'")
    config, thumbnail = model.config, ImageGrid((side, side))
    per_prompt: Any = call.get("batch_num_images")  # LLaVA-OneVision tiles an image only where it is the only one
    per_prompt = [] if per_prompt is None else torch.as_tensor(per_prompt).tolist()
    tiled = [count == 1 for count in per_prompt for _ in range(count)]
    images: list[list[ImageGrid]] = []
    for index, (height, width) in enumerate(_needed(call, "image_sizes")):
        if tiled and not tiled[index]:
            images.append([ImageGrid((side, side), tail=1)])
            continue
        pinpoints, tile = config.image_grid_pinpoints, config.vision_config.image_size
        rows, columns = get_anyres_image_grid_shape((height, width), pinpoints, tile)
        joined = torch.empty(1, rows * side, columns * side, device="meta")
        rows, columns = unpad_image(joined, (height, width)).shape[1:]
        images.append([thumbnail, ImageGrid(shrink((rows, columns), side), row_end=1)])
    return _own_grids(images, model, call)


def _llava_next_grids(model: Any, call: Mapping[str, Any]) -> list[ImageGrid]:
    return _anyres_grids(model, call, lambda grid, side: grid)


def _llava_onevision_grids(model: Any, call: Mapping[str, Any]) -> list[ImageGrid]:
    """LLaVA-OneVision: LLaVA-NeXT's, and a joined grid of more than 9 tiles is scaled down."""
    most = int(model.config.vision_aspect_ratio.removeprefix("anyres_max_"))

    def shrink(grid: Grid, side: int) -> Grid:
        ratio = math.sqrt(grid[0] * grid[1] / (most * side**2))
        return (int(grid[0] // ratio), int(grid[1] // ratio)) if ratio > 1.1 else grid

    return _anyres_grids(model, call, shrink)


def _qwen_vl_grids(model: Any, call: Mapping[str, Any]) -> list[ImageGrid]:
    """Qwen2-VL and later: image_grid_thw counts vision patches, merge_size x merge_size of which are one token."""
    merge: int = model.config.vision_config.spatial_merge_size
    images: list[list[ImageGrid]] = []
    for frames, rows, columns in _needed(call, "image_grid_thw"):
        if frames != 1:
            raise PrefillError(f"image_grid_thw counts {frames} frames: that is a video, not an image")
        images.append([ImageGrid((rows // merge, columns // merge))])
    return _own_grids(images, model, call)


def _chameleon_grids(model: Any, call: Mapping[str, Any]) -> list[ImageGrid]:
    """Chameleon: one VQ token per 16 x 16 pixels (the encoder halves the image between its resolutions)."""
    vision = model.config.vq_config
    side = vision.resolution // 2 ** (len(vision.channel_multiplier) - 1)
    return _same_grid(ImageGrid((side, side)), call)


def _internvl_grids(model: Any, call: Mapping[str, Any]) -> list[ImageGrid]:
    """InternVL: each tile has a grid, and so has the thumbnail; how tiles lie is not in the inputs."""
    vision = model.config.vision_config
    ratio = model.config.downsample_ratio
    (height, width), (patch_height, patch_width) = (_pair(vision.image_size), _pair(vision.patch_size))
    return _same_grid(ImageGrid((int(height // patch_height * ratio), int(width // patch_width * ratio))), call)


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


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


def _qwen_grids(model: Any, call: Mapping[str, Any]) -> list[ImageGrid]:
    """256 resampler queries, whose position embedding is that of a 16 x 16 grid."""
    visual: Mapping[str, Any] = model.config.visual
    side = math.isqrt(visual.get("n_queries", 256))
    return [ImageGrid((side, side))] * int((call["input_ids"] == visual["image_start_id"]).sum())


def _qwen_tap(block: Any, layer: int, rows: AttentionRows) -> Callable[[], None]:
    """Its attention is no transformers interface: the method that gets q and k is shadowed during the run."""
    attention = block.attn
    inner = attention._attn

    def show(query: Tensor, key: Tensor, value: Tensor, causal: Any, attention_mask: Tensor | None, *rest: Any) -> Any:
        kept = None if attention_mask is None else attention_mask[:, 0, 0] >= 0  # [B, S], from additive [B, 1, 1, S]
        rows.read(layer, query, key, kept, None)
        return inner(query, key, value, causal, attention_mask, *rest)

    attention.__dict__["_attn"] = show
    return lambda: attention.__dict__.pop("_attn", None)


# -- the table -------------------------------------------------------------------------------------------------------


def _brings_images(model: Any, call: Mapping[str, Any]) -> bool:
    return is_image_prefill(call)


@dataclass(frozen=True, kw_only=True)
class Family:
    """How to find one family's parts. The defaults are those of most transformers classes.

    Attributes:
        name: ``config.model_type``; predictor folders and error messages use it.
        image_grids: Model and the call's keyword arguments (``generate``'s own among them) -> one grid per image
            or tile, in order of appearance.
        blocks: Model -> its decoder blocks, in order.
        text_config: Model -> the config object that its decoder's attention reads.
        visual_tokens: Model and input_ids [B, S] -> [B, S] bool, the positions that image features take.
        brings_images: Model and a forward call's keyword arguments -> whether this is a prefill with images.
        decoder: Model -> the module that calls the blocks.
        between_blocks: Keyword arguments of the decoder's call -> what it does to the residual stream between
            its blocks; ``None`` if it does nothing.
        tap: For attention that is no transformers interface; ``None`` for one that is.
        packs: Whether several prompts about one image can be packed into one sequence (``scr_runtime.packing``):
            positions are one number per token and all blocks see as far. Set it once
            tests/scr_runtime/test_maps.py has compared the family prompt by prompt.
    """

    name: str
    image_grids: Callable[[Any, Mapping[str, Any]], list[ImageGrid]]
    blocks: Callable[[Any], nn.ModuleList] = lambda model: model.model.language_model.layers
    text_config: Callable[[Any], Any] = lambda model: model.model.language_model.config
    visual_tokens: Callable[[Any, Tensor], Tensor] = _placeholders
    brings_images: Callable[[Any, Mapping[str, Any]], bool] = _brings_images
    decoder: Callable[[Any], nn.Module] = lambda model: model.model.language_model
    between_blocks: Callable[[Mapping[str, Any]], BetweenBlocks | None] | None = None
    tap: Tap | None = None
    packs: bool = False


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(name="llava", image_grids=_llava_grids, packs=True),
        Family(name="llava_next", image_grids=_llava_next_grids),
        Family(name="llava_onevision", image_grids=_llava_onevision_grids),
        Family(name="qwen2_vl", image_grids=_qwen_vl_grids),
        Family(name="qwen2_5_vl", image_grids=_qwen_vl_grids),
        Family(name="qwen3_vl", image_grids=_qwen_vl_grids, between_blocks=_deepstack),
        Family(
            name="chameleon",
            image_grids=_chameleon_grids,
            blocks=lambda model: model.model.layers,
            text_config=lambda model: model.config,
        ),
        Family(name="internvl", image_grids=_internvl_grids),
        Family(
            name="qwen",
            image_grids=_qwen_grids,
            blocks=_qwen_blocks,
            text_config=lambda model: model.config,
            visual_tokens=_qwen_visual_tokens,
            brings_images=_qwen_brings_images,
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
