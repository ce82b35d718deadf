"""Patch grids: how many rows and columns each image of a call has, per family of models."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scr_runtime.errors import PrefillError
from scr_runtime.redistribute import Grid


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


def placeholders(model: Any, input_ids: Tensor) -> Tensor:
    """[B, S] bool, the positions of the image token."""
    return input_ids == model.config.image_token_id


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


def same_grid(grid: ImageGrid, call: Mapping[str, Any]) -> list[ImageGrid]:
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
        for tokens in placeholders(model, call["input_ids"]).sum(-1).tolist()[::copies]:
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
    table: Any = call.get(key)
    if table is None:
        raise PrefillError(
            f"the patch grid of an image is unknown: {key} is missing. The processor returns it; pass it to "
            "forward or generate, beside mm_encoder_outputs too."
        )
    return torch.as_tensor(table).tolist()


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


def llava_grid(model: Any, call: Mapping[str, Any]) -> ImageGrid:
    """LLaVA-1.5: a square grid of image_size / patch_size; strategy "full" keeps the class token first."""
    side, before = _tower(model, call)
    return ImageGrid((side, side), skip=before)


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


def llava_next_grids(model: Any, call: Mapping[str, Any]) -> list[ImageGrid]:
    """LLaVA-NeXT: a thumbnail, then the tiles joined, unpadded, a newline behind each row."""
    return _anyres_grids(model, call, lambda grid, side: grid)


def llava_onevision_grids(model: Any, call: Mapping[str, Any]) -> list[ImageGrid]:
    """LLaVA-OneVision: LLaVA-NeXT's, and a joined grid of more than 9 tiles is scaled down."""
    most = int((call.get("vision_aspect_ratio") or model.config.vision_aspect_ratio).removeprefix("anyres_max_"))

    def shrink(grid: Grid, side: int) -> Grid:
        ratio = math.sqrt(grid[0] * grid[1] / (most * side**2))
        return (int(grid[0] // ratio), int(grid[1] // ratio)) if ratio > 1.1 else grid

    return _anyres_grids(model, call, shrink)


def qwen_vl_grids(model: Any, call: Mapping[str, Any]) -> list[ImageGrid]:
    """Qwen2-VL and later: image_grid_thw counts vision patches, merge_size x merge_size of which are one token."""
    merge: int = model.config.vision_config.spatial_merge_size
    images: list[list[ImageGrid]] = []
    for frames, rows, columns in _needed(call, "image_grid_thw"):
        if frames != 1:
            raise PrefillError(f"image_grid_thw counts {frames} frames: that is a video, not an image")
        images.append([ImageGrid((rows // merge, columns // merge))])
    return _own_grids(images, model, call)


def chameleon_grid(model: Any, call: Mapping[str, Any]) -> ImageGrid:
    """Chameleon: one VQ token per 16 x 16 pixels (the encoder halves the image between its resolutions)."""
    vision = model.config.vq_config
    side = vision.resolution // 2 ** (len(vision.channel_multiplier) - 1)
    return ImageGrid((side, side))


def internvl_grid(model: Any, call: Mapping[str, Any]) -> ImageGrid:
    """InternVL: each tile has a grid, and so has the thumbnail; how tiles lie is not in the inputs."""
    vision = model.config.vision_config
    ratio = model.config.downsample_ratio
    (height, width), (patch_height, patch_width) = (_pair(vision.image_size), _pair(vision.patch_size))
    return ImageGrid((int(height // patch_height * ratio), int(width // patch_width * ratio)))


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
