"""What can be known before any prefill is checked when an SCR is made, and again when it is attached."""

from __future__ import annotations

import fractions
import math
import warnings
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scr_runtime import SCR, SCRConfig, errors
from scr_runtime.checks import attention_configs, attention_of, check_arguments
from scr_runtime.families import family_of
from tests.conftest import make_inputs, make_tiny_llava
from tests.scr_runtime.leftovers import snapshot
from tests.scr_runtime.reference import make_predictor
from tests.scr_runtime.tiny_families import TINY

CONFIG = SCRConfig(num_sources=4, edit_layers=(0, 2), attention_layers=(2, 4))
MODES: Any = ("one-pass", "two-pass", "auto", "uniform", "off")


@pytest.fixture(scope="module")
def model() -> Any:
    return make_tiny_llava(60)


def unhashable() -> Any:
    return [0]


BAD: list[dict[str, Any]] = [
    *[{"threshold": value} for value in (
        "0.7", "high", math.nan, math.inf, -math.inf, True, [0.5], {}, 1j, b"0", numpy.nan, torch.tensor(math.nan),
        10**400)],
    *[{"mode": value} for value in ("onepass", "ONE-PASS", "", None, 1, True, ["auto"], ("auto",), {"auto"}, {})],
    *[{"seed": value} for value in ("1", 1.0, None, True, 2**64, -(2**63) - 1, [1], math.nan)],
    *[{"config": value} for value in ({}, {"num_sources": 4}, "config", 5, SCRConfig, [CONFIG])],
    *[{"predictor": value} for value in (5, 0.5, {}, [], True, b"folder", torch.nn.Linear(32, 1), object())],
]  # fmt: skip


@pytest.mark.parametrize(
    "bad", BAD, ids=lambda bad: "-".join(f"{key}-{type(value).__name__}" for key, value in bad.items())
)
def test_arguments_of_another_type_or_out_of_range(model: Any, bad: dict[str, Any]) -> None:
    """R17, and the rest of its class: the argument is named, in every mode, and nothing is attached."""
    before = snapshot(model)
    for mode in ("auto", "uniform"):
        given: dict[str, Any] = {"config": CONFIG, "predictor": make_predictor(model), "mode": mode} | bad
        with pytest.raises(errors.ConfigurationError, match=next(iter(bad))):
            SCR(model, **given)
    assert snapshot(model) == before


@settings(deadline=None, max_examples=150)
@given(
    threshold=st.none() | st.floats() | st.integers() | st.text(max_size=3) | st.booleans() | st.fractions(),
    seed=st.integers() | st.floats() | st.none() | st.text(max_size=3),
)
def test_any_threshold_and_seed(threshold: Any, seed: Any) -> None:
    """What is let through attaches, runs and is shown; nothing else is."""
    try:
        check_arguments(CONFIG, None, "uniform", threshold, seed)
    except errors.ConfigurationError:
        return
    scr = SCR(_MODEL, config=CONFIG, mode="uniform", threshold=threshold, seed=seed)
    with torch.no_grad(), scr:
        _MODEL(**_INPUTS)
        assert "attached to" in repr(scr)
    assert len(scr.reports) == 1


_MODEL: Any = make_tiny_llava(61)
_INPUTS = make_inputs(_MODEL, [1])


@pytest.mark.parametrize("threshold", [0, 1, 0.5, -3, fractions.Fraction(1, 3), numpy.float32(0.3), numpy.int64(1)])
def test_numbers_of_other_types_are_thresholds(model: Any, threshold: Any) -> None:
    scr = SCR(model, config=CONFIG, predictor=make_predictor(model), mode="auto", threshold=threshold)
    with torch.no_grad(), scr:
        model(**make_inputs(model, [1]))
    assert f"threshold {float(threshold):.3f}" in repr(scr)


# -- settings against the model --------------------------------------------------------------------------------------


def scr_config(**changes: Any) -> SCRConfig:
    return SCRConfig(**{"num_sources": 4, "edit_layers": (0, 2), "attention_layers": (2, 4)} | changes)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "changes", [{"edit_layers": (0, 6)}, {"attention_layers": (2, 6)}, {"edit_layers": (0, 99)},
                {"state_layer": 5, "edit_layers": (5, 5), "attention_layers": (6, 6)}],
)  # fmt: skip
def test_layers_beyond_the_depth(model: Any, mode: Any, changes: dict[str, Any]) -> None:
    config = scr_config(**changes)
    given: dict[str, Any] = {"config": config, "predictor": make_predictor(model), "mode": mode}
    if mode == "off":
        SCR(model, **given)
        return
    with pytest.raises(errors.ConfigurationError, match="the model has 6 decoder blocks"):
        SCR(model, **given)


@pytest.mark.filterwarnings("ignore:4 sources are asked for, and 1 are used")
@pytest.mark.parametrize(
    ("side", "border", "fits"), [(1, True, False), (2, True, False), (3, True, True), (1, False, 1)]
)
def test_a_grid_without_an_inner_patch(side: int, border: bool, fits: int) -> None:
    """The grid of LLaVA-1.5 is known before any prefill, and so is K on it."""
    small: Any = make_tiny_llava(62, side=side)
    config = scr_config(exclude_border=border)
    for mode in ("two-pass", "uniform"):
        kind: Any = mode
        if fits:
            with torch.no_grad(), SCR(small, config=config, mode=kind) as scr:
                small(**make_inputs(small, [1]))
            assert len(scr.reports[0].sources) == 1
        else:
            with pytest.raises(errors.ConfigurationError, match=r"images of this model .*no patch off its border"):
                SCR(small, config=config, mode=kind)
    SCR(small, config=config, mode="off")


@pytest.mark.parametrize(
    ("changes", "asked"), [({"num_sources": 30}, 30), ({"source_fraction": 0.5}, 18), ({"num_sources": 8}, None)]
)
def test_fewer_sources_than_asked_for_are_a_warning_once(
    model: Any, changes: dict[str, Any], asked: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Of 6 x 6 patches 16 are off the border, and half of those can be sources."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scr = SCR(model, config=scr_config(**changes), mode="uniform")
        for _ in range(2):
            with torch.no_grad(), scr:
                model(**make_inputs(model, [1]))
        SCR(model, config=scr_config(**changes), mode="off")
    words = f"{asked} sources are asked for, and 8 are used for an image of 6 x 6 = 36 patches: at most half of"
    found = [str(one.message) for one in caught if one.filename == __file__]
    assert len(found) == (asked is not None) and all(one.startswith(words) for one in found)
    assert len(scr.reports[0].sources) == 8 and not caplog.records


def test_fewer_sources_are_logged_once_where_the_grid_is_the_images(caplog: pytest.LogCaptureFixture) -> None:
    tiny = TINY["qwen2-vl"]
    model = tiny.model(1)
    scr = SCR(model, config=scr_config(num_sources=1000), mode="uniform")
    for _ in range(2):
        with torch.no_grad(), scr:
            model(**tiny.prompt(model, [1]).inputs)
    logged = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(logged) == 1 and logged[0].startswith("1000 sources are asked for, and ")
    assert f", and {len(scr.reports[0].sources)} are used for an image of " in logged[0]


@pytest.mark.parametrize("name", ["chameleon", "internvl", "qwen-vl"])
def test_grids_of_other_families_with_one_grid(name: str) -> None:
    model = TINY[name].model(1)
    family = family_of(model)
    assert family.fixed_grid is not None
    assert family.fixed_grid(model, {}).grid == (6, 6)
    SCR(model, config=CONFIG, mode="two-pass")


def test_a_model_that_changes_between_making_and_attaching() -> None:
    """Depth, attention and grid are checked again at ``attach``, which leaves nothing then."""
    model: Any = make_tiny_llava(63)
    inputs = make_inputs(model, [1])
    with torch.no_grad():
        model(**inputs)
    scr = SCR(model, config=CONFIG, mode="two-pass")
    layers = model.model.language_model.layers
    kept = list(layers)
    del layers[4:]
    before = snapshot(model)
    with pytest.raises(errors.ConfigurationError, match="has 4 decoder blocks"):
        scr.attach()
    assert snapshot(model) == before
    layers.extend(kept[4:])
    before = snapshot(model)
    for _ in range(2):
        with torch.no_grad(), scr:
            model(**inputs)
        assert snapshot(model) == before


@pytest.mark.parametrize("mode", ["one-pass", "auto"])
def test_a_calibration_for_other_settings_is_a_warning(model: Any, mode: Any, tmp_path: Any) -> None:
    from scr_runtime import describe_model, save_predictor

    folder = save_predictor(tmp_path / "p", make_predictor(model), scr=CONFIG, model=describe_model(model))
    for changes in (
        {"num_sources": 5}, {"source_fraction": 0.1}, {"exclude_border": False}, {"connectivity": 4},
        {"suppress_claimed": True}, {"strength": 1.2}, {"edit_layers": (0, 3)}, {"attention_layers": (1, 3)},
    ):  # fmt: skip
        with pytest.warns(RuntimeWarning, match=f"calibrated with other settings: {next(iter(changes))} is"):
            SCR(model, config=scr_config(**changes), predictor=folder, mode=mode)
    SCR(model, config=scr_config(), predictor=folder, mode=mode)  # warnings are errors here
    for other in ("two-pass", "uniform"):
        kind: Any = other
        SCR(model, config=scr_config(num_sources=5), predictor=folder, mode=kind)


def test_a_state_layer_that_the_predictor_does_not_read(model: Any, tmp_path: Any) -> None:
    from scr_runtime import describe_model, save_predictor

    folder = save_predictor(tmp_path / "p", make_predictor(model), scr=CONFIG, model=describe_model(model))
    config = scr_config(state_layer=1, edit_layers=(1, 2))
    with pytest.raises(errors.PredictorMismatchError, match="state_layer is 1, the predictor reads block 0"):
        SCR(model, config=config, predictor=folder, mode="one-pass")
    with pytest.warns(RuntimeWarning, match="state_layer is 1"):
        assert SCR(model, config=config, predictor=folder, mode="auto").config is config


@pytest.mark.parametrize("values", [
    {"num_sources": 2.5}, {"num_sources": "5"}, {"num_sources": True}, {"num_sources": None},
    {"num_sources": math.nan},
    {"strength": "1.1"}, {"strength": math.nan}, {"strength": math.inf}, {"strength": None}, {"strength": True},
    {"edit_layers": (0.0, 2)}, {"edit_layers": "02"}, {"edit_layers": (2, 0)}, {"edit_layers": None},
    {"attention_layers": (2,)}, {"attention_layers": 4}, {"attention_layers": [[2], 4]}, {"exclude_border": "no"},
    {"exclude_border": 0}, {"exclude_border": []}, {"connectivity": 4.0}, {"connectivity": "8"}, {"connectivity": 6},
    {"source_fraction": "0.1"}, {"source_fraction": math.nan}, {"source_fraction": 0.6}, {"source_fraction": True},
    {"state_layer": 0.0}, {"state_layer": -1}, {"state_layer": None}, {"suppress_claimed": 1},
], ids=str)  # fmt: skip
def test_settings_of_another_type(values: dict[str, Any]) -> None:
    """R16: 2.5 sources were accepted, "5" was a TypeError."""
    with pytest.raises(errors.ConfigurationError, match=next(iter(values))):
        scr_config(**values)


# -- the decoder -----------------------------------------------------------------------------------------------------


def test_the_attention_modules_of_a_decoder(model: Any) -> None:
    blocks = model.model.language_model.layers
    for layer, block in enumerate(blocks):
        attention: Any = attention_of(block)
        assert attention is block.self_attn
        assert attention.layer_idx == layer
    assert attention_of(blocks[0].mlp) is None
    assert attention_configs(model, family_of(model)) == [model.model.language_model.config]


@pytest.mark.parametrize("damage", ["no attention", "another layer", "no interface"])
def test_a_decoder_whose_attention_can_not_be_read(damage: str) -> None:
    model: Any = make_tiny_llava(64)
    attention = model.model.language_model.layers[3].self_attn
    if damage == "no attention":
        model.model.language_model.layers[3].self_attn = torch.nn.Identity()
    elif damage == "another layer":
        attention.layer_idx = 2
    else:
        model.model.language_model.layers[3].self_attn = Attention(attention.config)
    for mode in ("two-pass", "auto"):
        kind: Any = mode
        with pytest.raises(errors.UnsupportedModelError, match=r"attention of block 3 .*mode='one-pass' or 'uniform'"):
            SCR(model, config=CONFIG, mode=kind, predictor=make_predictor(model))
    SCR(model, config=CONFIG, mode="uniform")
    SCR(model, config=scr_config(attention_layers=(1, 2)), mode="two-pass")  # block 3 is not read


class Attention(torch.nn.Module):
    """One that computes everything itself."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.layer_idx = config, 3
