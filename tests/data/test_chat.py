from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from data.chat import TokenCounter, chat_inputs, chat_template, shared_chat_inputs, unprocessed
from tests.data import tiny
from tests.families.models import PLAIN


def test_rows_are_padded_on_the_left_and_hold_one_image_each(llava: tuple[Any, Any]):
    _, processor = llava
    pictures = [Image.new("RGB", (50, 40), colour) for colour in ("red", "blue")]
    inputs = chat_inputs(processor, pictures, ["Describe the image.", "Is there a cup in the image?"])
    assert inputs["pixel_values"].shape == (2, 3, tiny.SIDE, tiny.SIDE)
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert (inputs["input_ids"] == image_token).sum(1).tolist() == [tiny.TOKENS, tiny.TOKENS]
    assert inputs["attention_mask"][:, -1].tolist() == [1, 1]
    assert inputs["attention_mask"].sum(1).tolist()[0] < inputs["attention_mask"].shape[1]
    text = processor.tokenizer.decode(inputs["input_ids"][1], skip_special_tokens=True)
    assert "Is there a cup in the image" in text and text.split()[-2] == "ASSISTANT"
    with pytest.raises(ValueError, match="2 images for 1 texts"):
        chat_inputs(processor, pictures, ["Describe the image."])


def test_shared_inputs_are_those_of_each_prompt_with_pixels_once(llava: tuple[Any, Any]):
    _, processor = llava
    pictures = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    texts = [["Is there a cup ?", "Describe the image ."], ["Is there a bus in the image ?", "car"]]
    each = chat_inputs(processor, [p for p in pictures for _ in range(2)], [text for about in texts for text in about])
    shared, repeats = shared_chat_inputs(processor, pictures, texts)
    assert repeats == 2 and shared.keys() == each.keys()
    assert torch.equal(shared["pixel_values"], each["pixel_values"][::2])
    assert torch.equal(shared["input_ids"], each["input_ids"])
    assert torch.equal(shared["attention_mask"], each["attention_mask"])
    alone, repeats = shared_chat_inputs(processor, pictures, [about[:1] for about in texts])
    assert repeats == 1 and len(alone["pixel_values"]) == 2


@pytest.mark.parametrize("build", [tiny.build_qwen, PLAIN["llava-next"]])
def test_images_of_other_sizes_are_shared_too(build: Any):
    processor = build()[1]
    processor.tokenizer.padding_side = "left"
    pictures = [Image.new("RGB", size, colour) for size, colour in (((64, 48), "red"), ((40, 90), "blue"))]
    texts = [["Is there a cup ?", "Describe the image ."], ["Is there a bus in the image ?", "car"]]
    each = chat_inputs(processor, [p for p in pictures for _ in range(2)], [text for about in texts for text in about])
    shared, repeats = shared_chat_inputs(processor, pictures, texts)
    alone = chat_inputs(processor, pictures, [about[0] for about in texts])
    assert repeats == 2 and shared.keys() == each.keys()
    assert all(torch.equal(shared[key], each[key]) for key in ("input_ids", "attention_mask"))
    for key in shared.keys() - {"input_ids", "attention_mask", "mm_token_type_ids"}:
        assert torch.equal(shared[key], alone[key])


def test_pixels_that_are_not_one_array_per_image_come_once_per_row(
    llava: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
):
    _, processor = llava
    kind = type(processor.image_processor)
    plain = kind.__call__

    def with_sizes(self: Any, images: Any, *arguments: Any, **settings: Any) -> Any:
        outputs = plain(self, images, *arguments, **settings)
        return outputs | {"num_patches": torch.ones(len(outputs["pixel_values"]), 2)}

    monkeypatch.setattr(kind, "__call__", with_sizes)
    inputs, repeats = shared_chat_inputs(processor, [Image.new("RGB", (40, 30))], [["a", "an"]])
    assert repeats == 1 and len(inputs["pixel_values"]) == len(inputs["input_ids"]) == 2


@pytest.mark.parametrize("build", [tiny.build_llava, tiny.build_qwen])
def test_tokens_are_counted_as_the_processor_makes_them(build: Any, monkeypatch: pytest.MonkeyPatch):
    _, processor = build()
    runs: list[int] = []
    plain = type(processor.image_processor).__call__
    monkeypatch.setattr(type(processor.image_processor), "__call__", lambda *a, **k: runs.append(1) or plain(*a, **k))
    count = TokenCounter(processor)
    texts = ["Describe the image.", "Is there a cup in the image?", "Is there an umbrella in the image ? . ."]
    prompts = [(Image.new("RGB", size), text) for text in texts for size in ((32, 32), (80, 40), (40, 80), (17, 100))]
    counted = [count(image, text) for image, text in prompts]
    assert len(runs) == 4  # one image of each size
    assert counted == [chat_inputs(processor, [image], [text])["input_ids"].shape[1] for image, text in prompts]


@pytest.mark.parametrize(
    ("processor", "whole"),
    [
        (transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}), False),
        (transformers.ChameleonImageProcessorPil(), False),  # scales to -1 .. 1
        (transformers.Qwen2VLImageProcessorPil(), True),  # patches in a row
        (transformers.LlavaNextImageProcessorPil(), True),  # tiles
    ],
)
def test_what_the_model_sees_is_shown_as_it_is(processor: Any, whole: bool):
    seen = unprocessed(SimpleNamespace(image_processor=processor), Image.new("RGB", (640, 480), (100, 30, 200)))
    assert seen.dtype == np.uint8 and (seen.shape == (480, 640, 3)) == whole
    assert np.abs(seen.reshape(-1, 3).astype(int) - (100, 30, 200)).max() <= 1


@pytest.mark.parametrize("template", ["of the processor", {"default": "of the processor", "tools": "x"}])
def test_a_template_is_the_processors_or_else_the_tokenizers(template: Any):
    tokenizer = SimpleNamespace(chat_template="of the tokenizer")
    assert chat_template(SimpleNamespace(chat_template=template, tokenizer=tokenizer)) == "of the processor"
    assert chat_template(SimpleNamespace(chat_template=None, tokenizer=tokenizer)) == "of the tokenizer"
    assert chat_template(SimpleNamespace(tokenizer=SimpleNamespace())) is None


def test_tokens_are_counted_with_the_tokenizers_template():
    _, processor = tiny.build_llava()
    processor.chat_template, processor.tokenizer.chat_template = None, processor.chat_template
    picture = Image.new("RGB", (40, 30))
    counted = TokenCounter(processor)(picture, "Is there a cup ?")
    assert counted == chat_inputs(processor, [picture], ["Is there a cup ?"])["input_ids"].shape[1]
    shared, repeats = shared_chat_inputs(processor, [picture], [["a", "an"]])
    assert repeats == 2 and len(shared["input_ids"]) == 2


def test_a_processed_picture_is_turned_back(llava: tuple[Any, Any]):
    picture = Image.new("RGB", (tiny.SIDE, tiny.SIDE), (200, 30, 90))
    seen = unprocessed(llava[1], picture)
    assert seen.shape == (tiny.SIDE, tiny.SIDE, 3) and seen.reshape(-1, 3).tolist() == [[200, 30, 90]] * tiny.SIDE**2
