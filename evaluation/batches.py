"""Blocks and batches of prompts: what the questions of one image share is computed once, for all methods.

A block is a group of images whose two-pass maps are known together: controls that take another image's sources, or
the mean map, take them from the other images of the block. Blocks depend on the questions alone, so they are shared
out to ranks, and an interrupted evaluation repeats the very same forward passes.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from data.chat import chat_inputs, shared_chat_inputs
from evaluation.pictures import Pictures
from evaluation.questions import Item
from scr_runtime.attention import takes_mask_tensor
from scr_runtime.families import family_of
from scr_runtime.layout import VisualLayout, visual_layout
from scr_runtime.packing import Packed, pack

BLOCK_IMAGES = 32
"""Images of a block, at most."""


@dataclass(frozen=True)
class Row:
    """One prompt.

    Attributes:
        item: Its place among the items.
        image: File name of its image.
        text: As it is sent.
    """

    item: int
    image: str
    text: str


def make_blocks(items: Sequence[Item], template: str = "{question}", images: int = BLOCK_IMAGES) -> list[list[Row]]:
    """Rows by block, the blocks nearly equal: none is left with a single image where another has many.

    Args:
        items: Those of an image one after the other.
        template: Of the prompt, with {question} in it.
        images: Images of a block, at most.
    """
    rows = [Row(n, item.image, template.replace("{question}", item.text)) for n, item in enumerate(items)]
    by_image: dict[str, list[Row]] = {}
    for row in rows:
        by_image.setdefault(row.image, []).append(row)
    names = list(by_image)
    count = -(-len(names) // images)
    ends = [len(names) * block // max(count, 1) for block in range(count + 1)]
    return [[row for name in names[start:end] for row in by_image[name]] for start, end in pairwise(ends)]


def make_batches(rows: Sequence[Row], size: int) -> list[list[Row]]:
    """Rows by forward pass: images stay together where they fit, and images of equally many rows meet."""
    by_image: dict[str, list[Row]] = {}
    for row in rows:
        by_image.setdefault(row.image, []).append(row)
    groups = sorted(by_image.values(), key=len, reverse=True)  # stable: images of equal counts keep their order
    batches: list[list[Row]] = []
    for group in groups:
        for start in range(0, len(group), size):
            part = group[start : start + size]
            if start or not batches or len(batches[-1]) + len(part) > size:
                batches.append([])
            batches[-1] += part
    return batches


@dataclass(frozen=True)
class Prompts:
    """The rows of a forward pass as the model takes them.

    Attributes:
        inputs: Keyword arguments of its forward, and of `generate`.
        layout: Where the images' patches are.
    """

    inputs: dict[str, Any]
    layout: VisualLayout

    @property
    def length(self) -> int:
        """Tokens of a row, padding counted."""
        return self.inputs["input_ids"].shape[1]


@dataclass(frozen=True)
class Shared:
    """The rows of a batch as one sequence per image.

    Attributes:
        prompts: The sequences.
        columns: [C] int64: where the rows' last tokens are, each column once.
        places: [B, 2] int64: per row of the batch, its sequence and its place among `columns`.
        sequence_of: Per row of the batch, its sequence.
    """

    prompts: Prompts
    columns: Tensor
    places: Tensor
    sequence_of: list[int]


@dataclass(frozen=True)
class Batch:
    """One batch, ready for every method.

    Attributes:
        rows: The prompts.
        layout: Where the images' patches are, row by row.
        shared: The same with an image's tokens once for all of its rows; `None` where the family cannot.
        capture: What `scr_runtime.capture` takes: inputs, rows per image, and which of its rows are the batch's.
        own: Inputs of the rows in place of those of `capture`.
        encoded: Features of the images, each once.
        image_of: Per row, the picture that it is about; `None` where each row has its own.
    """

    rows: list[Row]
    layout: VisualLayout
    shared: Shared | None
    capture: tuple[dict[str, Any], int, list[int]]
    own: dict[str, Any]
    encoded: Any
    image_of: list[int] | None

    @property
    def prompts(self) -> Prompts:
        """Row by row. Made at each call: a row's copy of its image's features is not kept."""
        return Prompts(with_features({**self.capture[0], **self.own}, self.encoded, self.image_of), self.layout)

    @property
    def images(self) -> list[list[int]]:
        """Per row, the places of its images (tiles, thumbnails) in order of appearance over the batch."""
        return images_of(self.layout, len(self.rows))


def images_of(layout: VisualLayout, rows: int) -> list[list[int]]:
    """Per row, the places of its images in order of appearance over all rows."""
    found: list[list[int]] = [[] for _ in range(rows)]
    for group in layout.groups:
        for image, row in zip(group.images, group.rows.tolist(), strict=True):
            found[row].append(image)
    return [sorted(images) for images in found]


@torch.no_grad()
def make_batch(model: Any, processor: Any, pictures: Pictures, rows: list[Row]) -> Batch:
    """Decodes and encodes each image once, and finds its patches.

    Args:
        model: A supported model in eval mode.
        processor: Its processor.
        pictures: Where the images are.
        rows: Those of an image one after the other.
    """
    names = list(dict.fromkeys(row.image for row in rows))
    images = [pictures.open(name) for name in names]
    by_image = [[row for row in rows if row.image == name] for name in names]
    most = max(map(len, by_image))
    texts = [[row.text for row in own] + [own[-1].text] * (most - len(own)) for own in by_image]
    kept = [image * most + n for image, own in enumerate(by_image) for n in range(len(own))]
    inputs, repeats = shared_chat_inputs(processor, images, texts) if most > 1 else (None, 1)
    if inputs is None or (repeats == 1 and len(kept) < most * len(names)):  # row by row, without those that fill up
        inputs = chat_inputs(processor, [images[names.index(row.image)] for row in rows], [row.text for row in rows])
    if repeats == 1:
        kept = list(range(len(rows)))
    inputs = dict(inputs.to(model.device, dtype=model.dtype))
    firsts = {key: value if key in _PER_IMAGE else value[::repeats] for key, value in inputs.items()}
    encoded = encode(model, firsts)
    image_of = [row // repeats for row in kept]
    own, pictured = ({}, None) if repeats == 1 else (_own(inputs, kept, image_of), image_of)
    call = with_features({**inputs, **own}, encoded, pictured)
    layout = find_layout(model, call, call.get("attention_mask"))
    shared = _share(model, inputs, encoded, repeats, kept)
    return Batch(rows, layout, shared, (inputs, repeats, kept), own, encoded, pictured)


_TABLES = ("image_sizes", "image_grid_thw")
_PER_IMAGE = (*_TABLES, "pixel_values")  # all else that a processor gives comes per row


def _own(inputs: Mapping[str, Any], kept: Sequence[int], image_of: Sequence[int]) -> dict[str, Any]:
    """What the rows of a batch have for themselves: their tokens, and their image's entry in the tables of sizes."""
    tokens = {key: value[list(kept)] for key, value in inputs.items() if key not in _PER_IMAGE}
    return tokens | {key: inputs[key][list(image_of)] for key in _TABLES if key in inputs}


def encode(model: Any, inputs: Mapping[str, Any]) -> Any:
    """The images' features, so that no method makes them again; `None` where the model takes none."""
    forward: Any = getattr(getattr(model, "base_model", model), "get_image_features", None)
    if forward is None or "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        return None
    names = set(inspect.signature(forward).parameters)
    return forward(**{key: value for key, value in inputs.items() if key in names}, return_dict=True)


def with_features(inputs: Mapping[str, Any], encoded: Any, image_of: Sequence[int] | None = None) -> dict[str, Any]:
    """The inputs with the images' features in place of their pixels.

    Args:
        inputs: Keyword arguments of the model's forward.
        encoded: As `encode` returns it; `None` leaves the pixels.
        image_of: Per row, the picture that it is about; `None` where each row has its own.
    """
    if encoded is None:
        return dict(inputs)
    features, deep = encoded.pooler_output, getattr(encoded, "deepstack_features", None)
    if image_of is not None:
        deep = deep and [[layer[n] for n in image_of] for layer in deep]  # Qwen3-VL: by layer and image
        features = features[list(image_of)] if isinstance(features, Tensor) else [features[n] for n in image_of]
    found = {"pooler_output": features, "deepstack_features": deep}
    held = type(encoded)(**{name: value for name, value in found.items() if value is not None})
    rest = {key: value for key, value in inputs.items() if key != "pixel_values"}
    return {**rest, "mm_encoder_outputs": {"image": held}}


def fresh(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs with a copy of what holds the features: `generate` writes into what it is given."""
    held = (inputs.get("mm_encoder_outputs") or {}).get("image")
    if held is None:
        return dict(inputs)
    copy = type(held)(**{key: value for key, value in held.items()})
    return {**inputs, "mm_encoder_outputs": {"image": copy}}


def find_layout(model: Any, inputs: Mapping[str, Any], mask: Tensor | None) -> VisualLayout:
    """Where the images' patches are in a batch.

    Args:
        model: The model.
        inputs: Keyword arguments of its forward.
        mask: [B, S] of kept positions, or `None`.
    """
    family = family_of(model)
    visual = family.visual_tokens(model, inputs["input_ids"])
    return visual_layout(visual, mask, family.image_grids(model, inputs))


def _share(model: Any, inputs: Mapping[str, Any], encoded: Any, repeats: int, kept: Sequence[int]) -> Shared | None:
    """Packs the rows of each image behind its tokens, if the family's positions and attention allow it."""
    if repeats == 1 or encoded is None or not can_share(model, inputs):
        return None
    visual = family_of(model).visual_tokens(model, inputs["input_ids"])
    packed = pack(inputs["input_ids"], inputs["attention_mask"], visual, repeats, model.dtype)
    if packed is None:
        return None
    call = with_features({"input_ids": packed.input_ids}, encoded)
    layout = find_layout(model, call, None)
    call |= {"position_ids": packed.position_ids, "attention_mask": packed.attention_mask}
    columns, place = _last_tokens(packed)[list(kept)].unique(return_inverse=True)
    sequence_of = [row // repeats for row in kept]
    places = torch.stack([torch.tensor(sequence_of, device=place.device), place], dim=1)
    return Shared(Prompts(call, layout), columns, places, sequence_of)


def can_share(model: Any, inputs: Mapping[str, Any]) -> bool:
    """Whether prompts about one image can be one sequence, as `scr_runtime.packing` makes it."""
    family = family_of(model)
    config = family.text_config(model)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    plain = set(inputs) == {"input_ids", "attention_mask", "pixel_values"}
    return family.packs and kinds == {"full_attention"} and takes_mask_tensor(config) and plain


def _last_tokens(packed: Packed) -> Tensor:
    """[M * P] int64, the column of each prompt's last token."""
    length = packed.text_weights.shape[1]
    places = torch.arange(length, device=packed.text_weights.device)
    return ((packed.text_weights > 0) * places).amax(1)
