"""Several prompts about one image as one sequence: the image's tokens pass through the blocks once.

    prefix image | text of prompt 1 | text of prompt 2 | ...

Each text sees the image and itself, at the positions that it has on its own. What comes before a text in the
sequence but not in its prompt is masked, so that every state and every attention weight is the prompt's own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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
            groups.append(replace(group, images=images, positions=positions, rows=rows, text_weights=weights[images]))
        return replace(layout, groups=groups)


def pack(input_ids: Tensor, attention_mask: Tensor, visual: Tensor, prompts: int, dtype: torch.dtype) -> Packed | None:
    """Packs the rows of a batch whose every ``prompts`` successive rows ask about one image.

    Args:
        input_ids: [M * P, S] int64, one image per row.
        attention_mask: [M * P, S] of kept positions.
        visual: [M * P, S] bool, the visual tokens.
        prompts: P.
        dtype: The model's, for the mask.

    Returns:
        ``None`` if a row has no image or no text after it, or differs from the others of its image before its end.
    """
    device = input_ids.device
    heads: list[list[int]] = []
    tails: list[list[int]] = []
    for row, mask, image in zip(input_ids.tolist(), attention_mask.bool().tolist(), visual.tolist(), strict=True):
        if not any(image):
            return None
        end = len(image) - image[::-1].index(True)
        heads.append([token for token, keep in zip(row[:end], mask, strict=False) if keep])
        tails.append([token for token, keep in zip(row[end:], mask[end:], strict=True) if keep])
    if any(head != heads[row - row % prompts] for row, head in enumerate(heads)) or not all(tails):
        return None

    starts = range(0, len(heads), prompts)
    length = max(len(heads[start]) + sum(map(len, tails[start : start + prompts])) for start in starts)
    ids = torch.zeros(len(starts), length, dtype=torch.long)
    positions, segments = torch.zeros_like(ids), torch.full_like(ids, -1)  # segments: 0 image, 1.. texts, -1 padding
    weights = torch.zeros(len(heads), length, dtype=torch.float32)
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
