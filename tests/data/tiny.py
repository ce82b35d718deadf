"""A COCO folder of a few small images, a tiny random LLaVA of the real classes to harvest them with, small shards."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
)

from data.images import CocoImages
from data.index import write_index
from data.sample import Sample, quantise, question_dtype
from data.settings import HarvestSettings
from data.shards import ShardWriter
from scr_runtime import Capture, SCRConfig

SIDE, PATCH, WIDTH = 32, 8, 16
GRID = (SIDE // PATCH, SIDE // PATCH)
TOKENS = GRID[0] * GRID[1]
CONFIG = SCRConfig(num_sources=2, edit_layers=(0, 1), attention_layers=(1, 2))
SETTINGS = HarvestSettings(samples=20, validation=6, test=4, shard_size=5, batch_size=4)
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


def _tokenizer(words: list[str], special: list[str]) -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys((*words, *CATEGORIES)))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>" if "<s>" in words else None,
        eos_token="</s>" if "</s>" in words else None,
        additional_special_tokens=[word for word in special if word not in ("<pad>", "<unk>", "<s>", "</s>")],
        padding_side="left",
    )


def build_llava() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Random weights, the same in every process."""
    special = ["<pad>", "<unk>", "<s>", "</s>", "<image>"]
    words = [*special, "USER", "ASSISTANT", ":", "Is", "there", "a", "an", "in", "the", "image", "?", "Describe", "."]
    tokenizer = _tokenizer(words, special)
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
            **shape, num_hidden_layers=4, num_key_value_heads=2, vocab_size=len(tokenizer), pad_token_id=0
        ),
        image_token_index=tokenizer.get_vocab()["<image>"],
        image_seq_length=TOKENS,
        vision_feature_layer=-1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config).eval()
    return model, processor


def fake_capture(model: Any, config: SCRConfig, inputs: Mapping[str, Any], rows_per_image: int = 1) -> list[Capture]:
    """Captures that follow from each row's own pixels and text, as the real ones do, at no cost."""
    captures = []
    images = inputs["pixel_values"].repeat_interleave(rows_per_image, 0)
    for row, (pixels, ids) in enumerate(zip(images, inputs["input_ids"], strict=True)):
        patches = pixels.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).mean((0, 3, 4)).flatten()  # [N]
        states = patches[:, None] * torch.arange(1, WIDTH + 1)
        text = float((ids.flip(0) * torch.arange(1, len(ids) + 1)).sum()) / 10  # padding is on the left, and 0
        attention = torch.sigmoid(patches * (1 + text / 97))
        captures.append(Capture(row, states, attention, torch.full((WIDTH,), text / 100), GRID, text / 50))
    return captures


def changed(**changes: Any) -> HarvestSettings:
    """`SETTINGS` with other values, checked."""
    return HarvestSettings(**{**SETTINGS.model_dump(), **changes})


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def make_sample(image_id: int, prompts: int = 2, dtype: torch.dtype = torch.float16) -> Sample:
    """6 patches of width 5, on a grid of 2 x 3."""
    generator = torch.Generator().manual_seed(image_id)
    states = torch.randn(6, 5, generator=generator)
    stored, scales = quantise(states) if dtype == torch.int8 else (states.to(dtype), None)
    return Sample(
        image_id=image_id,
        file=f"folder/{image_id}.v2.jpg",
        states=stored,
        scales=scales,
        attention=torch.rand(prompts, 6, generator=generator),
        question=torch.randn(prompts, 5, generator=generator).to(question_dtype(dtype)),
        grids=((2, 3),),
        prompts=[
            {"text": f"A caf\u00e9 {p}?", "label": "no", "category": "c", "strategy": "x"} for p in range(prompts)
        ],
        entropy=[1.0 / 3 + p for p in range(prompts)],
    )


def write_shards(directory: Path, dtype: torch.dtype = torch.float16) -> Path:
    """A finished harvest of two train shards, with images 0, 1, 2 and 10, 11, 12."""
    directory.mkdir()
    names = [f"train-{number:05d}" for number in range(2)]
    for number, name in enumerate(names):
        with ShardWriter(directory, name, "settings") as writer:
            for image_id in range(3):
                writer.write(make_sample(10 * number + image_id, dtype=dtype))
    write_index(directory, {"train": names}, {}, {})
    return directory


def tiled(sample: Sample, *grids: tuple[int, int]) -> Sample:
    """The same patches as an image of several grids."""
    entropy = [float(value) for value in range(len(sample.prompts) * len(grids))]
    return dataclasses.replace(sample, grids=grids, entropy=entropy)


def assert_same(left: Sample, right: Sample) -> None:
    assert (left.scales is None) == (right.scales is None)
    for name in ("states", "attention", "question", *(["scales"] if left.scales is not None else [])):
        one, other = getattr(left, name), getattr(right, name)
        assert one.dtype == other.dtype and torch.equal(one, other)
    for name in ("image_id", "file", "grids", "prompts", "entropy", "key", "place"):
        assert getattr(left, name) == getattr(right, name)


class QwenProcessor(Qwen2VLProcessor):
    """Without the processor for videos, which needs torchvision."""

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str | None = None) -> None:
        for kind in ("image", "video"):
            setattr(self, f"{kind}_token", f"<|{kind}_pad|>")
            setattr(self, f"{kind}_token_id", tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>"))
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def build_qwen() -> tuple[Any, Any]:
    """A tiny random Qwen2-VL, whose grids follow the size of the image: 8 x 8 pixels a token."""
    special = ["<pad>", "<unk>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    words = [*special, "USER", "ASSISTANT", ":", "Is", "there", "a", "an", "in", "the", "image", "?", "Describe", "."]
    tokenizer = _tokenizer(words, special)
    template = _CHAT_TEMPLATE.replace("<image> ", "<|vision_start|><|image_pad|><|vision_end|>")
    pixels = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 8 * 8, "longest_edge": 128 * 128}
    )
    processor = QwenProcessor(image_processor=pixels, tokenizer=tokenizer, chat_template=template)
    ids: dict[str, Any] = {name: tokenizer.get_vocab()[word] for name, word in zip(
        ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"), special[2:], strict=True
    )}  # fmt: skip
    config = Qwen2VLConfig(
        vision_config={
            "depth": 2, "embed_dim": 16, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4,
            "temporal_patch_size": 2, "spatial_merge_size": 2,
        },
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 4,
            "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0,
            "bos_token_id": None, "eos_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        },
        **ids,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2VLForConditionalGeneration(config).eval()
    return model, processor
