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
        position_ids: [M, S] int64, or [A, M, S] for a model whose positions have A axes.
        attention_mask: [M, 1, S, S] additive.
        text_weights: [M * P, S] float32, equal over the text of each prompt, zero elsewhere.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    text_weights: Tensor

    def expand(self, layout: VisualLayout) -> tuple[VisualLayout, list[int]]:
        """Makes a layout of M images one of M * P, where each image is asked about by each of its prompts.

        Returns:
            The layout, whose grids are in order of appearance over the M * P prompts, and the prompt of each grid.
        """
        prompts = len(self.text_weights) // len(self.input_ids)
        weights = self.text_weights[:, -layout.text_rows :]
        row_of = {
            image: row for group in layout.groups for image, row in zip(group.images, group.rows.tolist(), strict=True)
        }
        asked = sorted((row_of[image] * prompts + prompt, image) for image in row_of for prompt in range(prompts))
        place = {both: number for number, both in enumerate(asked)}
        groups: list[ImageGroup] = []
        for group in layout.groups:
            rows = [row_of[image] * prompts + prompt for image in group.images for prompt in range(prompts)]
            repeated = [image for image in group.images for _ in range(prompts)]
            expanded = replace(
                group,
                images=[place[both] for both in zip(rows, repeated, strict=True)],
                positions=group.positions.repeat_interleave(prompts, 0),
                rows=group.rows.repeat_interleave(prompts, 0),
                text_weights=weights[rows],
            )
            groups.append(expanded)
        return replace(layout, groups=groups), [row for row, _ in asked]


def pack(
    input_ids: Tensor,
    attention_mask: Tensor,
    visual: Tensor,
    prompts: int,
    dtype: torch.dtype,
    known: Tensor | None = None,
) -> Packed | None:
    """Packs the rows of a batch whose every ``prompts`` successive rows ask about one image.

    Args:
        input_ids: [M * P, S] int64, one image per row.
        attention_mask: [M * P, S] of kept positions.
        visual: [M * P, S] bool, the visual tokens.
        prompts: P.
        dtype: The model's, for the mask.
        known: [A, M * P, S] int64 positions of each row's tokens, for a model that has axes of its own; ``None`` where
            kept tokens are counted.

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

    counted = (attention_mask.long().cumsum(-1) - 1)[None] if known is None else known  # [A, M * P, S]
    kept = [row[:, mask] for row, mask in zip(counted.cpu().unbind(1), attention_mask.bool().cpu(), strict=True)]
    starts = range(0, len(heads), prompts)
    length = max(len(heads[start]) + sum(map(len, tails[start : start + prompts])) for start in starts)
    ids = torch.zeros(len(starts), length, dtype=torch.long)
    positions = ids.new_zeros(len(counted), *ids.shape)
    segments = torch.full_like(ids, -1)  # 0 image, 1.. texts, -1 padding
    weights = torch.zeros(len(heads), length, dtype=torch.float32)
    for row, start in enumerate(starts):
        place = len(heads[start])
        ids[row, :place] = torch.tensor(heads[start])
        positions[:, row, :place] = kept[start][:, :place]
        segments[row, :place] = 0
        for prompt, tail in enumerate(tails[start : start + prompts]):
            text = slice(place, place + len(tail))
            ids[row, text] = torch.tensor(tail)
            positions[:, row, text] = kept[start + prompt][:, -len(tail) :]
            segments[row, text] = prompt + 1
            weights[start + prompt, text] = 1 / len(tail)
            place = text.stop
    ids, positions, segments, weights = (
        value.to(device, non_blocking=True) for value in (ids, positions, segments, weights)
    )
    seen = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])  # [M, S, S]: image, own text
    hidden = ~seen.tril() & ~torch.eye(length, dtype=torch.bool, device=device)  # padding sees itself, and is unseen
    mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, torch.finfo(dtype).min)
    return Packed(ids, positions[0] if known is None else positions, mask[:, None], weights)
