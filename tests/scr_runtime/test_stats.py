"""Statistics on tiny models."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from scr_runtime import SCR, SCRConfig, SCRStats
from tests.scr_runtime.reference import make_predictor

CONFIG = SCRConfig(num_sources=5, strength=1.3, edit_layers=(0, 2), attention_layers=(2, 4))


def test_stats_add_up_the_reports(tiny_llava: Any, llava_inputs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scr_runtime.stats._KEPT_PREFILLS", 3)  # sums on the device are merged on the way
    model = tiny_llava(1)
    predictor = make_predictor(model)
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
    with SCR(model, config=CONFIG, mode="one-pass", predictor=make_predictor(model)) as scr:
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
    with torch.no_grad(), SCR(model, config=CONFIG, mode="one-pass", predictor=make_predictor(model)) as scr:

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
    found = {round(stats.mean_confidence, 6) for stats in seen if stats.mean_confidence is not None}
    assert len(found) == 1  # one image, one confidence


def test_stats_can_be_read_and_continued_across_inference_mode(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(1)
    inputs = llava_inputs(model, [1])
    with SCR(model, config=CONFIG, mode="one-pass", predictor=make_predictor(model)) as scr:
        for context in (torch.inference_mode, torch.no_grad, torch.inference_mode):
            with context():
                model(**inputs)
            assert scr.stats.mean_confidence is not None
    assert scr.stats.images == 3


def test_one_of_a_kind_is_singular() -> None:
    assert "1 image (1 online)" in repr(SCRStats(prefills=1, images=1, online=1))
    assert repr(SCRStats(prefills=1, images=1, edits=1)) == "<SCRStats: 1 prefill, 1 image, 1 edited block output>"
    assert repr(SCRStats(prefills=2, images=0, edits=6)) == "<SCRStats: 2 prefills, 0 images, 6 edited block outputs>"
