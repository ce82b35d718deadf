from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from data.chat import chat_inputs
from playground.engine import Engine
from playground.server import Place
from playground.settings import Ask
from scr_runtime import SCR
from scr_runtime.errors import ConfigurationError
from tests.playground.conftest import CONFIG, QUESTION


def ask(**changes: Any) -> Ask:
    plain = {"picture": "0", "question": QUESTION, "strength": 1.1, "num_sources": 8, "edit_layers": (0, 2),
             "attention_layers": (2, 4), "threshold": 0.6}  # fmt: skip
    return Ask(**{**plain, **changes})


def test_maps_sources_and_answers_are_those_of_the_runtime(place: Place):
    engine, picture = place.engine, place.picture("0")
    found = engine.look(picture, ask())
    (grid,) = found["grids"]
    assert [answer["mode"] for answer in found["answers"]] == ["vanilla", "two-pass", "one-pass", "auto"]
    inputs = chat_inputs(engine.processor, [picture], [QUESTION])
    for answer, mode in zip(found["answers"][1:3], ("two-pass", "one-pass"), strict=True):
        with SCR(engine.model, config=CONFIG, predictor=engine.predictor, mode=mode) as scr:
            tokens = engine.model.generate(**inputs, max_new_tokens=12, do_sample=False)
        (report,) = scr.reports
        assert grid["sources"][mode] == report.sources
        assert grid["entropy"] == pytest.approx(report.entropy, rel=1e-5)
        said = engine.processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer["text"] == said.strip() and 0.5 < answer["yes"] + answer["no"] <= 1.0001
        if mode == "one-pass":
            assert grid["confidence"] == pytest.approx(report.confidence, rel=1e-5)
    assert sum(grid["attention"]) == pytest.approx(1) and sum(grid["predicted"]) == pytest.approx(1)
    assert grid["overlap"] == len(set(grid["sources"]["two-pass"]) & set(grid["sources"]["one-pass"]))
    neighbours = [patch for owned in grid["owned"]["two-pass"] for patch in owned]
    assert len(neighbours) == len(set(neighbours)) and not set(neighbours) & set(grid["sources"]["two-pass"])


def test_settings_take_effect_and_auto_says_why(place: Place):
    picture = place.picture("1")
    low = place.engine.look(picture, ask(threshold=0.0, num_sources=5))
    high = place.engine.look(picture, ask(threshold=1.0, strength=1.4))
    assert len(low["grids"][0]["sources"]["two-pass"]) == 5
    assert low["answers"][3]["why"].startswith("the predictor chose: confidence")
    assert "is under the threshold 1.000" in high["answers"][3]["why"]
    assert high["answers"][3]["yes"] == high["answers"][1]["yes"] != high["answers"][0]["yes"]
    assert any("calibrated with other settings" in note for note in low["notes"])
    with pytest.raises(ConfigurationError, match="ends at block 8, but the model has 8"):
        place.engine.look(picture, ask(edit_layers=(0, 8)))


def test_k_is_the_predictors_share_of_the_patches_until_it_is_chosen(place: Place):
    engine = Engine(place.engine.model, place.engine.processor, replace(CONFIG, source_fraction=0.1), None)
    as_fitted, chosen = (engine.settings(ask(num_sources=number)) for number in (None, 5))
    assert (as_fitted.num_sources, as_fitted.source_fraction) == (8, 0.1)
    assert (chosen.num_sources, chosen.source_fraction) == (5, None)
    (grid,) = engine.look(place.picture("0"), ask(num_sources=None))["grids"]
    assert len(grid["sources"]["two-pass"]) == 14 and grid["most_sources"] == 50  # a tenth of 12 x 12; and the most


def test_a_caption_has_no_yes_and_costs_are_ratios_to_vanilla(place: Place):
    caption = place.engine.look(place.picture("0"), ask(question="Describe the image.", caption=True))
    assert len(caption["answers"][0]["text"].split()) > 5 and "yes" not in caption["answers"][0]
    costs = place.engine.cost(place.picture("0"), ask())
    assert [one["mode"] for one in costs] == place.engine.modes
    assert costs[0]["ratio"] == 1 and costs[0]["added"] == 0 and all(one["milliseconds"] > 0 for one in costs)


def test_without_a_predictor_two_modes_are_left(loaded: tuple[Any, Any], place: Place):
    engine = Engine(*loaded, CONFIG, None)
    found = engine.look(place.picture("0"), ask())
    assert [answer["mode"] for answer in found["answers"]] == ["vanilla", "two-pass"] == engine.modes
    assert "predicted" not in found["grids"][0] and "one-pass" not in found["grids"][0]["sources"]
