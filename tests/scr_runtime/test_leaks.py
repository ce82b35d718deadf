"""What grows is bounded: caches by grid, registries, configs, memory; and nothing is reported that did not happen."""

from __future__ import annotations

import gc
import importlib
import os
import pkgutil
from pathlib import Path
from typing import Any

import pytest
import torch

import scr_runtime
from scr_runtime import SCR, SCRConfig, capture, errors
from tests.conftest import make_inputs, make_tiny_llava
from tests.scr_runtime.leftovers import snapshot
from tests.scr_runtime.reference import IMAGE_TOKEN, make_predictor, reference_logits
from tests.scr_runtime.test_families import every
from tests.scr_runtime.tiny_families import BEGIN, END, TINY, Tiny

CONFIG = SCRConfig(num_sources=5, strength=1.3, edit_layers=(0, 2), attention_layers=(2, 4))
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}


def caches() -> dict[str, Any]:
    """Every functools cache of the library, by name."""
    found: dict[str, Any] = {}
    for module in pkgutil.iter_modules(scr_runtime.__path__, "scr_runtime."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if hasattr(value, "cache_info") and value.__module__ == module.name:
                found[f"{module.name}.{name}"] = value
    return found


def picture(rows: int, columns: int, seed: int = 0) -> dict[str, Any]:
    """A Qwen2-VL prompt with an image of a given grid."""
    generator = torch.Generator().manual_seed(seed)
    ids = [1, 5, BEGIN, *[IMAGE_TOKEN] * (rows * columns), END, *range(10, 10 + 3 + seed % 5)]
    return {
        "input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "mm_token_type_ids": (torch.tensor([ids]) == IMAGE_TOKEN).long(),
        "pixel_values": torch.randn(4 * rows * columns, 96, generator=generator),
        "image_grid_thw": torch.tensor([[1, 2 * rows, 2 * columns]]),
    }  # fmt: skip


def test_every_cache_has_a_bound() -> None:
    """R18: features of places were kept for every grid that was ever seen."""
    unbounded = {name for name, cache in caches().items() if cache.cache_parameters()["maxsize"] is None}
    # of functions: those that wrap transformers' own, of which there are a handful, and one that takes nothing
    assert unbounded == {"scr_runtime.attention.wrapper", "scr_runtime.generate._generate_code"}
    assert len(caches()) > 8


def test_what_is_kept_of_many_grids_is_bounded() -> None:
    """R18: 300 grids; caches at their bounds, no tensor list grows in the predictor or the SCR."""
    model = TINY["qwen2-vl"].model(1)
    predictor = make_predictor(model, position="fourier")
    rule = importlib.import_module("scr_runtime.rule")
    for rows in range(3, 23):
        for columns in range(3, 18):
            predictor(torch.randn(1, rows * columns, 32), (rows, columns), torch.randn(1, 32))
            rule.source_rule(CONFIG, (rows, columns))
    for name, cache in caches().items():
        info = cache.cache_info()
        assert info.maxsize is None or info.currsize <= info.maxsize <= 256, name
    assert sum(isinstance(value, dict) and len(value) > 20 for value in vars(predictor).values()) == 0


def _resident() -> float:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["auto", "uniform"])
def test_memory_is_flat_over_prefills_of_changing_grids(mode: Any) -> None:
    """A few hundred prefills, with reports, sessions and generates among them."""
    model = TINY["qwen2-vl"].model(2)
    predictor = None if mode == "uniform" else make_predictor(model)
    sizes = [(rows, columns) for rows in range(3, 11) for columns in range(3, 11)]
    scr = SCR(model, config=CONFIG, mode=mode, predictor=predictor, threshold=0.5)
    with torch.no_grad(), scr:
        for turn in range(260):
            if turn == 100:  # all grids have been seen
                before = _resident()
            inputs = picture(*sizes[turn * 7 % len(sizes)], seed=turn)
            if turn % 50 == 0:
                model.generate(**inputs, **GREEDY)
                with scr.image(**inputs) as image:
                    image(**inputs)
                assert scr.reports
                assert scr.stats.prefills
            else:
                model(**inputs)
    assert _resident() - before < 15


def test_attaching_often_leaves_nothing() -> None:
    model: Any = make_tiny_llava(70)
    inputs = make_inputs(model, [1])
    with torch.no_grad():
        model(**inputs)
    before = snapshot(model)
    attention = importlib.import_module("scr_runtime.attention")
    for turn in range(30):
        modes: Any = ("two-pass", "uniform", "off")
        with torch.no_grad(), SCR(model, config=CONFIG, mode=modes[turn % 3]):
            model(**inputs)
        capture(model, CONFIG, inputs)
    assert snapshot(model) == before
    assert attention._HELD == {}
    from transformers import AttentionInterface

    names = {name for name in AttentionInterface._global_mapping if name.startswith("scr_")}
    assert "scr_sdpa" in names and len(names) < 4  # one per implementation, whatever was attached
    assert attention.wrapper.cache_info().currsize < 8
    runtime = importlib.import_module("scr_runtime.runtime")
    gc.collect()
    assert not [base for base, reference in runtime._ATTACHED.items() if reference() is None or base is model.model]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_configs_return_in_value_and_type(attn: str) -> None:
    """Also where the config holds no internal name, or a name that is a string of another type."""
    model: Any = make_tiny_llava(71, attn=attn)
    inputs = make_inputs(model, [1])
    values = model.model.language_model.config.__dict__
    before = dict(values), {key: type(value) for key, value in values.items()}, values["_attn_implementation_internal"]
    serialised = model.config.to_json_string(use_diff=False)
    with torch.no_grad(), SCR(model, config=CONFIG, mode="two-pass"):
        model(**inputs)
        assert model.config.to_json_string(use_diff=False) == serialised  # what a save writes while attached
    assert (dict(values), {key: type(value) for key, value in values.items()}) == before[:2]
    assert values["_attn_implementation_internal"] is before[2]


# -- reports ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["two-pass", "uniform", "one-pass"])
def test_an_image_of_one_patch(mode: Any) -> None:
    """R20: ln 1 is 0; its normalised entropy was NaN."""
    model: Any = make_tiny_llava(72, side=1)
    config = SCRConfig(num_sources=1, edit_layers=(0, 2), attention_layers=(2, 4), exclude_border=False)
    with torch.no_grad(), SCR(model, config=config, mode=mode, predictor=make_predictor(model)) as scr:
        model(**make_inputs(model, [2, 1]))
    assert [(r.entropy, r.entropy_normalised, r.sources, r.grid) for r in scr.reports] == [(0.0, 0.0, [0], (1, 1))] * 3


def test_a_prefill_that_raised_is_not_reported() -> None:
    """R20: neither as a report nor in the statistics, wherever it raised; the one before is still there."""
    model: Any = make_tiny_llava(73)
    first, second = make_inputs(model, [1], seed=1), make_inputs(model, [2], seed=2)
    blocks = model.model.language_model.layers

    def fail(*_: Any) -> None:
        raise RuntimeError("no")

    places: list[Any] = [model.lm_head, model.model.language_model.norm, *blocks, model.model.vision_tower]
    with torch.no_grad(), SCR(model, config=CONFIG, mode="two-pass") as scr:
        for place in places:
            hook = place.register_forward_hook(fail)
            with pytest.raises(RuntimeError, match="no"):
                model(**second)
            hook.remove()
            assert (scr.reports, scr.stats.prefills, scr.stats.images) == ([], 0, 0)
        model(**first)
        reports, stats = scr.reports, scr.stats
        for place in places:
            hook = place.register_forward_hook(fail)
            with pytest.raises(RuntimeError, match="no"):
                model(**second)
            with pytest.raises(RuntimeError, match="no"):
                model.generate(**second, **GREEDY)
            hook.remove()
            assert (scr.reports, scr.stats) == (reports, stats)
        broken = second | {
            "input_ids": second["input_ids"][:, :-9],
            "attention_mask": second["attention_mask"][:, :-9],
        }
        with pytest.raises((errors.SCRError, ValueError)):
            model(**broken)
        assert (scr.reports, scr.stats) == (reports, stats)


# -- beams -----------------------------------------------------------------------------------------------------------

MANY: list[dict[str, Any]] = [
    {"num_beams": 3, "do_sample": False},
    {"num_beams": 4, "num_return_sequences": 2, "do_sample": False},
    {"num_return_sequences": 3, "do_sample": True},
    {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
]


@every([TINY[name] for name in ("llava", "llava-next", "qwen2-vl", "chameleon", "internvl")])
@pytest.mark.parametrize("options", MANY[:2], ids=["beams", "returned"])
def test_one_report_and_count_per_image_of_the_prompt(tiny: Tiny, options: dict[str, Any]) -> None:
    """R20: a beam or a returned sequence was counted as an image."""
    model = tiny.model(5)
    prompt = tiny.prompt(model, [2, 1], seed=5)
    with SCR(model, config=CONFIG, mode="two-pass") as scr:
        model.generate(**prompt.inputs, max_new_tokens=2, do_sample=False)
        expected, images = scr.reports, scr.stats.images
        assert images == len(prompt.images) == len(expected)
        model.generate(**prompt.inputs, max_new_tokens=2, **options)
        assert [(r.sources, r.grid) for r in scr.reports] == [(r.sources, r.grid) for r in expected]
        assert scr.stats.images == scr.stats.two_pass == 2 * images


@pytest.mark.parametrize("mode", ["uniform", "one-pass", "auto"])
@pytest.mark.parametrize("options", MANY, ids=["beams", "returned", "sampled", "both"])
@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
def test_counts_of_beams_in_every_mode(mode: Any, options: dict[str, Any], cached: bool) -> None:
    model: Any = make_tiny_llava(74)
    inputs = make_inputs(model, [2, 1], seed=74)
    scr = SCR(model, config=CONFIG, mode=mode, predictor=make_predictor(model), threshold=0.6)
    torch.manual_seed(0)
    with scr:
        model.generate(**inputs, max_new_tokens=3, use_cache=cached, bad_words_ids=[[IMAGE_TOKEN]], **options)
        assert (len(scr.reports), scr.stats.images) == (3, 3)
        assert scr.stats.one_pass + scr.stats.two_pass + scr.stats.uniform == 3
        assert scr.stats.prefills == (1 if cached else 3)


@pytest.mark.parametrize("seed", range(12))
def test_uniform_is_equal_over_beams(seed: int) -> None:
    """R10: each beam drew for itself, so that cached and uncached beams differed in 5 of 12 prompts."""
    model: Any = make_tiny_llava(75)
    inputs = make_inputs(model, [1, 2][: 1 + seed % 2], seed=seed)
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False}
    found: list[Any] = []
    for cached in (True, False):
        with SCR(model, config=CONFIG, mode="uniform", seed=seed) as scr:
            tokens = model.generate(**inputs, **options, use_cache=cached)
            found.append((tokens.tolist(), [report.sources for report in scr.reports]))
            assert scr._last is not None
            assert scr._last.choice is not None
            (choice,) = scr._last.choice
            rows = choice.sources.view(len(inputs["input_ids"]), 3, -1) if len(inputs["input_ids"]) == 1 else None
            assert rows is None or bool((rows == rows[:, :1]).all())
    assert found[0] == found[1]
    with torch.no_grad(), SCR(model, config=CONFIG, mode="uniform", seed=seed) as scr:
        logits = model(**inputs).logits
    assert [report.sources for report in scr.reports] == found[0][1]
    kept = inputs["attention_mask"].bool()
    expected, _ = reference_logits(model, inputs, CONFIG, found[0][1])
    assert torch.allclose(logits[kept], expected[kept], atol=1e-4, rtol=0)
