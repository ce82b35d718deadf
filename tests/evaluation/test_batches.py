"""What a batch shares: the questions of one image have its preprocessing and its features in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

from data.chat import chat_inputs
from evaluation.batches import Row, encode, find_layout, make_batch, with_features
from evaluation.decoding import Decoding, Reader
from evaluation.maps import capture_maps
from evaluation.pictures import Pictures
from scr_runtime import SCRConfig
from tests.data.tiny import QwenProcessor
from tests.families import models
from tests.families.models import PLAIN, WITH_VIDEOS

CONFIG = SCRConfig(num_sources=3, edit_layers=(0, 1), attention_layers=(1, 2))
NAMES = ["llava", "llava-next", "chameleon", "llava-onevision", "qwen2-vl", "qwen2.5-vl", "qwen3-vl", "internvl"]
SIZES = ((64, 48), (48, 80), (32, 32))
QUESTIONS = ("Is there a cup in the image?", "Is there a car in the image?", "Describe the image.")


class Counter:
    """Counts the pictures that an image processor is given."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.pictures = 0

    def __call__(self, images: Any, **settings: Any) -> Any:
        flat = [one for item in images for one in (item if isinstance(item, list | tuple) else [item])]
        self.pictures += len(flat)
        return self.inner(images, **settings)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class WithoutVideos:
    """transformers, with Qwen's processors as they are where torchvision is not."""

    def __getattr__(self, name: str) -> Any:
        if name.endswith("VideoProcessor"):
            return lambda **_: None
        if name.startswith("Qwen") and name.endswith("VLProcessor"):
            return lambda pixels, tokenizer, videos, chat_template: QwenProcessor(pixels, tokenizer, chat_template)
        return getattr(transformers, name + "Pil" if name == "Qwen2VLImageProcessor" else name)


@pytest.mark.parametrize("name", NAMES)
def test_the_questions_of_an_image_share_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs, maps and answers are those of every row by itself; 2 questions about one image, 3 about others."""
    if name.startswith("qwen"):
        monkeypatch.setattr(models, "hf", WithoutVideos())
    elif name in WITH_VIDEOS:
        pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model, processor = {**PLAIN, **WITH_VIDEOS}[name]()
    model.eval()
    generator = torch.Generator().manual_seed(0)
    for n, (width, height) in enumerate(SIZES):
        pixels = torch.randint(0, 255, (height, width, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{n}.png")
    pictures = Pictures(tmp_path)
    asked = [(n, text) for n in range(3) for text in QUESTIONS[n == 1 :]]
    rows = [Row(place, f"{n}.png", text) for place, (n, text) in enumerate(asked)]
    processor.image_processor = counter = Counter(processor.image_processor)
    batch = make_batch(model, processor, pictures, rows)
    processor.image_processor = counter.inner
    if name != "internvl":  # whose processor does not say which tiles are an image's
        assert (counter.pictures, batch.capture[1], batch.image_of) == (3, 3, [0, 0, 0, 1, 1, 2, 2, 2])

    given = chat_inputs(processor, [pictures.open(row.image) for row in rows], [row.text for row in rows])
    with torch.no_grad():
        inputs = with_features(given, encode(model, given))
    shared = batch.prompts.inputs
    assert shared.keys() == inputs.keys()
    for key in shared.keys() - {"mm_encoder_outputs"}:
        assert torch.equal(shared[key], inputs[key]), key
    layout = find_layout(model, inputs, inputs["attention_mask"])
    for mine, other in zip(batch.layout.groups, layout.groups, strict=True):
        assert mine.grid == other.grid and torch.equal(mine.positions, other.positions)
    reader = Reader(model, processor.tokenizer, Decoding("greedy", 4, margins=False))
    _, tokens = reader.read(batch.prompts, None, [""] * len(rows), False)
    with torch.no_grad():
        found = model.generate(**given, generation_config=reader._generation_config(False))
        logits = model(**batch.prompts.inputs, logits_to_keep=1).logits
        assert torch.allclose(logits, model(**given, logits_to_keep=1).logits, atol=1e-4, rtol=0)
    assert tokens == [reader._until_end(row) for row in found[:, given["input_ids"].shape[1] :].tolist()]
    maps = capture_maps(model, CONFIG, batch)
    for row, own in zip(rows, maps, strict=True):
        single = make_batch(model, processor, pictures, [row])
        for mine, other in zip(own, capture_maps(model, CONFIG, single)[0], strict=True):
            assert mine.grid == other.grid and torch.allclose(mine.attention, other.attention, atol=1e-6, rtol=0)
