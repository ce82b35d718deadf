"""Hot swap: another predictor in the place of the one in use, between prefills."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from scr_runtime import SCR, SCRConfig, SourcePredictor, describe_model, errors, load_predictor, save_predictor
from tests.scr_runtime.reference import make_predictor

CONFIG = SCRConfig(num_sources=4, edit_layers=(0, 2), attention_layers=(2, 4))


def saved(path: Path, model: Any, seed: int, scr: SCRConfig = CONFIG, threshold: float = 0.0) -> Path:
    predictor = make_predictor(model, seed)
    predictor.set_calibration(torch.tensor([0.0, 1.0]), torch.tensor([seed / 10, seed / 10 + 0.05]), threshold)
    return save_predictor(path, predictor, scr=scr, model=describe_model(model))


@pytest.fixture
def model(tiny_llava: Any) -> Any:
    return tiny_llava(0)


@pytest.fixture
def two(tmp_path: Path, model: Any) -> tuple[Path, Path]:
    return saved(tmp_path / "a", model, 1), saved(tmp_path / "b", model, 5)


def answers(model: Any, inputs: Any, folder: Path) -> tuple[list[int], torch.Tensor]:
    with torch.no_grad(), SCR(model, predictor=folder, mode="one-pass") as scr:
        logits = model(**inputs).logits
        return scr.reports[0].sources, logits


def test_the_next_prefill_asks_the_new_one(model: Any, llava_inputs: Any, two: tuple[Path, Path]) -> None:
    inputs = llava_inputs(model, [1])
    expected = [answers(model, inputs, folder) for folder in two]
    assert expected[0][0] != expected[1][0]
    with torch.no_grad(), SCR(model, predictor=two[0], mode="one-pass") as scr:
        first = model(**inputs).logits
        before = scr.reports[0]
        scr.load(two[1])
        assert scr.reports == [before]  # of the prefill before: judged by the predictor that was asked
        second = model(**inputs).logits
        after = scr.reports[0]
        assert torch.equal(first, expected[0][1]) and torch.equal(second, expected[1][1])
        assert 0.1 <= (before.confidence or 0) <= 0.15 and 0.5 <= (after.confidence or 0) <= 0.55
        assert scr.stats.mean_confidence == pytest.approx(((before.confidence or 0) + (after.confidence or 0)) / 2)
        scr.load(load_predictor(two[0]))
        assert torch.equal(model(**inputs).logits, expected[0][1])


def test_a_failing_load_leaves_the_old_one(
    model: Any, tiny_llava: Any, llava_inputs: Any, two: tuple[Path, Path], tmp_path: Path
) -> None:
    inputs = llava_inputs(model, [1])
    expected = answers(model, inputs, two[0])[1]
    later = SCRConfig(num_sources=4, edit_layers=(1, 2), attention_layers=(2, 4), state_layer=1)
    (two[1] / "model.safetensors").write_bytes(b"\0" * 100)
    other = saved(tmp_path / "other", tiny_llava(1), 3)
    bad = [(two[1], errors.PredictorCorruptError), (tmp_path / "none", errors.PredictorNotFoundError),
           (saved(tmp_path / "later", model, 3, later), errors.PredictorMismatchError),
           (other, errors.PredictorMismatchError), (None, errors.ConfigurationError)]  # fmt: skip
    with torch.no_grad(), SCR(model, predictor=two[0], mode="one-pass") as scr:
        was = repr(scr)
        for place, error in bad:
            with pytest.raises(error):
                scr.load(place)  # type: ignore[arg-type]
            assert torch.equal(model(**inputs).logits, expected) and repr(scr) == was
    with SCR(model, config=CONFIG, mode="two-pass") as scr, pytest.raises(errors.ConfigurationError, match="two-pass"):
        scr.load(two[0])


def test_thresholds_and_settings(model: Any, llava_inputs: Any, tmp_path: Path, two: tuple[Path, Path]) -> None:
    sure = saved(tmp_path / "sure", model, 5, threshold=0.9)
    with pytest.warns(RuntimeWarning, match="every prefill runs two-pass"):
        scr = SCR(model, config=CONFIG, predictor=tmp_path / "none", mode="auto")
    with torch.no_grad(), scr:
        for place, provider in ((two[0], "one-pass"), (sure, "two-pass"), (two[1], "one-pass")):
            scr.load(place)
            model(**llava_inputs(model, [1]))
            assert scr.reports[0].provider == provider
    with torch.no_grad(), SCR(model, predictor=two[0], mode="auto", threshold=0.2) as scr:
        scr.load(sure)
        model(**llava_inputs(model, [1]))
        assert scr.reports[0].provider == "one-pass"  # the threshold that was given holds
        stronger = saved(
            tmp_path / "stronger", model, 2, SCRConfig(num_sources=3, edit_layers=(0, 2), attention_layers=(2, 4))
        )
        with pytest.warns(RuntimeWarning, match="num_sources is 4, was 3"):
            scr.load(stronger)
        assert scr.config == CONFIG


def test_calls_in_other_threads_ask_one_of_them(model: Any, llava_inputs: Any, two: tuple[Path, Path]) -> None:
    inputs = llava_inputs(model, [1])
    expected = [answers(model, inputs, folder)[1] for folder in two]
    predictors: list[SourcePredictor] = [load_predictor(folder) for folder in two]
    wrong: list[str] = []
    seen: set[int] = set()

    def ask() -> None:
        for _ in range(40):
            with torch.no_grad():
                logits = model(**inputs).logits
            which = [index for index, one in enumerate(expected) if torch.equal(one, logits)]
            seen.update(which)
            if len(which) != 1:
                wrong.append("a mixture")

    with SCR(model, predictor=two[0], mode="one-pass") as scr:
        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            for predictor in (predictors[1], predictors[0]):
                scr.load(predictor)
        for thread in threads:
            thread.join()
    assert not wrong and seen
