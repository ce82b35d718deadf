"""Which model a predictor serves, and what happens where it serves another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from scr_runtime import SCR, PredictorConfig, SCRConfig, SourcePredictor, describe_model, errors, save_predictor
from scr_runtime.identity import model_differences, usable_predictor
from tests.scr_runtime.reference import make_predictor
from tests.scr_runtime.test_artifact import change_config

CONFIG = SCRConfig(num_sources=4, edit_layers=(0, 2), attention_layers=(2, 4))
LATER = SCRConfig(num_sources=4, edit_layers=(1, 3), attention_layers=(2, 4), state_layer=1)


@pytest.fixture
def folder(tmp_path: Path, tiny_llava: Any) -> Path:
    model = tiny_llava(0)
    return save_predictor(tmp_path / "p", make_predictor(model), scr=CONFIG, model=describe_model(model))


def test_another_model_is_refused(folder: Path, tiny_llava: Any) -> None:
    for model, words in (
        (tiny_llava(0, hidden=64), "hidden_size is 64, the predictor expects 32"),
        (tiny_llava(0, layers=7), "num_blocks is 7, the predictor expects 6"),
        (tiny_llava(1), "these are other weights"),
    ):
        with pytest.raises(errors.PredictorMismatchError, match=words):
            SCR(model, predictor=folder, mode="one-pass")
        with pytest.warns(RuntimeWarning, match=words):
            SCR(model, config=CONFIG, predictor=folder, mode="auto")


class ImageProcessorA:
    pass


class ImageProcessorB:
    pass


def test_another_image_backend_or_layer_is_refused(folder: Path, tiny_llava: Any) -> None:
    model = tiny_llava(0)
    record = json.loads((folder / "config.json").read_text())
    change_config(folder, model=describe_model(model, ImageProcessorA()))
    SCR(model, predictor=folder, mode="one-pass", processor=ImageProcessorA())
    SCR(model, predictor=folder, mode="one-pass")  # no processor, nothing to compare
    with pytest.raises(errors.PredictorMismatchError, match="image_backend is 'ImageProcessorB'"):
        SCR(model, predictor=folder, mode="one-pass", processor=ImageProcessorB())
    change_config(folder, model=record["model"])
    with pytest.raises(errors.PredictorMismatchError, match="state_layer is 1, the predictor reads block 0"):
        SCR(model, config=LATER, predictor=folder, mode="one-pass")
    with pytest.warns(RuntimeWarning, match="state_layer is 1"):
        assert SCR(model, config=LATER, predictor=folder, mode="auto").config == LATER
    change_config(folder, scr=LATER.to_dict())
    assert SCR(model, predictor=folder, mode="one-pass").config == LATER
    with pytest.raises(errors.PredictorMismatchError, match="state_layer is 0, the predictor reads block 1"):
        SCR(model, config=CONFIG, predictor=folder, mode="one-pass")


def test_a_folder_from_before_there_was_a_choice_of_layer_reads_block_0(folder: Path, tiny_llava: Any) -> None:
    record = json.loads((folder / "config.json").read_text())
    del record["scr"]["state_layer"]
    change_config(
        folder, scr=record["scr"], model=record["model"] | {"state_layer": 0}, format_version=2, checksum=None
    )
    assert SCR(tiny_llava(0), predictor=folder, mode="one-pass").config == CONFIG


def test_no_settings_anywhere(tiny_llava: Any, tmp_path: Path) -> None:
    model = tiny_llava(0)
    with pytest.raises(errors.ConfigurationError, match=r"give config=SCRConfig"):
        SCR(model, mode="two-pass")
    with pytest.raises(errors.ConfigurationError, match=r"give config=SCRConfig"):
        SCR(model, mode="auto", predictor=make_predictor(model))  # one that was never saved


def test_a_predictor_that_cannot_be_used(tiny_llava: Any, llava_inputs: Any, tmp_path: Any) -> None:
    model = tiny_llava(23)
    inputs = llava_inputs(model, [1], seed=23)
    other = SourcePredictor(PredictorConfig(64, rank=4))
    for predictor, error, words in (
        (tmp_path / "nowhere", errors.PredictorNotFoundError, "does not exist"),
        (other, errors.PredictorMismatchError, "hidden_size is 32, the predictor expects 64"),
        (None, errors.ConfigurationError, "no predictor was given"),
    ):
        with pytest.raises(error, match=words):
            SCR(model, config=CONFIG, mode="one-pass", predictor=predictor)
        with pytest.warns(RuntimeWarning, match=words) as warned:
            scr = SCR(model, config=CONFIG, mode="auto", predictor=predictor)
        assert warned[0].filename == __file__  # the caller's line, not the library's
        with torch.no_grad(), scr:
            model(**inputs)
        assert scr.reports[0].provider == "two-pass"
        assert words in str(scr.reports[0].fallback_reason)


def test_a_model_differs_from_itself_in_nothing(tiny_llava: Any) -> None:
    model = tiny_llava(0)
    described = describe_model(model, ImageProcessorA())
    assert json.loads(json.dumps(described)) == described
    assert (described["family"], described["hidden_size"], described["num_blocks"]) == ("llava", 32, 6)
    assert len(described["embedding_probe"]) == 32
    assert model_differences(described, model, ImageProcessorA()) == []
    assert model_differences(described, model) == []
    assert model_differences(described, model.to(torch.bfloat16)) == []  # a dtype is no other model
    assert describe_model(model)["image_backend"] is None


def test_a_usable_predictor_comes_on_the_models_device(folder: Path, tiny_llava: Any) -> None:
    model = tiny_llava(0)
    assert usable_predictor(folder, model).info["model"]["family"] == "llava"
    predictor = make_predictor(model)
    assert usable_predictor(predictor, model, config=LATER) is predictor  # without a folder, any layer is possible
    with pytest.raises(errors.ConfigurationError, match="pass predictor=FOLDER"):
        usable_predictor(None, model)
