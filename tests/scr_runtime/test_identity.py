"""Which model a predictor serves, and what happens where it serves another."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
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
from scr_runtime.identity import model_differences, public_name, usable_predictor
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


def test_another_revision_of_the_same_repository_is_refused(folder: Path, tiny_llava: Any) -> None:
    model = tiny_llava(0)
    model.config._name_or_path, model.config._commit_hash = "org/llava", "b" * 40
    record = json.loads((folder / "config.json").read_text())
    change_config(folder, model=record["model"] | {"name": "org/llava", "revision": "a" * 40})
    words = f"revision is '{'b' * 40}', the predictor expects '{'a' * 40}'"
    with pytest.raises(errors.PredictorMismatchError, match=words):
        SCR(model, predictor=folder, mode="one-pass")
    with pytest.warns(RuntimeWarning, match=words):
        SCR(model, predictor=folder, mode="auto")
    for name, revision in (("org/llava", "b" * 40), ("org/llava", None), ("org/copy", "a" * 40)):
        change_config(folder, model=record["model"] | {"name": name, "revision": revision})
        SCR(model, predictor=folder, mode="one-pass")  # equal, not known, or not to be compared


@pytest.mark.parametrize(
    "changes",
    [
        {"num_sources": 5},
        {"strength": 1.2},
        {"edit_layers": (0, 1)},
        {"attention_layers": (3, 4)},
        {"connectivity": 4},
    ],
)
def test_other_settings_than_those_of_the_fit_warn_once_with_both(
    folder: Path, tiny_llava: Any, changes: dict[str, Any]
) -> None:
    (key,) = changes
    fitted = CONFIG.to_dict()[key]
    config = dataclasses.replace(CONFIG, **changes)
    for mode in ("one-pass", "auto"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scr = SCR(tiny_llava(0), config=config, predictor=folder, mode=mode)  # type: ignore[arg-type]
        (warning,) = caught
        assert f"{key} is {config.to_dict()[key]!r}, was {fitted!r}" in str(warning.message)
        assert warning.filename == __file__ and scr.config == config
    SCR(tiny_llava(0), config=config, predictor=folder, mode="two-pass")  # asks no predictor


def test_names_are_those_of_the_hub_or_hold_no_path(tiny_llava: Any, tmp_path: Path) -> None:
    model, commit = tiny_llava(0), "c" * 40
    assert public_name(model) == "LlavaForConditionalGeneration"
    for place, name in (
        ("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-7b-hf"),
        (f"/home/me/.cache/huggingface/hub/models--org--my-llava/snapshots/{commit}", "org/my-llava"),
    ):
        model.config._name_or_path = place
        assert public_name(model) == name
    names = []
    for place in (tmp_path / "one" / "my llava", tmp_path / "two" / "my llava"):
        place.mkdir(parents=True)
        model.config._name_or_path = str(place)
        names.append(public_name(model))
    assert names[0] == names[1] and re.fullmatch("my llava-[0-9a-f]{8}", names[0])
    model.config._name_or_path = str(tmp_path / "gone")
    assert re.fullmatch("gone-[0-9a-f]{8}", public_name(model))
    half, other = tiny_llava(0, dtype=torch.bfloat16), tiny_llava(1)
    half.config._name_or_path = other.config._name_or_path = str(tmp_path / "one" / "my llava")
    assert public_name(half) == names[0] and public_name(other) != names[0]


def test_the_predictor_names_itself(folder: Path, tiny_llava: Any) -> None:
    change_config(folder, metrics={"test/recall": 0.8312})
    words = "block 0, 4 sources, threshold 0.000, recall 0.831>"
    assert repr(load_predictor(folder)).startswith("<SourcePredictor for LlavaForConditionalGeneration: ")
    assert repr(load_predictor(folder)).endswith(words)
    assert repr(make_predictor(tiny_llava(0))).endswith("parameters, hidden size 32>")
