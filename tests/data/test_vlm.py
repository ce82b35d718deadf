from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.errors import ModelLoadError
from data.settings import AttentionImplementation, Dtype, VLMSettings
from data.vlm import DTYPES, load_vlm, model_identity
from tests.data import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, processor = tiny.build_llava()
    path = tmp_path_factory.mktemp("models") / "tiny-llava"
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def test_a_saved_model_is_loaded_for_evaluation(folder: Path):
    model, processor = load_vlm(VLMSettings(hub_id=str(folder), device="cpu"))
    assert not model.training and model.dtype == torch.float32
    assert processor.tokenizer.padding_side == "left"
    assert load_vlm(VLMSettings(hub_id=str(folder), dtype="bfloat16", device="cpu"))[0].dtype == torch.bfloat16


def test_every_number_format_has_a_dtype():
    assert {"auto", *DTYPES} == set(get_args(Dtype))


def identity_of(folder: Path, attention: AttentionImplementation = "sdpa") -> dict[str, Any]:
    settings = VLMSettings(hub_id=str(folder), device="cpu", attn_implementation=attention)
    return model_identity(*load_vlm(settings))


def test_the_identity_of_a_model_covers_weights_and_settings(folder: Path, tmp_path: Path):
    record = identity_of(folder)
    assert record["hub_id"] == "tiny-llava" and record["dtype"] == "float32"
    assert identity_of(folder, "eager") == record
    copy = tmp_path / "tiny-llava"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert identity_of(copy) == record  # in any folder of this name
    weights = load_file(copy / "model.safetensors")
    weights[next(iter(weights))] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    changed = identity_of(copy)
    assert {key for key in record if record[key] != changed[key]} == {"weights_sha256"}


def test_errors_name_the_model_and_the_way_out(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelLoadError, match=r"from the folder .*empty.*\n.*model\.hub_id"):
        load_vlm(VLMSettings(hub_id=str(tmp_path / "empty")))
    with pytest.raises(ModelLoadError, match=r"model\.hub_id='.*nowhere': there is no such folder"):
        load_vlm(VLMSettings(hub_id=str(tmp_path / "nowhere")))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelLoadError, match=r"model\.device='cuda', but torch sees no CUDA device"):
        load_vlm(VLMSettings(hub_id=str(folder), device="cuda"))


def test_a_checkpoint_without_some_weights_is_rejected(folder: Path, tmp_path: Path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if "layers.1.mlp" in name)
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match="lacks 1 weights"):
        load_vlm(VLMSettings(hub_id=str(tmp_path)))


def test_a_cut_checkpoint_is_rejected(folder: Path, tmp_path: Path):
    for file in folder.iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[: len(content) // 2] if file.suffix == ".safetensors" else content)
    with pytest.raises(ModelLoadError, match="cannot load"):
        load_vlm(VLMSettings(hub_id=str(tmp_path)))


@pytest.mark.parametrize("build", [tiny.build_llava, tiny.build_qwen])
def test_saving_a_model_does_not_change_what_it_is(build: Any, tmp_path: Path):
    model, processor = build()
    before = model_identity(model, processor)
    model.save_pretrained(tmp_path)
    assert model_identity(model, processor) == before
    again: Any = type(model).from_pretrained(tmp_path)
    assert model_identity(again, processor)["config_sha256"] == before["config_sha256"]
    model.config.text_config.rms_norm_eps *= 2
    assert model_identity(model, processor)["config_sha256"] != before["config_sha256"]
