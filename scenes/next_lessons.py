"""What the training of scene-next reads: scenes of many sizes, as tiles, with the labels of their patches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import unpad_image

from scenes.categories import CATEGORIES
from scenes.drawing import MIXED, render_scene
from scenes.next_model import PATCH, PINPOINTS, TILE, build_image_processor
from scenes.packing import CAPTION_LENGTH, QUESTION_LENGTH, lesson

NO_PATCH = -1  # the label of a newline
QUESTIONS, POSITIVES = 8, 3  # packed behind one image, and how many of them at most are about what is there
BRANCHES = (QUESTION_LENGTH,) * QUESTIONS + (CAPTION_LENGTH,)
Lessons = Literal["patches", "names", "answers"]


class NextScenes(Dataset[dict[str, Tensor]]):
    """Fresh scenes of the stream "fit"; all of a batch have one size.

    A sample holds the thumbnail and tiles ("pixels" [1 + tiles, 3, 96, 96]), (height, width) of the image ("size"),
    the categories that are present ("present" [40] float32), and for "answers" the token ids and labels of its
    branches ("text", "targets"), else the labels of its visual tokens ("labels" [N]).

    Args:
        seed: Seed of the scenes and of their questions.
        start: Number of the first scene within the stream.
        batches: Number of batches.
        size: Scenes in a batch.
        lessons: What is learned from them.
    """

    def __init__(self, seed: int, start: int, batches: int, size: int, lessons: Lessons) -> None:
        self._seed, self._start, self._batches, self._size, self._lessons = seed, start, batches, size, lessons

    def __len__(self) -> int:
        return self._batches * self._size

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        index = self._start + item
        size = MIXED.sizes[item // self._size % len(MIXED.sizes)]
        scene = render_scene(self._seed, "fit", index, MIXED, size)
        tiles = _image_processor()(images=Image.fromarray(scene.image), return_tensors="pt")
        present = torch.zeros(len(CATEGORIES))
        present[scene.present] = 1.0
        sample = {"pixels": tiles["pixel_values"][0], "size": tiles["image_sizes"][0], "present": present}
        if self._lessons != "answers":
            sample["labels"] = token_labels(scene.labels)
        if self._lessons == "answers":
            rng = np.random.default_rng([self._seed, 1_000, index])
            sample["text"], sample["targets"] = lesson(scene, rng, QUESTIONS, POSITIVES)
        return sample

    def read(self, workers: int) -> Iterator[dict[str, Tensor]]:
        """The batches in order, rendered by `workers` processes beside this one."""
        return iter(
            DataLoader(self, batch_size=self._size, num_workers=workers, prefetch_factor=6 if workers else None)
        )


@lru_cache(maxsize=1)
def _image_processor() -> Any:
    return build_image_processor()


def token_labels(labels: NDArray[np.uint8]) -> Tensor:
    """Labels of the visual tokens of an image, in their order.

    Args:
        labels: [H, W] of a scene: 0, or 1 + category.

    Returns:
        [N]: the patches of the thumbnail, then those of the joined tiles without their padding, row by row, each row
        with a newline (`NO_PATCH`) behind it.
    """
    height, width = labels.shape
    image = Image.fromarray(labels)
    thumbnail = _patch_labels(image.resize((TILE, TILE), Image.Resampling.NEAREST))
    rows, columns = select_best_resolution((height, width), [list(pinpoint) for pinpoint in PINPOINTS])
    scale = min(columns / width, rows / height)
    inner = (min(math.ceil(width * scale), columns), min(math.ceil(height * scale), rows))
    tiles = Image.new("L", (columns, rows))
    corner = ((columns - inner[0]) // 2, (rows - inner[1]) // 2)
    tiles.paste(image.resize(inner, Image.Resampling.NEAREST), corner)
    joined = unpad_image(_patch_labels(tiles)[None], (height, width))[0]  # [rows, columns] of patches
    return torch.cat([thumbnail.flatten(), F.pad(joined, (0, 1), value=NO_PATCH).flatten()])


def _patch_labels(image: Image.Image) -> Tensor:
    """The category (from 1) seen most in each patch, 0 if under a fifth: [rows, columns]."""
    pixels = np.asarray(image)
    rows, columns = pixels.shape[0] // PATCH, pixels.shape[1] // PATCH
    kinds = len(CATEGORIES) + 1
    patch = np.arange(rows * columns).reshape(rows, columns).repeat(PATCH, 0).repeat(PATCH, 1)  # of each pixel
    counts = np.bincount((patch * kinds + pixels).ravel(), minlength=rows * columns * kinds)
    counts = counts.reshape(rows, columns, kinds)[..., 1:]
    return torch.from_numpy(np.where(counts.max(-1) >= PATCH * PATCH // 5, counts.argmax(-1) + 1, 0))
