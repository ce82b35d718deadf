"""Several prompts about one image as one sequence: the image's tokens pass through the blocks once.

    prefix image | text of prompt 1 | text of prompt 2 | ...

Each text sees the image and itself, at the positions that it has on its own. What comes before a text in the
sequence but not in its prompt is masked, so that every state and every attention weight is the prompt's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scr_runtime.layout import ImageGroup, VisualLayout


@dataclass(frozen=True)
class Packed:
    """Prompts of M images, P of them per image, in M sequences.

    Attributes:
        input_ids: [M, S] int64.
        position_ids: [M, S] int64.
        attention_mask: [M, 1, S, S] additive.
        text_weights: [M * P, S] float32, equal over the text of each prompt, zero elsewhere.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    text_weights: Tensor

    def expand(self, layout: VisualLayout) -> VisualLayout:
        """Makes a layout of M images one of M * P, where each image is asked about by each of its prompts."""
        prompts = len(self.text_weights) // len(self.input_ids)
        weights = self.text_weights[:, -layout.text_rows :]
        groups: list[ImageGroup] = []
        for group in layout.groups:
            images = [image * prompts + prompt for image in group.images for prompt in range(prompts)]
            positions, rows = (value.repeat_interleave(prompts, 0) for value in (group.positions, group.rows))
            groups.append(ImageGroup(group.grid, images, positions, rows, weights[images]))
        return VisualLayout(layout.text_rows, groups)


def pack(inputs: Mapping[str, Any], image_token_id: int, prompts: int, dtype: torch.dtype) -> Packed | None:
    """Packs the rows of a batch whose every ``prompts`` successive rows ask about one image.

    Args:
        inputs: ``input_ids`` and ``attention_mask``, [M * P, S] each, one image per row.
        image_token_id: The placeholder token of a visual token.
        prompts: P.
        dtype: The model's, for the mask.

    Returns:
        ``None`` if a row has no image or no text after it, or differs from the others of its image before its end.
    """
    device = inputs["input_ids"].device
    rows = zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True)
    heads: list[list[int]] = []
    tails: list[list[int]] = []
    for ids, mask in rows:
        kept = [token for token, keep in zip(ids, mask, strict=True) if keep]
        if image_token_id not in kept:
            return None
        end = len(kept) - kept[::-1].index(image_token_id)
        heads.append(kept[:end])
        tails.append(kept[end:])
    if any(head != heads[row - row % prompts] for row, head in enumerate(heads)) or not all(tails):
        return None

    starts = range(0, len(heads), prompts)
    length = max(len(heads[start]) + sum(map(len, tails[start : start + prompts])) for start in starts)
    ids = torch.zeros(len(starts), length, dtype=torch.long)
    positions, segments = torch.zeros_like(ids), torch.full_like(ids, -1)  # segments: 0 image, 1.. texts, -1 padding
    weights = torch.zeros(len(heads), length)
    for row, start in enumerate(starts):
        place = shared = len(heads[start])
        ids[row, :place] = torch.tensor(heads[start])
        positions[row, :place] = torch.arange(place)
        segments[row, :place] = 0
        for prompt, tail in enumerate(tails[start : start + prompts]):
            text = slice(place, place + len(tail))
            ids[row, text] = torch.tensor(tail)
            positions[row, text] = shared + torch.arange(len(tail))
            segments[row, text] = prompt + 1
            weights[start + prompt, text] = 1 / len(tail)
            place = text.stop
    ids, positions, segments, weights = (
        value.to(device, non_blocking=True) for value in (ids, positions, segments, weights)
    )
    seen = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])  # [M, S, S]: image, own text
    hidden = ~seen.tril() & ~torch.eye(length, dtype=torch.bool, device=device)  # padding sees itself, and is unseen
    mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, torch.finfo(dtype).min)
    return Packed(ids, positions, mask[:, None], weights)
