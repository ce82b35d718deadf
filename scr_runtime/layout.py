"""From tokens to patches: where each image's visual tokens lie in a prompt, and which text asks about them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scr_runtime.errors import PrefillError
from scr_runtime.families import ImageGrid
from scr_runtime.redistribute import Grid


@dataclass(frozen=True)
class ImageGroup:
    """The images of one prefill that share a grid, so that they are handled as one batch.

    Attributes:
        grid: Rows and columns of patches.
        images: The images' places in order of appearance over (row of the batch, position).
        positions: [I, N] int64, each patch's token in ``hidden.view(-1, d)``.
        rows: [I] int64, the batch row of each image.
        text_weights: [I, T] float32, weights of the last T query positions: equal over the text after the
            image's last visual token (decision D8), zero elsewhere. NaN if there is no such text.
    """

    grid: Grid
    images: list[int]
    positions: Tensor
    rows: Tensor
    text_weights: Tensor


@dataclass(frozen=True)
class VisualLayout:
    """All images of one prefill.

    Attributes:
        text_rows: T, how many of the last query positions can hold text after an image.
        groups: The images by grid.
    """

    text_rows: int
    groups: list[ImageGroup]

    @property
    def num_images(self) -> int:
        """Images in the prefill."""
        return sum(len(group.images) for group in self.groups)


def visual_layout(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    image_token_id: int,
    images: Sequence[ImageGrid],
    prompt_length: int | None = None,
) -> VisualLayout:
    """Finds every image's tokens without waiting for the device.

    Visual tokens are placeholder tokens; images take them in order of appearance. That their number fits the
    grids is checked by the model itself.

    Args:
        input_ids: [B, S] int64.
        attention_mask: [B, S] of kept positions, [B, 1, S, >= S] bool or additive, or ``None``.
        image_token_id: The placeholder token.
        images: One grid per image.
        prompt_length: Positions from here on are draft tokens of assisted decoding, or were generated: not part
            of the question. ``None`` for all.

    Raises:
        PrefillError: If the grids need more tokens than the prompt has.
    """
    batch, length = input_ids.shape
    total = sum(image.tokens for image in images)
    text_rows = length - min(image.tokens for image in images)
    if total > batch * length or text_rows < 1:
        raise PrefillError(
            f"{len(images)} images need {total} visual tokens and a question after them, but the prompt has "
            f"{batch} x {length} tokens. Is an image placeholder missing from the prompt?"
        )
    device = input_ids.device
    other = input_ids != image_token_id  # [B, S]
    order = other.view(torch.uint8).view(-1).sort(stable=True).indices[:total]  # flat positions of visual tokens
    tail = slice(length - text_rows, length)
    place = _positions(length, device)[tail]  # [T]
    kept = _kept_positions(attention_mask, length)
    text = other[:, tail] if kept is None else torch.logical_and(other[:, tail], kept[:, tail])  # [B, T]
    if prompt_length is not None and prompt_length < length:
        text = text & (place < prompt_length)

    by_grid: dict[ImageGrid, list[int]] = {}
    for index, image in enumerate(images):
        by_grid.setdefault(image, []).append(index)
    pieces = order.split([image.tokens for image in images])
    groups: list[ImageGroup] = []
    for image, indices in by_grid.items():
        if len(by_grid) == 1:
            tokens = order.view(len(indices), -1)
        else:
            tokens = torch.stack([pieces[index] for index in indices])
        positions = tokens[:, image.skip :]  # [I, N]
        if batch == 1:  # the common case, three kernels less
            rows, own_text, last = _first_row(len(indices), device), text, positions[:, -1]
        else:
            rows = positions[:, 0] // length
            own_text, last = text[rows], positions[:, -1] % length
        after = own_text & (place > last[:, None])  # [I, T]
        weights = after / after.sum(-1, keepdim=True, dtype=torch.float32)
        groups.append(ImageGroup(image.grid, indices, positions, rows, weights))
    return VisualLayout(text_rows, groups)


def _kept_positions(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """[B, S] of positions that are not padding, true or not 0, from any mask that a forward call may bring."""
    if attention_mask is None:
        return None
    if attention_mask.ndim == 2:
        return attention_mask[:, :length]
    last = attention_mask[:, 0, length - 1, :length]  # the last query sees every position but padding
    return last if last.dtype == torch.bool else last >= 0


# Kept per device, so that a prefill does not make them again; no inference tensors, which others could not use.


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _arange(size: int, device: torch.device) -> Tensor:
    return torch.arange(size, device=device)


def _positions(length: int, device: torch.device) -> Tensor:
    """[S] int64, 0 to S - 1; one tensor serves all lengths up to the next power of two."""
    return _arange(1 << (length - 1).bit_length(), device)[:length]


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _first_row(images: int, device: torch.device) -> Tensor:
    return torch.zeros(images, dtype=torch.int64, device=device)
