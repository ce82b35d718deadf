from __future__ import annotations

from typing import Any

import pytest

import scr_runtime
from scr_runtime import SCRConfig, errors


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


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(errors.ConfigurationError) as caught:
        SCRConfig(num_sources=-1, strength=3.0, connectivity=5)
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
