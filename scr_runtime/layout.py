"""From tokens to patches: where each image's visual tokens lie in a prompt, and which text asks about them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scr_runtime.errors import PrefillError
from scr_runtime.grids import ImageGrid
from scr_runtime.redistribute import Grid


@dataclass(frozen=True)
class ImageGroup:
    """The images of one prefill that share a grid, so that they are handled as one batch.

    Attributes:
        grid: Rows and columns of patches.
        tokens: Visual tokens that each image takes, at least N.
        images: The images' places in order of appearance over (row of the batch, position).
        positions: [I, N] int64, each patch's token in ``hidden.view(-1, d)``.
        rows: [I] int64, the batch row of each image.
        text_weights: [I, T] float32, weights of the last T query positions: equal over the text after the
            image's last visual token (decision D8), zero elsewhere. NaN if there is no such text.
    """

    grid: Grid
    tokens: int
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
        copy_of: Per image, the first image that it is a copy of, as beams make them; ``None`` without copies.
        edge: [2] uint8, still on the device: whether the last token that images take is visual, whether one is left
            over; [1] where images take the whole batch. 2 where an image does not lie within one row.
    """

    text_rows: int
    groups: list[ImageGroup]
    edge: Tensor
    copy_of: list[int] | None = None

    @staticmethod
    def fits(edge: list[int]) -> bool:
        """Whether the images take every visual token, each within one row: ``edge`` as read from the device."""
        return edge in ([1, 0], [1])

    @property
    def num_images(self) -> int:
        """Images in the prefill."""
        return sum(len(group.images) for group in self.groups)

    def firsts(self, group: ImageGroup) -> list[int]:
        """The places in a group of the images that are no copies of others in it."""
        copy_of = self.copy_of
        return [place for place, image in enumerate(group.images) if copy_of is None or copy_of[image] == image]

    def with_copies(self, copies: int) -> VisualLayout:
        """This layout, where the batch holds each prompt ``copies`` times, one after the other. Reads the device."""
        if copies < 2:
            return self
        rows: dict[int, int] = {}
        for group in self.groups:
            rows |= zip(group.images, group.rows.tolist(), strict=True)
        by_row: dict[int, list[int]] = {}
        for image in sorted(rows):
            by_row.setdefault(rows[image], []).append(image)
        first = {image: by_row[row - row % copies][place]
                 for row, images in by_row.items() for place, image in enumerate(images)}  # fmt: skip
        return replace(self, copy_of=[first[image] for image in sorted(first)])


def visual_layout(
    visual: Tensor,
    attention_mask: Tensor | Mapping[str, Tensor | None] | None,
    images: Sequence[ImageGrid],
    prompt_length: int | None = None,
    past: int = 0,
) -> VisualLayout:
    """Finds every image's tokens without waiting for the device.

    Images take visual tokens in order of appearance.

    Args:
        visual: [B, S] bool, the visual tokens.
        attention_mask: [B, >= S] of kept positions, [B, 1, S, >= S] bool or additive, one of these per kind of
            layer, or ``None``.
        images: One grid per image.
        prompt_length: Positions from here on are draft tokens of assisted decoding, or were generated: not part
            of the question. ``None`` for all.
        past: Positions of a filled cache that come before these; the mask has columns for them.

    Raises:
        PrefillError: If the grids need more tokens than the prompt has.
    """
    batch, length = visual.shape
    total = sum(image.tokens for image in images)
    text_rows = length - min(image.tokens for image in images)
    if total > batch * length or text_rows < 1:
        raise PrefillError(
            f"{len(images)} images need {total} visual tokens and a question after them, but the prompt has "
            f"{batch} x {length} tokens. Is an image placeholder missing from the prompt?"
        )
    device = visual.device
    ranked = visual.view(torch.uint8).view(-1).sort(descending=True, stable=True)
    order = ranked.indices[:total]  # flat positions of visual tokens
    edge = ranked.values[total - 1 : total + 1]  # the last token taken, and the next: a count without a kernel
    tail = slice(length - text_rows, length)
    place = _positions(length, device)[tail]  # [T]
    kept = _kept_positions(attention_mask, length, past)
    text = ~visual[:, tail] if kept is None else kept[:, tail] > visual[:, tail]  # [B, T]
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
            tokens = torch.stack([pieces[index] for index in indices])  # [I, tokens]
        positions = image.patches(tokens)  # [I, N]
        if batch == 1:  # the common case, three kernels less
            rows, own_text, last = _first_row(len(indices), device), text, tokens[:, -1]
        else:
            rows = tokens[:, 0] // length
            own_text, last = text[rows], tokens[:, -1] % length
            edge = torch.where((tokens[:, -1] // length == rows).all(), edge, 2)
        if batch == len(images) == 1 and text_rows <= image.tokens:
            after = own_text  # the last T positions reach back into the image at most, not before it
        else:
            after = own_text & (place > last[:, None])  # [I, T]
        weights = after / after.sum(-1, keepdim=True, dtype=torch.float32)
        groups.append(ImageGroup(image.grid, image.tokens, indices, positions, rows, weights))
    return VisualLayout(text_rows, groups, edge)


def count_mismatch(layout: VisualLayout) -> PrefillError:
    """The error for a layout that does not fit."""
    total = sum(group.tokens * len(group.images) for group in layout.groups)
    return PrefillError(
        f"the visual tokens of the prompt and the grids of its images do not match: {layout.num_images} images or "
        f"tiles need {total} tokens, each image's within one prompt. Is a placeholder missing, or was an image "
        "resized after the prompt was made?"
    )


def _kept_positions(
    attention_mask: Tensor | Mapping[str, Tensor | None] | None, length: int, past: int
) -> Tensor | None:
    """[B, S] of positions that are not padding, true or 1, from any mask that a forward call may bring."""
    if isinstance(attention_mask, Mapping):
        masks = [attention_mask.get("full_attention"), *attention_mask.values()]
        attention_mask = next((mask for mask in masks if mask is not None), None)
    if attention_mask is None:
        return None
    if attention_mask.ndim == 2:  # a filled cache's positions come first
        return attention_mask[:, -length:]
    # Whether each position sees itself: padding is seen by nobody. Its column stands behind those of the cache; a
    # sliding cache has dropped some of them, a static cache has columns for later tokens too.
    behind = min(past, attention_mask.shape[-1] - length)
    own = attention_mask[:, 0].diagonal(behind, -2, -1)[:, :length]
    return own if own.dtype == torch.bool else own >= 0


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
