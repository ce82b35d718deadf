"""The golden pair: written with every folder, compared on demand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from scr_runtime import SCRConfig, describe_model, errors, load_predictor, save_predictor
from scr_runtime.golden import GRID, most_golden_bytes
from tests.scr_runtime.reference import make_predictor
from tests.scr_runtime.test_artifact import change_config

CONFIG = SCRConfig(num_sources=4, edit_layers=(0, 2), attention_layers=(2, 4))


@pytest.fixture
def folder(tmp_path: Path, tiny_llava: Any) -> Path:
    model = tiny_llava(0)
    predictor = make_predictor(model)
    predictor.set_statistics(torch.randn(32), torch.rand(32) + 1, torch.randn(32), torch.rand(32) + 1)
    predictor.set_calibration(torch.tensor([0.1, 0.9]), torch.tensor([0.2, 0.8]), 0.3, 1.7)
    predictor.set_drift(1.0, 2.0)
    return save_predictor(tmp_path / "p", predictor, scr=CONFIG, model=describe_model(model))


def resigned(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Changes the pair, and what config.json says of its bytes."""
    tensors = load_file(folder / "golden.safetensors")
    change(tensors)
    save_file(tensors, folder / "golden.safetensors")
    change_config(folder, golden_sha256=hashlib.sha256((folder / "golden.safetensors").read_bytes()).hexdigest())


def test_a_folder_verifies_and_is_small(folder: Path) -> None:
    predictor = load_predictor(folder, verify=True)
    pair = load_file(folder / "golden.safetensors")
    assert {name: tuple(value.shape) for name, value in pair.items()} == {
        "states": (2, 48, 32), "question": (2, 32), "scores": (2, 48), "confidence": (2,), "drift": (2,),
        "sources": (2, 4),
    }  # fmt: skip
    assert torch.equal(predictor(pair["states"], GRID, pair["question"]), pair["scores"])
    assert float(pair["drift"].max()) < 2.0  # inputs like those of the fit
    assert (folder / "golden.safetensors").stat().st_size <= most_golden_bytes(32)


def test_it_is_written_with_the_same_bytes_again(folder: Path, tmp_path: Path) -> None:
    predictor = load_predictor(folder)
    again = save_predictor(tmp_path / "q", predictor, scr=CONFIG, model=predictor.info["model"])
    for path in folder.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()


CHANGES: list[tuple[Callable[[dict[str, torch.Tensor]], object], str]] = [
    (lambda pair: pair["scores"].mul_(1.01), "scores of the golden inputs differ by up to .*, expected at most"),
    (lambda pair: pair["scores"].fill_(float("nan")), "scores of the golden inputs differ by up to nan"),
    (lambda pair: pair["confidence"].add_(0.01), "confidence of the golden inputs differ by up to 0.01"),
    (lambda pair: pair["states"].mul_(2), "scores of the golden inputs differ"),
    (lambda pair: pair["sources"].copy_(pair["sources"].flip(1)), "sources chosen from the stored scores"),
    (lambda pair: pair.pop("drift"), "golden.safetensors: holds .*, expected .*drift"),
    (lambda pair: pair.update(sources=pair["sources"].int()), "torch.int32"),
    (lambda pair: pair.update(states=pair["states"][:1].clone()), r"holds .*\(1, 48, 32\)"),
]


@pytest.mark.parametrize(("change", "words"), CHANGES)
def test_other_answers_are_refused_on_demand(folder: Path, change: Any, words: str) -> None:
    resigned(folder, change)
    load_predictor(folder)  # nobody asked
    with pytest.raises(errors.PredictorCorruptError, match=words):
        load_predictor(folder, verify=True)


def test_a_changed_a_missing_and_an_unknown_pair(folder: Path) -> None:
    path = folder / "golden.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(errors.PredictorCorruptError, match=r"golden.safetensors: sha256 is .* config.json says"):
        load_predictor(folder, verify=True)
    path.unlink()
    with pytest.raises(errors.PredictorCorruptError, match="cannot be read"):
        load_predictor(folder, verify=True)
    change_config(folder, golden_sha256="0")
    with pytest.raises(errors.PredictorCorruptError, match="golden_sha256='0': expected 64 hexadecimal digits"):
        load_predictor(folder)
    change_config(folder, golden_sha256=None)
    load_predictor(folder)
    with pytest.raises(errors.PredictorCorruptError, match=r"missing key 'golden_sha256'.*Export it again"):
        load_predictor(folder, verify=True)


def test_a_runtime_that_computes_something_else_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.functional.gelu", torch.nn.functional.relu)
    with pytest.raises(errors.PredictorCorruptError, match="scores of the golden inputs differ"):
        load_predictor(folder, verify=True)


def test_what_gives_no_numbers_is_not_saved(folder: Path, tmp_path: Path) -> None:
    predictor = load_predictor(folder)
    predictor.score.bias.data.fill_(float("nan"))
    with pytest.raises(errors.ConfigurationError, match=r"could not be loaded again.*score\.bias holds NaN"):
        save_predictor(tmp_path / "q", predictor, scr=CONFIG, model=json.loads("{}"))
