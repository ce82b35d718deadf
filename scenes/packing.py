"""What stage B of the training reads: scenes, and their questions and caption packed behind one visual prefix.

All branches of an image share the prefix "USER: <image>": each sees the prefix and itself (`PackedLayout`). That is
the same computation as one question at a time, on less than a fifth of the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

from data.wording import question_text
from scenes.categories import CATEGORIES
from scenes.drawing import Scene, caption, render_scene
from scenes.model import CAPTION_QUESTIONS, GRID, PATCH, build_tokenizer, vocabulary

QUESTIONS = 10  # yes/no questions packed behind one image
POSITIVES = 4  # of them at most so many about a category that is present
QUESTION_LENGTH = 13  # tokens from "Is" to "</s>", with a name of two words
CAPTION_LENGTH = 40
IGNORED = -100  # the label of a token that is no answer

SceneModel = LlavaForConditionalGeneration | LlavaNextForConditionalGeneration


@dataclass(frozen=True)
class PackedLayout:
    """Where the tokens of a packed row stand: a shared prefix, then branches of fixed lengths.

    Each branch is padded at its end; a pad is behind everything that is read, so it needs no mask.

    Attributes:
        branches: Length of each branch in tokens.
        prefix: Tokens before the first branch; "USER: <image>" x 144 in scene-llava.
    """

    branches: tuple[int, ...]
    prefix: int = 2 + GRID * GRID

    def position_ids(self) -> Tensor:
        """[1, L]: every branch counts on from the prefix."""
        parts = [torch.arange(self.prefix)]
        parts += [torch.arange(self.prefix, self.prefix + length) for length in self.branches]
        return torch.cat(parts)[None]

    def mask(self, dtype: torch.dtype) -> Tensor:
        """[1, 1, L, L], 0 where a query may look: causal, and never into another branch."""
        owner = torch.cat(
            [torch.zeros(self.prefix)] + [torch.full((n,), i + 1.0) for i, n in enumerate(self.branches)]
        )
        same = (owner[:, None] == owner[None]) | (owner[None] == 0)
        allowed = same & torch.ones(len(owner), len(owner), dtype=torch.bool).tril()
        return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)[None, None]


TRAIN_LAYOUT = PackedLayout((QUESTION_LENGTH,) * QUESTIONS + (CAPTION_LENGTH,))


@lru_cache(maxsize=32)
def _layout_tensors(layout: PackedLayout, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return layout.position_ids(), layout.mask(dtype)


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    """The scene model's tokenizer, built once."""
    return build_tokenizer()


def visual_features(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """The tower's patch states [B, 144, d] as the projector sees them, from pixels [B, 3, 96, 96]."""
    tower = model.model.vision_tower
    return tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-1][:, 1:]


def packed_states(model: SceneModel, projected: Tensor, text: Tensor, layout: PackedLayout) -> list[Tensor]:
    """States of all branches of a batch in one pass.

    Args:
        model: A scene model.
        projected: [B, N, d] projected patches, and what else the branches share.
        text: [B, sum of branch lengths] token ids of the branches.
        layout: Where the branches stand.

    Returns:
        After the embedding and after each layer, the last one normed: [B, sum of branch lengths, d].
    """
    return [state[:, layout.prefix :] for state in whole_states(model, projected, text, layout)]


def whole_states(model: SceneModel, projected: Tensor, text: Tensor, layout: PackedLayout) -> list[Tensor]:
    """As `packed_states`, with the prefix: [B, L, d]."""
    row, position_ids, mask = packed_row(model, projected, text, layout)
    return model.model.language_model(
        inputs_embeds=row,
        attention_mask=mask,
        position_ids=position_ids,
        use_cache=False,
        output_hidden_states=True,
    ).hidden_states


def packed_row(
    model: SceneModel, projected: Tensor, text: Tensor, layout: PackedLayout
) -> tuple[Tensor, Tensor, Tensor]:
    """The embeddings [B, L, d], positions [1, L] and mask [1, 1, L, L] of a packed batch; see `packed_states`."""
    embed = model.get_input_embeddings()
    words = vocabulary()
    start = embed(torch.tensor([[words["USER"], words[":"]]])).expand(len(text), -1, -1)
    row = torch.cat([start, projected, embed(text)], dim=1)
    return row, *_layout_tensors(layout, row.dtype)


class FitScenes(Dataset[dict[str, Tensor]]):
    """Fresh scenes of the stream "fit".

    A sample holds the image [96, 96, 3] uint8, the labels of its pixels [96, 96] uint8, the categories that are
    present [40] float32, and with `lessons` the token ids ("text") and labels ("targets") of its branches in
    `TRAIN_LAYOUT`, each [sum of branch lengths] int64.

    Args:
        seed: Seed of the scenes and of their questions.
        start: Number of the first scene within the stream.
        count: Number of scenes.
        lessons: Whether the samples hold questions and captions.
    """

    def __init__(self, seed: int, start: int, count: int, lessons: bool) -> None:
        self._seed, self._start, self._count, self._lessons = seed, start, count, lessons

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        index = self._start + item
        scene = render_scene(self._seed, "fit", index)
        present = torch.zeros(len(CATEGORIES))
        present[scene.present] = 1.0
        sample = {
            "image": torch.from_numpy(scene.image),
            "labels": torch.from_numpy(scene.labels),
            "present": present,
        }
        if self._lessons:
            rng = np.random.default_rng([self._seed, 1_000, index])
            sample["text"], sample["targets"] = lesson(scene, rng)
        return sample

    def batches(self, size: int, workers: int) -> Iterator[dict[str, Tensor]]:
        """The samples in order, `size` at a time, rendered by `workers` processes beside this one."""
        return iter(DataLoader(self, batch_size=size, num_workers=workers, prefetch_factor=4 if workers else None))


def lesson(
    scene: Scene, rng: np.random.Generator, questions: int = QUESTIONS, positives: int = POSITIVES
) -> tuple[Tensor, Tensor]:
    """Token ids and labels of one image's branches, by default in `TRAIN_LAYOUT`, each [sum of branch lengths]."""
    present = scene.present
    absent = [i for i in range(len(CATEGORIES)) if i not in present]
    asked = [(int(i), "yes") for i in rng.permutation(present)[:positives]]
    asked += [(int(i), "no") for i in rng.permutation(absent)[: questions - len(asked)]]
    branches = [_branch(question_text(CATEGORIES[i].name), answer, QUESTION_LENGTH) for i, answer in asked]
    prompt = CAPTION_QUESTIONS[int(rng.random() < 0.25)]
    branches.append(_branch(prompt, caption(scene), CAPTION_LENGTH))
    ids, labels = (torch.tensor(list(chain.from_iterable(part))) for part in zip(*branches, strict=True))
    return ids, labels


@lru_cache(maxsize=4096)
def _branch(question: str, answer: str, length: int) -> tuple[list[int], list[int]]:
    """Token ids and labels of one branch; a label is the token that follows, if it belongs to the answer."""
    asked = tokenizer()(f"{question} ASSISTANT:").input_ids
    answered = tokenizer()(f"{answer}</s>").input_ids
    ids = (asked + answered)[:length]
    labels = ([IGNORED] * (len(asked) - 1) + answered)[:length]
    pad = tokenizer().pad_token_id
    return ids + [pad] * (length - len(ids)), labels + [IGNORED] * (length - len(labels))


def normalised(image: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 96, 96, 3] uint8 -> [B, 3, 96, 96] from -1 to 1, as the processor scales them."""
    return ((image.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5).to(dtype)


def patch_labels(labels: Tensor) -> Tensor:
    """[B, 96, 96] -> [B, 144]: the category (from 1) seen most in a patch, 0 if under a fifth."""
    rows = labels.long().unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).reshape(len(labels), GRID * GRID, -1)
    counts = torch.zeros(*rows.shape[:2], len(CATEGORIES) + 1, dtype=torch.int16)
    counts.scatter_add_(2, rows, torch.ones_like(rows, dtype=torch.int16))
    most, category = counts[..., 1:].max(-1)
    return torch.where(most >= PATCH * PATCH // 5, category + 1, 0)
