from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from data.errors import ModelLoadError
from data.vlm import TokenCounter, chat_inputs, fingerprint, load_vlm, shared_chat_inputs
from tests.data import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, processor = tiny.build_llava()
    path = tmp_path_factory.mktemp("models") / "tiny-llava"
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def test_a_saved_model_is_loaded_for_evaluation(folder: Path):
    model, processor = load_vlm(str(folder), device="cpu")
    assert not model.training and model.dtype == torch.float32
    assert processor.tokenizer.padding_side == "left"
    assert load_vlm(str(folder), dtype="bfloat16", device="cpu")[0].dtype == torch.bfloat16


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


def test_fingerprint_tells_weights_and_settings_apart(folder: Path, tmp_path: Path):
    record = fingerprint(*load_vlm(str(folder), device="cpu"))
    assert record["hub_id"] == "tiny-llava" and record["dtype"] == "float32"
    assert fingerprint(*load_vlm(str(folder), device="cpu", attn_implementation="eager")) == record
    copy = tmp_path / "tiny-llava"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert fingerprint(*load_vlm(str(copy), device="cpu")) == record  # wherever it lies
    weights = load_file(copy / "model.safetensors")
    weights[next(iter(weights))] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    changed = fingerprint(*load_vlm(str(copy), device="cpu"))
    assert {key for key in record if record[key] != changed[key]} == {"weights_sha256"}


def test_errors_name_the_model_and_the_way_out(folder: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelLoadError, match=r"from the folder .*empty.*\n.*model\.hub_id"):
        load_vlm(str(tmp_path / "empty"))
    with pytest.raises(ModelLoadError, match=r"model\.hub_id='.*nowhere': there is no such folder"):
        load_vlm(str(tmp_path / "nowhere"))
    with pytest.raises(ModelLoadError, match=r"model\.dtype='int3': use auto, float32"):
        load_vlm(str(folder), dtype="int3")
    with pytest.raises(ModelLoadError, match=r"model\.device='gpu'"):
        load_vlm(str(folder), device="gpu")


def test_a_checkpoint_without_some_weights_is_refused(folder: Path, tmp_path: Path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if "layers.1.mlp" in name)
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match="lacks 1 weights"):
        load_vlm(str(tmp_path))


def test_a_cut_checkpoint_is_refused(folder: Path, tmp_path: Path):
    for file in folder.iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[: len(content) // 2] if file.suffix == ".safetensors" else content)
    with pytest.raises(ModelLoadError, match="cannot load"):
        load_vlm(str(tmp_path))


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


def test_pixels_that_are_not_one_array_per_image_come_once_per_row(
    llava: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
):
    _, processor = llava
    kind = type(processor.image_processor)
    plain = kind.__call__

    def with_sizes(self: Any, images: Any, *arguments: Any, **settings: Any) -> Any:
        outputs = plain(self, images, *arguments, **settings)
        return outputs | {"image_sizes": torch.ones(len(outputs["pixel_values"]), 2)}

    monkeypatch.setattr(kind, "__call__", with_sizes)
    inputs, repeats = shared_chat_inputs(processor, [Image.new("RGB", (40, 30))], [["a", "an"]])
    assert repeats == 1 and len(inputs["pixel_values"]) == len(inputs["input_ids"]) == 2


@pytest.mark.parametrize("build", [tiny.build_llava, tiny.build_qwen])
def test_saving_a_model_does_not_change_what_it_is(build: Any, tmp_path: Path):
    model, processor = build()
    before = fingerprint(model, processor)
    model.save_pretrained(tmp_path)
    assert fingerprint(model, processor) == before
    again: Any = type(model).from_pretrained(tmp_path)
    assert fingerprint(again, processor)["config_sha256"] == before["config_sha256"]
    model.config.text_config.rms_norm_eps *= 2
    assert fingerprint(model, processor)["config_sha256"] != before["config_sha256"]


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
