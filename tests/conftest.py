"""Shared fixtures: random tiny models of the real classes, and inputs for them."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

IMAGE_TOKEN = 99
PAD_TOKEN = 0

collect_ignore = [] if importlib.util.find_spec("vllm") else ["vllm"]  # `make test-vllm` has an environment of its own


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: two processes then end at about the same time."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(autouse=True)
def _one_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages are wrapped in the same places, whatever the terminal."""
    monkeypatch.setenv("COLUMNS", "110")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Equal results on any machine, and no fight for cores between tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_tiny_llava(
    seed: int = 0,
    *,
    side: int = 6,
    layers: int = 6,
    hidden: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    attn: str = "sdpa",
    strategy: Literal["default", "full"] = "default",
    dtype: torch.dtype = torch.float32,
) -> LlavaForConditionalGeneration:
    """A random LLaVA of the real class with a grid of side x side patches and weights large enough to differ."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"image_token_id": IMAGE_TOKEN, "attn_implementation": attn}  # not in the type stubs
    config = LlavaConfig(
        **settings,
        vision_config=CLIPVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            image_size=4 * side, patch_size=4,
        ),
        text_config=LlamaConfig(
            vocab_size=100, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=512,
            initializer_range=0.2, bos_token_id=1, eos_token_id=2, pad_token_id=PAD_TOKEN,
        ),
        image_seq_length=side * side,
        vision_feature_layer=-2,
        vision_feature_select_strategy=strategy,
    )  # fmt: skip
    model: Any = LlavaForConditionalGeneration(config)
    model = model.eval().to(dtype)
    model.generation_config.eos_token_id = None  # tests want a fixed number of tokens
    model.generation_config.pad_token_id = PAD_TOKEN
    return model


def make_inputs(
    model: Any, images_per_row: list[int], *, seed: int = 0, text: int = 5, pad: str = "left"
) -> dict[str, torch.Tensor]:
    """Prompts of differing length: [bos, (image, text) x images, text], padded on one side."""
    generator = torch.Generator().manual_seed(seed)
    vision = model.config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2
    tokens += model.config.vision_feature_select_strategy == "full"

    def words(count: int) -> list[int]:
        return torch.randint(3, 90, (count,), generator=generator).tolist()

    rows: list[list[int]] = []
    for row, images in enumerate(images_per_row):
        ids = [1, *words(2)]
        for _ in range(images):
            ids += [IMAGE_TOKEN] * tokens + words(1 + row)
        rows.append(ids + words(text + 2 * row))
    length = max(map(len, rows))
    input_ids, mask = [], []
    for ids in rows:
        padding = length - len(ids)
        fill, kept = [PAD_TOKEN] * padding, [1] * len(ids)
        input_ids.append(fill + ids if pad == "left" else ids + fill)
        mask.append([0] * padding + kept if pad == "left" else kept + [0] * padding)
    size = vision.image_size
    pixels = torch.randn(sum(images_per_row), 3, size, size, generator=generator)
    inputs = {"input_ids": torch.tensor(input_ids), "attention_mask": torch.tensor(mask)}
    if len(pixels):
        inputs["pixel_values"] = pixels.to(model.dtype)
    return inputs


@pytest.fixture
def tiny_llava() -> Callable[..., LlavaForConditionalGeneration]:
    return make_tiny_llava


@pytest.fixture
def llava_inputs() -> Callable[..., dict[str, torch.Tensor]]:
    return make_inputs
