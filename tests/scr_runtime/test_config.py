from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

import scr_runtime
from scr_runtime import PredictorConfig, SCRConfig, errors


def test_the_defaults_are_the_papers_for_llava() -> None:
    config = SCRConfig()
    assert (config.num_sources, config.strength, config.connectivity) == (32, 1.10, 8)
    assert (config.edit_layers, config.attention_layers, config.exclude_border) == ((0, 11), (8, 16), True)


def test_round_trip_through_json_lists() -> None:
    config = SCRConfig(edit_layers=(0, 2), attention_layers=(2, 4))
    assert SCRConfig.from_dict(config.to_dict()) == config
    assert config.to_dict()["edit_layers"] == [0, 2]


@pytest.mark.parametrize(
    "values",
    [
        {"num_sources": 0},
        {"strength": 0.9},
        {"strength": float("nan")},
        {"edit_layers": (3, 2)},
        {"edit_layers": (0,)},
        {"attention_layers": (0, 2)},
        {"attention_layers": (2, 4), "edit_layers": (2, 3), "state_layer": 2},
        {"edit_layers": (1, 4), "state_layer": 2},
        {"state_layer": -1},
        {"connectivity": 6},
    ],
)
def test_values_out_of_range_are_named(values: dict[str, Any]) -> None:
    with pytest.raises(errors.ConfigurationError, match=next(iter(values))):
        SCRConfig(**values)


def test_every_problem_is_named_at_once() -> None:
    with pytest.raises(errors.ConfigurationError) as caught:
        SCRConfig(num_sources=-1, strength=3.0, connectivity=5)  # type: ignore[arg-type]
    for name in ("num_sources=-1", "strength=3.0", "connectivity=5"):
        assert name in str(caught.value)


def test_nothing_is_edited_or_read_before_the_state_layer() -> None:
    assert SCRConfig(edit_layers=(2, 11), attention_layers=(3, 16), state_layer=2).state_layer == 2
    assert SCRConfig.from_dict({"edit_layers": [0, 2]}).state_layer == 0  # settings from before there was a choice
    with pytest.raises(errors.ConfigurationError) as caught:
        SCRConfig(edit_layers=(1, 11), attention_layers=(2, 16), state_layer=2)
    for words in ("edit_layers=(1, 11): must start at block 2", "attention_layers=(2, 16): must start at block 3"):
        assert words in str(caught.value)
    assert "state_layer=2" in str(caught.value)


def test_the_public_names() -> None:
    assert set(scr_runtime.__all__) <= set(dir(scr_runtime))
    for name in ("SCR", "SCRConfig", "SourcePredictor", "load_predictor", "save_predictor"):
        assert name in scr_runtime.__all__


def test_the_error_tree_in_the_docstring_names_every_error() -> None:
    classes = [name for name, value in vars(errors).items() if isinstance(value, type)]
    for name in classes:
        assert name in (errors.__doc__ or "")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"position": True}, r"position=True: expected one of \['none', 'linear', 'fourier'\]"),
        ({"question": "film"}, r"question='film': expected one of \['none', 'concat', 'bilinear'\]"),
        ({"context": False}, r"context=False: expected one of \['none', 'mean', 'neighbourhood', 'both'\]"),
        ({"components": 0}, "components=0: expected an integer of at least 1"),
        ({"width": 0}, "width=0: expected an integer of at least 1"),
    ],
)
def test_unknown_choices_are_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(errors.ConfigurationError, match=words):
        PredictorConfig(16, **wrong)
    with pytest.raises(errors.ConfigurationError, match=words):
        PredictorConfig.from_dict(PredictorConfig(16).to_dict() | wrong)


def test_the_rank_is_at_most_the_hidden_size() -> None:
    assert PredictorConfig(16).rank == 16
    for rank in (0, 17, True, 2.5):
        with pytest.raises(errors.ConfigurationError, match=f"rank={rank!r}: expected 1 to hidden_size=16, or None"):
            PredictorConfig(16, rank=rank)  # type: ignore[arg-type]


def test_the_shipped_predictor() -> None:
    config = PredictorConfig(4096)
    assert (config.position, config.question, config.context, config.components) == ("fourier", "bilinear", "none", 24)
    assert PredictorConfig.from_dict(config.to_dict()) == config
    assert config.features(4) == 2 * 4 + 3 + 4 * 8


@pytest.mark.parametrize("name", scr_runtime.__all__)
def test_every_public_name_can_be_loaded(name: str) -> None:
    assert getattr(scr_runtime, name) is not None
    assert set(scr_runtime.__all__) - set(scr_runtime._HOMES) == {"PredictorConfig", "SCRConfig", "errors"}


def test_settings_cost_no_import_of_torch() -> None:
    code = "import sys, scr_runtime.config; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    with pytest.raises(AttributeError, match="no attribute 'Predictor'"):
        _ = scr_runtime.Predictor
