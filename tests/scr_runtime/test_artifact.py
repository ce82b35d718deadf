from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from scr_runtime import (
    SCR,
    PredictorConfig,
    SCRConfig,
    SourcePredictor,
    describe_model,
    errors,
    load_predictor,
    save_predictor,
)
from scr_runtime.reading import checksum

pytestmark = pytest.mark.filterwarnings("ignore:32 sources are asked for")  # the paper's K, on 36 patches

CONFIG = SCRConfig(num_sources=4, edit_layers=(0, 2), attention_layers=(2, 4))


@pytest.fixture
def folder(tmp_path: Path, tiny_llava: Any) -> Path:
    torch.manual_seed(0)
    predictor = SourcePredictor(PredictorConfig(32, rank=4, width=8))
    predictor.set_statistics(torch.randn(32), torch.rand(32) + 1, torch.randn(32), torch.rand(32) + 1)
    predictor.set_calibration(torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.2, 0.4, 0.8]), 0.3, 1.7)
    model = describe_model(tiny_llava(0))
    return save_predictor(tmp_path / "p", predictor, scr=CONFIG, model=model, metrics={"test/mass": 0.9})


def change_config(folder: Path, *, sign: bool = True, **changes: Any) -> None:
    """Changes values (``None`` takes a key out) and, unless told otherwise, the checksum with them."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    if sign and "checksum" in config:
        config["checksum"] = checksum(config)
    path.write_text(json.dumps(config))


def test_round_trip(folder: Path, tiny_llava: Any) -> None:
    torch.manual_seed(0)
    predictor = load_predictor(folder)
    again = load_predictor(save_predictor(folder.parent / "q", predictor, scr=CONFIG, model=predictor.info["model"]))
    states, question = torch.randn(2, 36, 32), torch.randn(2, 32)
    assert torch.equal(predictor(states, (6, 6), question), again(states, (6, 6), question))
    assert again.threshold == 0.3
    assert float(again.temperature) == pytest.approx(1.7)
    assert again.config == predictor.config
    assert again.calibration_raw.tolist() == pytest.approx([0.1, 0.5, 0.9])
    assert predictor.info["metrics"] == {"test/mass": 0.9}
    assert not predictor.training
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "golden.safetensors", "model.safetensors"]
    assert (folder / "model.safetensors").stat().st_mode & 0o044 == 0o044  # readable by a server's user


def test_the_runtime_takes_its_settings_from_the_folder(folder: Path, tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(0)
    with torch.no_grad(), SCR(model, predictor=folder, mode="one-pass") as scr:
        model(**llava_inputs(model, [1]))
    assert scr.config == CONFIG
    assert scr.reports[0].provider == "one-pass"
    bf16 = tiny_llava(0, dtype=torch.bfloat16)  # the same model in another dtype is the same model
    with torch.no_grad(), SCR(bf16, predictor=folder, mode="one-pass") as scr:
        bf16(**llava_inputs(bf16, [1]))
    assert 0 < (scr.reports[0].confidence or 0) <= 1


def flip_a_byte(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


DAMAGES: list[tuple[Any, type[Exception], str]] = [
    (flip_a_byte, errors.PredictorCorruptError, r"model.safetensors: sha256 is .* config.json says"),
    (cut, errors.PredictorCorruptError, "sha256"),
    (lambda f: (f / "model.safetensors").unlink(), errors.PredictorCorruptError, "cannot be read"),
    (lambda f: (f / "config.json").unlink(), errors.PredictorNotFoundError, "has no config.json"),
    (lambda f: (f / "config.json").write_text("{"), errors.PredictorCorruptError, "not readable as JSON"),
    (lambda f: (f / "config.json").write_text("[1]"), errors.PredictorCorruptError, "format_version=None"),
    (
        lambda f: (f / "config.json").write_text('{"model_type": "llava"}'),
        errors.PredictorCorruptError,
        "this is a model's folder: name one that train.py exported",
    ),
    (
        lambda f: change_config(f, format_version=4),
        errors.PredictorVersionError,
        "=4, .* reads up to 3. Upgrade scr-r",
    ),
    (
        lambda f: change_config(f, format_version=1),
        errors.PredictorVersionError,
        "=1, .* reads 2 to 3: .* Fit it again",
    ),
    (lambda f: change_config(f, checksum=None), errors.PredictorCorruptError, r"missing keys \['checksum'\]"),
    (lambda f: change_config(f, threshold=0.5, sign=False), errors.PredictorCorruptError, "its checksum is not"),
    (lambda f: change_config(f, format_version=2), errors.PredictorCorruptError, "=2 with a checksum"),
    (lambda f: change_config(f, network=None), errors.PredictorCorruptError, r"missing keys \['network'\]"),
    (lambda f: change_config(f, network={"hidden_size": 32}), errors.PredictorCorruptError, "expected the keys"),
    (lambda f: change_config(f, scr={"num_sauces": 3}), errors.PredictorCorruptError, "num_sauces"),
    (lambda f: change_config(f, drift_limit=0.5, drift_typical=1.0), errors.PredictorCorruptError, "drift_limit"),
    (lambda f: change_config(f, drift_limit=2.0), errors.PredictorCorruptError, "drift_typical"),
]


@pytest.mark.parametrize(("damage", "error", "words"), DAMAGES)
def test_damage_is_an_error_in_one_pass_and_a_warning_in_auto(
    folder: Path, tiny_llava: Any, llava_inputs: Any, damage: Any, error: type[Exception], words: str
) -> None:
    damage(folder)
    with pytest.raises(error, match=words):
        load_predictor(folder)
    model = tiny_llava(0)
    with pytest.raises(error, match=words):
        SCR(model, config=CONFIG, predictor=folder, mode="one-pass")
    with pytest.warns(RuntimeWarning, match=words):
        scr = SCR(model, config=CONFIG, predictor=folder, mode="auto")
    with torch.no_grad(), scr:
        model(**llava_inputs(model, [1]))
    assert scr.reports[0].provider == "two-pass"


def test_tensors_that_do_not_fit_are_all_listed(folder: Path) -> None:
    network = json.loads((folder / "config.json").read_text())["network"]
    change_config(folder, network=network | {"rank": 5, "question": "none"})
    with pytest.raises(errors.PredictorCorruptError) as caught:
        load_predictor(folder)
    for words in ("gate.weight is unexpected", "gate.bias is unexpected", "project.weight has shape (4, 32)"):
        assert words in str(caught.value)


def test_the_guard_travels_with_the_folder(tmp_path: Any) -> None:
    predictor = SourcePredictor(PredictorConfig(32, rank=8, width=16))
    save: dict[str, Any] = {"scr": CONFIG, "model": {"family": "llava"}}
    assert load_predictor(save_predictor(tmp_path / "a", predictor, **save)).drift_limit is None
    predictor.set_drift(0.5, 1.7)
    loaded = load_predictor(save_predictor(tmp_path / "b", predictor, **save))
    assert (loaded.drift_typical, loaded.drift_limit) == (0.5, 1.7)


def test_a_calibration_that_maps_confidence_to_itself(tmp_path: Any) -> None:
    """The same tensor for both halves: stored as copies, which can be saved and which nobody else writes to."""
    predictor = SourcePredictor(PredictorConfig(32, rank=8, width=16))
    line = torch.tensor([0.0, 0.5, 1.0])
    predictor.set_calibration(line, line, 0.5)
    line.fill_(0.0)
    loaded = load_predictor(save_predictor(tmp_path / "p", predictor, scr=CONFIG, model={"family": "llava"}))
    assert loaded.calibration_raw.tolist() == loaded.calibration_expected.tolist() == [0.0, 0.5, 1.0]


def test_what_could_not_be_loaded_again_is_not_saved(tmp_path: Path) -> None:
    predictor = SourcePredictor(PredictorConfig(32, rank=4, width=8))
    model = {"family": "llava", "hidden_size": 32, "num_blocks": 6}
    with pytest.raises(errors.ConfigurationError, match=r"could not be loaded again.*embedding_probe is missing"):
        save_predictor(tmp_path / "p", predictor, scr=CONFIG, model=model)
    assert not (tmp_path / "p").exists()
