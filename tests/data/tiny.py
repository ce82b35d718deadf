"""A COCO folder of a few small images, and a tiny random LLaVA of the real classes to harvest them with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from data.images import CocoImages
from scr_runtime import SCRConfig

SIDE, PATCH, WIDTH = 32, 8, 16
GRID = (SIDE // PATCH, SIDE // PATCH)
TOKENS = GRID[0] * GRID[1]
CONFIG = SCRConfig(num_sources=2, edit_layers=(0, 1), attention_layers=(1, 2))
KITCHEN = ("cup", "fork", "knife", "oven")
STREET = ("car", "bus", "bench", "umbrella")
CATEGORIES = (*KITCHEN, *STREET, "person", "zebra")
_CHAT_TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def write_coco(root: Path, count: int) -> CocoImages:
    """Images of one colour, ids 10, 20, ...; kitchen and street scenes in turn, people on most."""
    (root / "images").mkdir(parents=True)
    annotations = []
    for i in range(count):
        scene = KITCHEN if i % 2 else STREET
        names = [scene[i // 2 % 4], scene[(i // 2 + 1) % 4]] + ["person"] * (i % 3 > 0)
        for name in names:
            category = CATEGORIES.index(name) + 1
            annotations.append({"id": len(annotations), "image_id": 10 * (i + 1), "category_id": category})
        colour = (i * 37 % 256, i * 91 % 256, i * 53 % 256)
        picture = Image.new("RGB", (SIDE, SIDE), colour)
        picture.paste((255 - colour[0], 30, 200), (8 * (i % 3), 4, 8 * (i % 3) + 12, 20))
        picture.save(root / "images" / f"{10 * (i + 1):06d}.png")
    record = {
        "images": [{"id": 10 * (i + 1), "file_name": f"{10 * (i + 1):06d}.png"} for i in range(count)],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in enumerate(CATEGORIES, start=1)],
    }
    (root / "instances.json").write_text(json.dumps(record))
    return open_coco(root)


def open_coco(root: Path) -> CocoImages:
    return CocoImages(root / "images", root / "instances.json")


def truncate_image(images: CocoImages, image_id: int) -> None:
    content = images.path(image_id).read_bytes()
    images.path(image_id).write_bytes(content[: len(content) // 2])


def build_llava() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Random weights, the same in every process."""
    special = ["<pad>", "<unk>", "<s>", "</s>", "<image>"]
    words = [*special, "USER", "ASSISTANT", ":", "Is", "there", "a", "an", "in", "the", "image", "?", "Describe", "."]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys((*words, *CATEGORIES)))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )
    pixels = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor = LlavaProcessor(
        image_processor=pixels,
        tokenizer=tokenizer,
        patch_size=PATCH,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template=_CHAT_TEMPLATE,
    )
    shape: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 32, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**shape, num_hidden_layers=2, image_size=SIDE, patch_size=PATCH),
        text_config=LlamaConfig(
            **shape, num_hidden_layers=4, num_key_value_heads=2, vocab_size=len(vocabulary), pad_token_id=0
        ),
        image_token_index=vocabulary["<image>"],
        image_seq_length=TOKENS,
        vision_feature_layer=-1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config).eval()
    return model, processor


@dataclass
class FakeCapture:
    row: int
    states: Tensor
    attention: Tensor
    question: Tensor
    grid: tuple[int, int]
    entropy: float


def fake_capture(
    model: Any, config: SCRConfig, inputs: Mapping[str, Any], rows_per_image: int = 1
) -> list[FakeCapture]:
    """Captures that follow from each row's own pixels and text, as the real ones do, at no cost."""
    captures = []
    images = inputs["pixel_values"].repeat_interleave(rows_per_image, 0)
    for row, (pixels, ids) in enumerate(zip(images, inputs["input_ids"], strict=True)):
        patches = pixels.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).mean((0, 3, 4)).flatten()  # [N]
        states = patches[:, None] * torch.arange(1, WIDTH + 1)
        text = float((ids.flip(0) * torch.arange(1, len(ids) + 1)).sum()) / 10  # padding is on the left, and 0
        attention = torch.sigmoid(patches * (1 + text / 97))
        captures.append(FakeCapture(row, states, attention, torch.full((WIDTH,), text / 100), GRID, text / 50))
    return captures
