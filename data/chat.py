"""Turns images and texts into a model's inputs through its chat template, and inputs back into pictures."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image as PILImage
from transformers.feature_extraction_utils import BatchFeature


def chat_inputs(processor: Any, images: Sequence[PILImage], texts: Sequence[str]) -> BatchFeature:
    """One user turn per row, image first, through the model's chat template.

    Args:
        processor: as returned by `load_vlm`.
        images: one RGB image per row.
        texts: one text per row.

    Returns:
        The model's inputs on the CPU, left padded: `input_ids` and `attention_mask` [B, S], `pixel_values`, ...
    """
    if len(images) != len(texts):
        raise ValueError(f"{len(images)} images for {len(texts)} texts: give one image per text")
    conversations = [_conversation(image, text) for image, text in zip(images, texts, strict=True)]
    return processor.apply_chat_template(
        conversations,
        chat_template=chat_template(processor),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )


def chat_template(processor: Any) -> str | None:
    """The template of a processor, or else its tokenizer's: some processors (Chameleon's) drop it when they are made.

    Returns:
        The template; None if there is none. Of several that have names, the one named default.
    """
    for owner in (processor, getattr(processor, "tokenizer", None)):
        template = getattr(owner, "chat_template", None)
        if isinstance(template, dict):
            template = template.get("default")
        if template is not None:
            return template
    return None


def _conversation(image: PILImage, text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]


class TokenCounter:
    """Counts the tokens of a prompt about an image, without preprocessing every image for it.

    How many of them are visual follows from the image's size alone: an image of each size is preprocessed once.

    Args:
        processor: as returned by `load_vlm`.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._visual: dict[tuple[int, int], int] = {}  # image size -> tokens beyond those of the text

    def __call__(self, image: PILImage, text: str) -> int:
        """Visual and text tokens of one row of `chat_inputs`, without padding."""
        words = self._text_tokens(image, text)
        if image.size not in self._visual:
            inputs = chat_inputs(self._processor, [image], [text])
            self._visual[image.size] = inputs["input_ids"].shape[1] - words
        return words + self._visual[image.size]

    def _text_tokens(self, image: PILImage, text: str) -> int:
        written = self._processor.apply_chat_template(
            _conversation(image, text), chat_template=chat_template(self._processor), add_generation_prompt=True
        )
        return len(self._processor.tokenizer(written)["input_ids"])


def shared_chat_inputs(
    processor: Any, images: Sequence[PILImage], texts: Sequence[Sequence[str]]
) -> tuple[BatchFeature, int]:
    """`chat_inputs` of several texts about each image, which is preprocessed once.

    Args:
        processor: as returned by `load_vlm`.
        images: RGB images.
        texts: the texts about each image, equally many for all.

    Returns:
        The inputs, and how many successive rows each image of `pixel_values`, `image_sizes` and `image_grid_thw`
        serves. Where a processor's outputs do not say which pixels are an image's, that is 1, and they come per row.
    """
    [repeats] = {len(about) for about in texts}
    rows = [image for image in images for _ in range(repeats)]
    flat = [text for about in texts for text in about]
    if repeats == 1:
        return chat_inputs(processor, rows, flat), 1
    once = _EachImageOnce(processor.image_processor, images, repeats)
    sharing = copy.copy(processor)
    sharing.image_processor = once
    inputs = chat_inputs(sharing, rows, flat)
    if once.outputs is None:
        return inputs, 1
    inputs.update(once.outputs)
    return inputs, repeats


class _EachImageOnce:
    """Stands in for an image processor: preprocesses each image once, and repeats the result for its prompts."""

    def __init__(self, image_processor: Any, images: Sequence[PILImage], repeats: int) -> None:
        self._inner = image_processor
        self._images = list(images)
        self._repeats = repeats
        self.outputs: dict[str, torch.Tensor] | None = None

    def __call__(self, images: Any, **settings: Any) -> BatchFeature:
        outputs = self._inner(self._images, **settings)
        if not self._shares(outputs):
            return self._inner(images, **settings)
        self.outputs = dict(outputs)
        return BatchFeature({key: value.repeat_interleave(self._repeats, 0) for key, value in self._each(outputs)})

    def _shares(self, outputs: Mapping[str, Any]) -> bool:
        """Whether each image has one entry in every output; Qwen's patches lie in a row, as their table says."""
        if not all(isinstance(value, torch.Tensor) for value in outputs.values()):
            return False
        if outputs.keys() - {"pixel_values"} not in ({"image_sizes"}, {"image_grid_thw"}, set()):
            return False
        one_each = all(len(value) == len(self._images) for _, value in self._each(outputs))
        return one_each and ("image_grid_thw" in outputs or outputs["pixel_values"].ndim >= 4)

    @staticmethod
    def _each(outputs: Mapping[str, Any]) -> list[tuple[str, torch.Tensor]]:
        """The outputs with one entry per image; a processor writes its texts by these."""
        return [(k, v) for k, v in outputs.items() if k != "pixel_values" or "image_grid_thw" not in outputs]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def unprocessed(processor: Any, image: PILImage) -> NDArray[np.uint8]:
    """The part of an image that the model sees, as it sees it: resized and cropped by the processor, [H, W, 3].

    Where the pixels are no picture (patches in a row, tiles), the image as it is: such processors crop nothing.
    """
    settings = processor.image_processor
    pixels = np.asarray(settings(images=image, return_tensors="np")["pixel_values"])
    if pixels.ndim != 4 or pixels.shape[:2] != (1, 3):
        return np.asarray(image.convert("RGB"))
    picture = pixels[0].transpose(1, 2, 0)  # [H, W, 3]
    if getattr(settings, "do_normalize", True):
        picture = picture * np.array(settings.image_std) + np.array(settings.image_mean)
    if getattr(settings, "do_rescale", True):
        picture = picture / settings.rescale_factor
    return picture.round().clip(0, 255).astype(np.uint8)
