"""Who chooses the sources: the predictor, the diagnostic run, both, or a draw."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from scr_runtime import SCR, PredictorConfig, SCRConfig, SourcePredictor, errors
from scr_runtime import sources as providers
from scr_runtime.config import Mode
from tests.scr_runtime.reference import (
    kept,
    make_predictor,
    reference_logits,
    reference_maps,
    reference_sources,
)
from tests.scr_runtime.test_families import every, logits_of
from tests.scr_runtime.tiny_families import Tiny

CONFIG = SCRConfig(num_sources=5, strength=1.3, edit_layers=(0, 2), attention_layers=(2, 4))


def test_auto_diagnoses_the_rows_of_low_confidence_and_only_them(
    tiny_llava: Any, llava_inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llava(12)
    predictor = make_predictor(model)
    inputs = llava_inputs(model, [1, 1, 1], seed=12)
    with torch.no_grad():
        with SCR(model, config=CONFIG, mode="one-pass", predictor=predictor) as scr:
            model(**inputs)
        sure = [report.confidence for report in scr.reports]
        threshold = sorted(value for value in sure if value is not None)[1]  # the lowest of three is under it
        low = sure.index(min(sure))  # type: ignore[type-var]
        batches: list[int] = []
        block = model.model.language_model.layers[1]
        forward = block.forward

        def spy(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            batches.append(len(hidden))
            return forward(hidden, *args, **kwargs)

        monkeypatch.setattr(block, "forward", spy)
        with SCR(model, config=CONFIG, mode="auto", predictor=predictor, threshold=threshold) as scr:
            logits = model(**inputs).logits
        assert batches == [1, 3]  # the nested run of one row, then the pass itself
        monkeypatch.undo()
        assert [report.provider == "two-pass" for report in scr.reports] == [row == low for row in range(3)]
        assert "under the threshold" in str(scr.reports[low].fallback_reason)
        truth = reference_maps(model, inputs, CONFIG, inputs["input_ids"].shape[1])
        assert scr.reports[low].sources == reference_sources(truth[low], CONFIG)
        expected, _ = reference_logits(model, inputs, CONFIG, [report.sources for report in scr.reports])
    assert torch.allclose(kept(inputs, logits), kept(inputs, expected), atol=1e-4, rtol=0)


def test_auto_at_both_ends_is_one_pass_and_two_pass(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(13)
    predictor = make_predictor(model)
    inputs = llava_inputs(model, [1, 2], seed=13)

    def logits(mode: Any, **kwargs: Any) -> Tensor:
        with torch.no_grad(), SCR(model, config=CONFIG, predictor=predictor, mode=mode, **kwargs):
            return model(**inputs).logits

    assert torch.equal(logits("auto", threshold=0.0), logits("one-pass"))
    assert torch.equal(logits("auto", threshold=1.1), logits("two-pass"))


def test_uniform_is_seeded_and_stays_off_the_border(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(14)
    inputs = llava_inputs(model, [1], seed=14)

    def draws(seed: int) -> list[list[int]]:
        found = []
        with torch.no_grad(), SCR(model, config=CONFIG, mode="uniform", seed=seed) as scr:
            for _ in range(20):
                model(**inputs)
                found.append(scr.reports[0].sources)
        return found

    first = draws(0)
    assert first == draws(0) != draws(1)
    assert len({tuple(sources) for sources in first}) == 20
    used = {patch for sources in first for patch in sources}
    assert used == {row * 6 + column for row in range(1, 5) for column in range(1, 5)}


APART = SCRConfig.from_dict(CONFIG.to_dict() | {"suppress_claimed": True})


@pytest.mark.parametrize("mode", ["one-pass", "auto", "uniform"])
def test_sources_stay_apart_in_every_mode(tiny_llava: Any, llava_inputs: Any, mode: Any) -> None:
    model = tiny_llava(4)
    predictor = make_predictor(model)
    predictor.set_calibration(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]), 0.0, temperature=0.3)
    inputs = llava_inputs(model, [2, 1], seed=4)
    found: dict[bool, Any] = {}
    for config in (CONFIG, APART):
        with torch.no_grad(), SCR(model, config=config, mode=mode, predictor=predictor, seed=1) as scr:
            logits = model(**inputs).logits
        assert scr._last is not None
        assert scr._last.choice is not None
        scores = torch.cat([choice.scores.scores for choice in scr._last.choice])
        chosen = [report.sources for report in scr.reports]
        assert chosen == [reference_sources(row, config) for row in scores]
        expected, _ = reference_logits(model, inputs, config, chosen)
        assert torch.allclose(kept(inputs, logits), kept(inputs, expected), atol=1e-4, rtol=0)
        for row, report in zip(scores, scr.reports, strict=True):
            if mode == "uniform":
                assert report.confidence is None
                continue
            further = reference_sources(row, config, k=CONFIG.num_sources + 1)  # and the one that would come next
            cut = row[further[-2:]].mean()
            sure = torch.sigmoid((row[further[:-1]] - cut) / 0.3).mean()
            assert report.confidence == pytest.approx(float(sure), abs=1e-5)
        found[config.suppress_claimed] = chosen
    assert found[True] != found[False]


@every()
def test_auto_diagnoses_one_row_of_three_exactly(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows: in M-RoPE families, position ids are [3, 3, S] then, and no shape shows where the rows are."""
    model = tiny.model(4)
    prompt = tiny.prompt(model, [1, 1, 1], seed=4)
    predictor = make_predictor(model)
    _, scr = logits_of(model, prompt, mode="one-pass", predictor=predictor)
    sure = [report.confidence for report in scr.reports]
    low = prompt.images[sure.index(min(sure))].row
    threshold = sorted(sure)[1]
    _, truth = logits_of(model, prompt, mode="two-pass")

    batches: list[int] = []
    blocks = scr._blocks
    forward = blocks[1].forward
    monkeypatch.setattr(blocks[1], "forward", lambda *a, **k: batches.append(len(a[0])) or forward(*a, **k))
    _, scr = logits_of(model, prompt, mode="auto", predictor=predictor, threshold=threshold)
    monkeypatch.undo()
    assert batches == [1, 3]  # the nested run of one row, then the pass itself
    for image, mine, full in zip(prompt.images, scr.reports, truth.reports, strict=True):
        if mine.provider == "two-pass":
            assert image.row == low
            assert mine.sources == full.sources
    assert "two-pass" in {report.provider for report in scr.reports}


def spreads(model: Any, predictor: SourcePredictor, inputs: dict[str, Tensor]) -> list[float]:
    """Of each image's features, by a guard that never trips."""
    predictor.set_drift(1e-6, 1e30)
    with torch.no_grad(), SCR(model, config=CONFIG, mode="one-pass", predictor=predictor) as scr:
        model(**inputs)
    return [1e-6 * (report.drift or 0.0) for report in scr.reports]


def test_auto_falls_back_over_the_limit_and_one_pass_reports_it(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(3)
    predictor = make_predictor(model)
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
    reason = f"drift {expected[first]:.2f} is over the limit {limit:.2f}: the features are unlike those of the fit"
    assert scr.reports[first].fallback_reason == reason


class Broken(SourcePredictor):
    """Returns NaN for one patch."""

    def forward(self, states: Tensor, grid: Any, question: Tensor | None = None) -> Tensor:
        scores = super().forward(states, grid, question)
        scores[0, 7] = float("nan")
        return scores


def test_non_finite_scores(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(22)
    inputs = llava_inputs(model, [1, 1], seed=22)
    broken = Broken(PredictorConfig(32, rank=4))
    with (
        torch.no_grad(),
        SCR(model, config=CONFIG, mode="one-pass", predictor=broken),
        pytest.raises(errors.NonFiniteScoresError, match="NaN"),
    ):
        model(**inputs)
    with torch.no_grad(), SCR(model, config=CONFIG, mode="auto", predictor=broken) as scr:
        model(**inputs)
    assert [report.provider for report in scr.reports] == ["two-pass", "one-pass"]
    assert scr.reports[0].fallback_reason == "the predictor's scores are not finite"


def test_every_mode_has_its_provider(tiny_llava: Any) -> None:
    predictor = make_predictor(tiny_llava(1))
    for mode in get_args(Mode):
        provider = providers.provider_of(mode, predictor, None, 0.5, 0)
        stands_in = providers.provider_of(mode, None, "it is broken", 0.5, 0)
        name = {"one-pass": "predicted", "two-pass": "diagnosed", "off": "diagnosed"}.get(mode, mode)
        assert provider.__qualname__.split(".")[0] == name
        assert stands_in.__qualname__.split(".")[0] == (mode if mode in ("uniform", "online") else "diagnosed")
