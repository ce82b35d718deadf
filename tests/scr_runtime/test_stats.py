"""Statistics, log and drift guard on tiny models."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from scr_runtime import SCR, PredictorConfig, SCRConfig, SCRStats, SourcePredictor, load_predictor, save_predictor

CONFIG = SCRConfig(num_sources=5, strength=1.3, edit_layers=(0, 2), attention_layers=(2, 4))


def make_predictor(**changes: Any) -> SourcePredictor:
    torch.manual_seed(0)
    return SourcePredictor(PredictorConfig(32, rank=8, width=16, **changes)).eval().requires_grad_(False)


def spreads(model: Any, predictor: SourcePredictor, inputs: dict[str, Tensor]) -> list[float]:
    """Of each image's features, by a guard that never trips."""
    predictor.set_drift(1e-6, 1e30)
    with torch.no_grad(), SCR(model, config=CONFIG, mode="one-pass", predictor=predictor) as scr:
        model(**inputs)
    return [1e-6 * (report.drift or 0.0) for report in scr.reports]


# -- statistics ------------------------------------------------------------------------------------------------------


def test_stats_add_up_what_the_reports_tell(
    tiny_llava: Any, llava_inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scr_runtime.stats._KEPT_PREFILLS", 3)  # sums on the device are merged on the way
    model, predictor = tiny_llava(1), make_predictor()
    threshold = 0.0
    for mode in ("one-pass", "auto", "two-pass", "uniform"):
        scr = SCR(model, config=CONFIG, mode=mode, predictor=predictor, threshold=threshold)
        assert scr.stats == SCRStats()
        reports = []
        with torch.no_grad(), scr:
            for seed in range(8):
                model(**llava_inputs(model, [1, 2] if seed % 2 else [1], seed=seed))
                reports += scr.reports
        stats = scr.stats
        assert (stats.prefills, stats.images, stats.edits) == (8, 16, 24)
        counts = {"one-pass": stats.one_pass, "two-pass": stats.two_pass, "uniform": stats.uniform}
        for name, count in counts.items():
            assert count == sum(report.provider == name for report in reports)
        fell_back = sum(report.fallback_reason is not None for report in reports)
        assert stats.fallbacks == {"low confidence": fell_back, "drift": 0, "not finite": 0, "no predictor": 0}
        if mode == "auto":
            assert 0 < fell_back < 16
        sure = [report.confidence for report in reports if report.confidence is not None]
        assert stats.mean_confidence == (pytest.approx(sum(sure) / len(sure)) if sure else None)
        threshold = sorted(sure)[8] if sure else 0.0  # of the next mode: half of the images fall back
        scr.reset_stats()
        assert scr.stats == SCRStats()


def test_an_uncached_generate_chooses_once_and_edits_at_each_step(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(1)
    inputs = llava_inputs(model, [1, 1])
    with SCR(model, config=CONFIG, mode="one-pass", predictor=make_predictor()) as scr:
        model.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=False)
        assert (scr.stats.prefills, scr.stats.images, scr.stats.edits) == (4, 2, 12)
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert (scr.stats.prefills, scr.stats.images, scr.stats.edits) == (5, 4, 15)


def test_a_prefill_that_raises_does_not_count(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(1)

    def explode(*_: Any) -> None:
        raise FloatingPointError("inside block 4")

    model.model.language_model.layers[4].register_forward_hook(explode)
    with SCR(model, config=CONFIG, mode="two-pass") as scr, pytest.raises(FloatingPointError), torch.no_grad():
        model(**llava_inputs(model, [1]))
    assert scr.stats == SCRStats()


def test_another_thread_may_read(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(1)
    inputs = llava_inputs(model, [1])
    seen: list[SCRStats] = []
    done = threading.Event()
    with torch.no_grad(), SCR(model, config=CONFIG, mode="one-pass", predictor=make_predictor()) as scr:

        def watch() -> None:
            while not done.is_set():
                seen.append(scr.stats)

        thread = threading.Thread(target=watch)
        thread.start()
        for _ in range(30):
            model(**inputs)
        done.set()
        thread.join()
        seen.append(scr.stats)
    assert [stats.prefills for stats in seen] == sorted(stats.prefills for stats in seen)
    assert all(stats.images == stats.one_pass == stats.prefills for stats in seen)
    assert seen[-1].prefills == 30
    told = {round(stats.mean_confidence, 6) for stats in seen if stats.mean_confidence is not None}
    assert len(told) == 1  # one image, one confidence


def test_stats_can_be_read_and_continued_across_inference_mode(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(1)
    inputs = llava_inputs(model, [1])
    with SCR(model, config=CONFIG, mode="one-pass", predictor=make_predictor()) as scr:
        for context in (torch.inference_mode, torch.no_grad, torch.inference_mode):
            with context():
                model(**inputs)
            assert scr.stats.mean_confidence is not None
    assert scr.stats.images == 3


# -- the log ---------------------------------------------------------------------------------------------------------


def test_the_log(tiny_llava: Any, llava_inputs: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, predictor = tiny_llava(2), make_predictor()
    inputs = llava_inputs(model, [1, 1])
    predictor.set_drift(1e-3, 1.5)
    with caplog.at_level(logging.DEBUG, logger="scr_runtime"), torch.no_grad():
        with SCR(model, config=CONFIG, mode="auto", predictor=predictor, threshold=0.0):
            model(**inputs)
            model(**inputs)
        drift = [(record.levelname, record.getMessage()) for record in caplog.records]
        caplog.clear()
        with pytest.warns(RuntimeWarning, match="not usable"):
            scr = SCR(model, config=CONFIG, mode="auto")
        with scr:
            model(**inputs)
        without = [(record.levelname, record.getMessage()) for record in caplog.records]
        caplog.clear()
        with SCR(model, config=CONFIG, mode="auto", predictor=make_predictor(), threshold=2.0):
            model(**inputs)
        low = [(record.levelname, record.getMessage()) for record in caplog.records]
    prefill = ("DEBUG", "prefill of 2 images: 2 two-pass; 3 blocks edited")
    assert drift[0][0] == "INFO"
    assert "attached to LlavaForConditionalGeneration (llava): mode auto, blocks 0-2, 5 sources" in drift[0][1]
    assert [level for level, _ in drift] == ["INFO", "WARNING", "DEBUG", "DEBUG"]  # the warning comes once
    assert "is over the limit 1.50" in drift[1][1]
    assert drift[2] == drift[3] == prefill
    assert [level for level, _ in without] == ["WARNING", "INFO", "DEBUG"]
    assert [level for level, _ in low] == ["INFO", "DEBUG"]  # low confidence is daily business


# -- the drift guard -------------------------------------------------------------------------------------------------


def test_auto_falls_back_over_the_limit_and_one_pass_tells(tiny_llava: Any, llava_inputs: Any) -> None:
    model, predictor = tiny_llava(3), make_predictor()
    inputs = llava_inputs(model, [1, 1, 1], seed=3)
    found = spreads(model, predictor, inputs)
    middle = sorted(found)[1]
    predictor.set_drift(middle, max(found[index] / middle for index in range(3)) - 1e-3)
    expected = [max(value / middle, middle / value) for value in found]
    limit = predictor.drift_limit or 0.0
    far = [value > limit for value in expected]
    assert 1 <= sum(far) <= 2
    with torch.no_grad():
        with SCR(model, config=CONFIG, mode="one-pass", predictor=predictor) as scr:
            model(**inputs)
        assert [report.drift for report in scr.reports] == pytest.approx(expected)
        assert [report.provider for report in scr.reports] == ["one-pass"] * 3
        assert scr.stats.drifted == sum(far)
        with SCR(model, config=CONFIG, mode="auto", predictor=predictor, threshold=0.0) as scr:
            model(**inputs)
    assert [report.provider == "two-pass" for report in scr.reports] == far
    assert [report.drift for report in scr.reports] == pytest.approx(expected)
    assert scr.stats.fallbacks["drift"] == scr.stats.drifted == sum(far)
    first = far.index(True)
    told = f"drift {expected[first]:.2f} is over the limit {limit:.2f}: the features are unlike those of the fit"
    assert scr.reports[first].fallback_reason == told


@pytest.mark.parametrize("factor", [0.0, float("nan"), float("inf")])
def test_dead_and_broken_features_are_drift_without_end(factor: float) -> None:
    predictor = make_predictor(position="none")
    assert predictor.drift(torch.tensor([factor])).tolist() == [1.0]  # no guard
    predictor.set_drift(0.7, 2.0)
    assert predictor.drift(torch.tensor([factor, 0.7, 1.4, 0.35])).tolist() == [float("inf"), 1.0, 2.0, 2.0]
    states = torch.randn(1, 36, 32) * factor
    spread = predictor.score_and_spread(states, (6, 6), torch.zeros(1, 32))[1]
    if factor == factor and factor != 0:
        assert not spread.isfinite().any()
    for typical, limit in ((0.0, 2.0), (1.0, 0.5), (float("nan"), 2.0), (1.0, float("inf"))):
        with pytest.raises(ValueError, match="expected a spread over 0"):
            predictor.set_drift(typical, limit)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_16_bit_activations_are_judged_in_float32(dtype: torch.dtype) -> None:
    predictor = make_predictor()
    states = (torch.randn(2, 36, 32) * 3000 + 20000).to(dtype)  # their squares overflow float16
    mean, std = states.float().mean((0, 1)), states.float().std((0, 1))
    predictor.set_statistics(mean, std, torch.zeros(32), torch.ones(32))
    question = torch.randn(2, 32)
    scores, spread = predictor.score_and_spread(states, (6, 6), question)
    plain = make_predictor()
    expected = plain.score_and_spread((states.float() - mean) / std, (6, 6), question)[1]
    assert scores.dtype == spread.dtype == torch.float32
    assert torch.equal(scores, predictor(states, (6, 6), question))
    assert torch.allclose(spread, expected, rtol=1e-3)


def test_the_fold_follows_the_weights() -> None:
    predictor = make_predictor()
    states, question = torch.randn(1, 36, 32), torch.randn(1, 32)
    first = predictor(states, (6, 6), question)
    assert predictor._fold() is predictor._fold()
    predictor.set_statistics(torch.ones(32), torch.ones(32) * 2, torch.zeros(32), torch.ones(32))
    second = predictor(states, (6, 6), question)
    assert torch.allclose(second, make_predictor()((states - 1) / 2, (6, 6), question), atol=1e-5)
    with torch.no_grad():
        predictor.project.weight.mul_(2)
    assert not torch.equal(second, predictor(states, (6, 6), question))
    predictor.load_state_dict(make_predictor().state_dict())
    assert torch.equal(first, predictor(states, (6, 6), question))
    with torch.inference_mode():
        inside = make_predictor()  # inference tensors have no version: never kept
        assert torch.equal(inside(states, (6, 6), question), first)
        assert inside._kept_fold is None


def test_the_guard_travels_with_the_folder(tmp_path: Any) -> None:
    predictor = make_predictor()
    save = {"scr": CONFIG, "model": {"family": "llava"}}
    assert load_predictor(save_predictor(tmp_path / "a", predictor, **save)).drift_limit is None
    predictor.set_drift(0.5, 1.7)
    loaded = load_predictor(save_predictor(tmp_path / "b", predictor, **save))
    assert (loaded.drift_typical, loaded.drift_limit) == (0.5, 1.7)
