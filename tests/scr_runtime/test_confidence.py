"""Calibrated confidence and the drift guard, as plain functions and through a predictor."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from scr_runtime import PredictorConfig, SCRConfig, SourcePredictor
from scr_runtime.confidence import check_calibration, check_drift, drift_ratio, interpolate
from scr_runtime.rule import source_rule


def make(**changes: Any) -> SourcePredictor:
    torch.manual_seed(0)
    return SourcePredictor(PredictorConfig(32, rank=8, width=16, **changes)).eval().requires_grad_(False)


def test_calibration_interpolates_and_clamps() -> None:
    predictor = make()
    predictor.set_calibration(torch.tensor([0.2, 0.4, 0.8]), torch.tensor([0.1, 0.1, 0.9]), 0.5, 2.5)
    assert (float(predictor.temperature), predictor.threshold) == (2.5, 0.5)
    given = torch.tensor([0.0, 0.2, 0.3, 0.6, 0.8, 1.0])
    assert predictor.calibrate(given).tolist() == pytest.approx([0.1, 0.1, 0.1, 0.5, 0.9, 0.9])
    assert predictor.calibrate(torch.tensor(float("nan"))).isnan()
    knots = torch.tensor([0.2, 0.4])
    with pytest.raises(ValueError, match="ascending"):
        predictor.set_calibration(torch.tensor([0.2, 0.2]), torch.tensor([0.1, 0.2]), 0.5)
    for temperature in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="expected a number over 0"):
            predictor.set_calibration(knots, knots, 0.5, temperature)


@pytest.mark.parametrize(
    ("raw", "expected", "temperature", "words"),
    [
        ([0.2, 0.2], [0.1, 0.2], 1.0, "ascending in raw"),
        ([0.2, 0.4], [0.2, 0.1], 1.0, "non-decreasing in expected"),
        ([0.2, 0.4, 0.5], [0.1, 0.2], 1.0, r"shapes \(3,\) and \(2,\)"),
        ([0.2], [0.1], 1.0, "M >= 2"),
        ([0.2, 0.4], [0.1, 0.2], 0.0, "calibration temperature 0.0: expected a number over 0"),
    ],
)
def test_a_calibration_that_is_none_is_refused(
    raw: list[float], expected: list[float], temperature: float, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        check_calibration(torch.tensor(raw), torch.tensor(expected), temperature)
    with pytest.raises(ValueError, match=words):
        make().set_calibration(torch.tensor(raw), torch.tensor(expected), 0.5, temperature)


def test_interpolation_takes_any_shape() -> None:
    knots, values = torch.tensor([0.0, 1.0, 3.0]), torch.tensor([0.0, 0.5, 0.9])
    raw = torch.tensor([[0.5, 2.0], [-1.0, 9.0]])
    torch.testing.assert_close(interpolate(raw, knots, values), torch.tensor([[0.25, 0.7], [0.0, 0.9]]))
    torch.testing.assert_close(interpolate(raw.T, knots, values), torch.tensor([[0.25, 0.0], [0.7, 0.9]]))


def test_drift_is_a_ratio_either_way() -> None:
    spread = torch.tensor([0.7, 1.4, 0.35, 0.0, float("nan"), float("inf")])
    assert drift_ratio(spread, 0.7).tolist() == [1.0, 2.0, 2.0] + [float("inf")] * 3
    check_drift(0.7, 1.0)


@pytest.mark.parametrize("factor", [0.0, float("nan"), float("inf")])
def test_dead_and_broken_features_are_drift_without_end(factor: float) -> None:
    predictor = make(position="none")
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


def test_a_judgement_puts_confidence_and_drift_together() -> None:
    predictor = make()
    predictor.set_calibration(torch.tensor([0.5, 1.0]), torch.tensor([0.2, 0.8]), 0.5, 0.3)
    rule = source_rule(SCRConfig(num_sources=4), (6, 6))
    scores, spread = torch.randn(5, 36), torch.tensor([0.5, 1.0, 2.0, 0.9, float("nan")])
    confidence = predictor.calibrate(rule.confidence(scores, 0.3))
    for given in (None, spread):  # without a guard nothing drifts
        judged = predictor.judge(scores, given, rule)
        torch.testing.assert_close(judged.confidence, confidence)
        assert judged.drift.tolist() == [1.0] * 5
        assert judged.drifted.tolist() == [False] * 5
    predictor.set_drift(1.0, 1.5)
    judged = predictor.judge(scores, spread, rule)
    torch.testing.assert_close(judged.confidence, confidence)
    torch.testing.assert_close(judged.drift, predictor.drift(spread))
    assert judged.drifted.tolist() == [True, False, True, False, True]
    assert predictor.judge(scores, None, rule).drifted.tolist() == [False] * 5  # nobody measured the features
