"""A synthetic set whose maps follow from states, question and position, in the data module's batch form."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

GRID = (8, 8)
SIZE = 24
PROMPTS = 2


class _SyntheticRows(Dataset[dict[str, Any]]):
    def __init__(self, images: int, seed: int, dtype: torch.dtype, first_key: int) -> None:
        law = torch.Generator().manual_seed(1234)  # the same law for every split
        by_state = torch.randn(SIZE, generator=law) / SIZE**0.5
        by_question = torch.randn(SIZE, SIZE, generator=law) / SIZE
        by_place = torch.randn(GRID[0] * GRID[1], generator=law)
        offset = 3 * torch.randn(SIZE, generator=law)
        scale = torch.rand(SIZE, generator=law) * 3 + 0.1

        own = torch.Generator().manual_seed(seed)
        latent = torch.randn(images, len(by_place), SIZE, generator=own)
        question = torch.randn(images, PROMPTS, SIZE, generator=own)
        noise = torch.randn(images, PROMPTS, len(by_place), generator=own)
        logits = 2 * (latent @ by_state)[:, None] + (question @ by_question) @ latent.transpose(1, 2)
        logits = logits + 0.3 * by_place + 0.1 * noise  # [images, P, N]
        self.attention = logits.exp() * 1e-3
        self.states = (latent * scale + offset).to(dtype)
        self.question = question.to(dtype)
        self.first_key = first_key

    def __len__(self) -> int:
        return len(self.states) * PROMPTS

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, prompt = divmod(index, PROMPTS)
        return {
            "states": self.states[image],
            "attention": self.attention[image, prompt],
            "question": self.question[image, prompt],
            "grid": GRID,
            "key": f"{self.first_key + image:012d}",
        }


def _collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    stacked = {name: torch.stack([row[name] for row in rows]) for name in ("states", "attention", "question")}
    return stacked | {"grid": rows[0]["grid"], "key": [row["key"] for row in rows]}


@pytest.fixture(scope="session")
def make_loader() -> Callable[..., DataLoader[dict[str, Any]]]:
    def make(
        images: int = 40,
        seed: int = 0,
        shuffle: bool = False,
        dtype: torch.dtype = torch.float16,
        batch_size: int = 64,
    ) -> DataLoader[dict[str, Any]]:
        return DataLoader(
            _SyntheticRows(images, seed, dtype, first_key=1000 * seed),
            batch_size=batch_size,
            shuffle=shuffle,
            collate_fn=_collate,
            generator=torch.Generator().manual_seed(seed),
        )

    return make
