"""Judging a calibration: bins, calibration error, risk and coverage."""

from __future__ import annotations

import numpy as np
import pytest

from predictor.calibration import calibrate
from predictor.reliability import (
    calibration_summary,
    expected_calibration_error,
    reliability_bins,
    risk_coverage,
)
from predictor.settings import PredictorSettings
from tests.predictor.confidences import confidences


def test_ece_on_new_rows_is_far_below_the_raw_one() -> None:
    calibration = calibrate(confidences(), PredictorSettings(target_fallback=0.2))
    summary = calibration_summary(calibration, confidences(4000, seed=1))
    assert summary["ece"] < 0.02 < summary["ece_temperature"] < 0.1 < summary["ece_raw"]
    assert summary["recall_kept"] > summary["recall_fallback"]
    assert summary["aurc"] < summary["aurc_random"]
    assert summary["fallback"] == pytest.approx(0.2, abs=0.05)


def test_reliability_bins_share_the_rows() -> None:
    confidence = np.linspace(0, 1, 100)
    mean_confidence, mean_recall, count = reliability_bins(confidence, confidence**2, bins=4)
    assert count.tolist() == [25] * 4
    assert mean_confidence[0] == pytest.approx(confidence[:25].mean())
    assert mean_recall[3] == pytest.approx((confidence[75:] ** 2).mean())
    assert expected_calibration_error(confidence, confidence) == pytest.approx(0)
    assert expected_calibration_error(confidence, confidence + 0.1) == pytest.approx(0.1)
    assert len(reliability_bins([0.5, 0.6], [1, 0], bins=10)[0]) == 2


def test_risk_coverage() -> None:
    coverage, risk = risk_coverage([0.1, 0.9, 0.5], [0.0, 1.0, 0.5])
    np.testing.assert_allclose(coverage, [1 / 3, 2 / 3, 1])
    np.testing.assert_allclose(risk, [0, 0.25, 0.5])
