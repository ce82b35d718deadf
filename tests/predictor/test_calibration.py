import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from predictor.calibration import (
    Calibration,
    ConfidenceRows,
    calibrate,
    calibration_summary,
    confidence_rows,
    expected_calibration_error,
    fit_calibration,
    fit_drift,
    fit_temperature,
    reliability_bins,
    risk_coverage,
)
from predictor.metrics import recall_at_k
from scr_runtime.config import SCRConfig
from scr_runtime.network import PredictorConfig, SourcePredictor, raw_confidence
from scr_runtime.redistribute import claims_of, eligible_patches

SPREAD = 0.05  # of the scores' errors: far sharper than a temperature of 1 takes them for


def _rows(count: int = 1000, seed: int = 0) -> ConfidenceRows:
    """Patches whose chance to be a true source is a squared logistic function of their gap: no temperature fits."""
    generator = np.random.default_rng(seed)
    gaps = generator.gamma(1.0, 2 * SPREAD, (count, 8)) * generator.uniform(0, 2, (count, 1))
    hits = generator.random((count, 8)) < 1 / (1 + np.exp(-gaps / SPREAD)) ** 2
    return ConfidenceRows(gaps, hits.astype(float))


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return calibrate(_rows(), target_fallback=0.2)


def test_is_monotone_with_few_knots(calibration: Calibration) -> None:
    assert 2 <= len(calibration.raw) <= 32
    assert (np.diff(calibration.raw) > 0).all()
    assert (np.diff(calibration.expected) > 0).all()  # on a flat step no threshold could split the rows
    assert min(calibration.expected) >= 0 and max(calibration.expected) <= 1


def test_ece_on_new_rows_is_far_below_the_raw_one(calibration: Calibration) -> None:
    summary = calibration_summary(calibration, _rows(4000, seed=1))
    assert summary["ece"] < 0.02 < summary["ece_temperature"] < 0.1 < summary["ece_raw"]
    assert summary["recall_kept"] > summary["recall_fallback"]
    assert summary["aurc"] < summary["aurc_random"]
    assert summary["fallback"] == pytest.approx(0.2, abs=0.05)


@pytest.mark.parametrize("target", [0.0, 0.01, 0.2, 0.5, 0.99, 1.0])
def test_threshold_gives_the_wanted_fallback(target: float) -> None:
    rows = _rows()
    calibration = calibrate(rows, target_fallback=target)
    confidence = calibration(rows.raw(calibration.temperature))
    assert (confidence < calibration.threshold).mean() == pytest.approx(target, abs=0.005)


@pytest.mark.parametrize("target", [0.0, 0.7, 0.8, 1.0])
def test_threshold_keeps_the_rows_of_the_wanted_fidelity(target: float) -> None:
    rows = _rows(4000)
    calibration = calibrate(rows, target_fallback=None, target_fidelity=target)
    confidence = calibration(rows.raw(calibration.temperature))
    kept = confidence >= calibration.threshold
    if target == 0:
        assert kept.all()
    elif target == 1:
        assert not kept.any()
    else:
        assert rows.recall.mean() < target <= confidence[kept].mean() == pytest.approx(target, abs=0.005)
        assert _rows(4000, seed=1).recall.mean() < target
        assert rows.recall[kept].mean() == pytest.approx(target, abs=0.02)


def test_the_temperature_is_the_spread_of_the_errors() -> None:
    generator = np.random.default_rng(0)
    gaps = generator.gamma(1.0, 2 * SPREAD, (2000, 8))
    hits = (generator.random(gaps.shape) < 1 / (1 + np.exp(-gaps / SPREAD))).astype(float)
    assert fit_temperature(ConfidenceRows(gaps, hits)) == pytest.approx(SPREAD, rel=0.1)
    ragged = ConfidenceRows(
        np.pad(gaps, ((0, 0), (0, 2)), constant_values=np.nan), np.pad(hits, ((0, 0), (0, 2)), constant_values=np.nan)
    )
    assert fit_temperature(ragged) == fit_temperature(ConfidenceRows(gaps, hits))
    np.testing.assert_allclose(ragged.recall, hits.mean(1))
    with pytest.raises(ValueError, match="diverged"):
        fit_temperature(ConfidenceRows(np.full((2, 2), np.inf), np.ones((2, 2))))


@pytest.mark.parametrize("max_knots", [4, 5, 8, 32])
def test_knots_are_thinned(max_knots: int) -> None:
    rows = _rows(3000)
    calibration = fit_calibration(rows.raw(SPREAD), rows.recall, max_knots=max_knots)
    assert 2 <= len(calibration.raw) <= max_knots
    assert expected_calibration_error(calibration(rows.raw(SPREAD)), rows.recall) < 0.05


def test_predictor_takes_it_and_maps_alike(calibration: Calibration) -> None:
    predictor = SourcePredictor(PredictorConfig(hidden_size=8))
    raw, expected = torch.tensor(calibration.raw), torch.tensor(calibration.expected)
    predictor.set_calibration(raw, expected, calibration.threshold, calibration.temperature)
    raw = torch.linspace(0, 1, 101)
    np.testing.assert_allclose(predictor.calibrate(raw).numpy(), calibration(raw.numpy()), atol=1e-5)
    found = _rows().raw(calibration.temperature)
    kept = calibration(found) >= calibration.threshold
    at_runtime = predictor.calibrate(torch.tensor(found, dtype=torch.float32)) >= predictor.threshold
    assert (at_runtime.numpy() == kept).mean() > 0.998


def test_is_json(calibration: Calibration) -> None:
    assert Calibration(**json.loads(json.dumps(calibration.to_dict()))) == calibration


@pytest.mark.parametrize(
    ("raw", "recall"),
    [
        ([0.3] * 20, [0.5] * 20),
        ([0.1, 0.2, 0.3, 0.4], [1.0, 0.75, 0.5, 0.25]),  # the wrong way round: nothing to rank by
        ([0.4], [0.5]),
        ([0.2, 0.2 + 1e-9], [0.0, 1.0]),
    ],
)
def test_degenerate_rows_give_a_constant(raw: list[float], recall: list[float]) -> None:
    calibration = fit_calibration(raw, recall)
    assert calibration([0.0, 0.5, 1.0]) == pytest.approx(float(np.mean(recall)))
    SourcePredictor(PredictorConfig(hidden_size=8)).set_calibration(
        torch.tensor(calibration.raw), torch.tensor(calibration.expected), calibration.threshold
    )


@pytest.mark.parametrize(
    ("raw", "recall", "settings", "message"),
    [
        ([], [], {}, "1 or more rows"),
        ([0.1, 0.2], [0.1], {}, "shape"),
        ([0.1, np.nan], [0.1, 0.2], {}, "diverged"),
        ([0.1], [0.1], {"target_fallback": 1.2}, "target_fallback is 1.2"),
        ([0.1], [0.1], {"target_fallback": None, "target_fidelity": -1}, "target_fidelity is -1"),
        ([0.1], [0.1], {"target_fidelity": 0.9}, "give one of the two"),
        ([0.1], [0.1], {"target_fallback": None}, "give one of the two"),
        ([0.1], [0.1], {"max_knots": 3}, "max_knots is 3"),
    ],
)
def test_bad_input(raw: list[float], recall: list[float], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_calibration(raw, recall, **settings)


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


def test_confidence_rows_of_a_loader(make_loader: Callable[..., Any]) -> None:
    loader = make_loader(images=10, batch_size=8)
    rows = confidence_rows(lambda batch: batch["attention"].log(), loader, SCRConfig(num_sources=6))
    np.testing.assert_allclose(rows.recall, 1.0)
    attention = torch.cat([batch["attention"] for batch in loader])
    for temperature in (1.0, 0.2):
        wanted = raw_confidence(attention.log(), eligible_patches((8, 8), True), 6, temperature)
        np.testing.assert_allclose(rows.raw(temperature), wanted.numpy(), rtol=1e-5)

    flipped = confidence_rows(lambda batch: -batch["attention"], loader, SCRConfig(num_sources=6))
    batch = next(iter(loader))
    wanted = recall_at_k(-batch["attention"], batch["attention"], eligible_patches((8, 8), True), 6, (8, 8))
    np.testing.assert_allclose(flipped.recall[:8], wanted.numpy())


def test_confidence_rows_refuse_an_empty_set() -> None:
    with pytest.raises(ValueError, match="empty"):
        confidence_rows(lambda batch: batch["attention"], [], SCRConfig(num_sources=6))


def test_the_drift_limit_is_the_quantile_times_the_margin():
    spread = np.concatenate([np.full(99, 2.0), [3.0]])
    assert fit_drift(spread) == pytest.approx((2.0, 1.25 * np.quantile([1.0] * 99 + [1.5], 0.999)))
    assert fit_drift(1 / spread)[1] == pytest.approx(fit_drift(spread)[1])  # narrower counts like wider
    assert fit_drift(spread, quantile=0.5, margin=2.0)[1] == 2.0
    for bad in ([], [1.0, float("nan")], [0.0, 1.0]):
        with pytest.raises(ValueError, match="spreads are missing"):
            fit_drift(bad)


def test_sources_that_keep_apart_have_a_confidence_of_their_own(make_loader: Callable[..., Any]) -> None:
    loader = make_loader(images=10, batch_size=8)
    scr = SCRConfig(num_sources=6, suppress_claimed=True)
    claims = claims_of((8, 8), scr)
    rows = confidence_rows(lambda batch: -batch["attention"].log(), loader, scr)
    eligible = eligible_patches((8, 8), True)
    attention = torch.cat([batch["attention"] for batch in loader])
    wanted = recall_at_k(-attention.log(), attention, eligible, 6, (8, 8), claims)
    np.testing.assert_allclose(rows.recall, wanted.numpy())
    raw = raw_confidence(-attention.log(), eligible, 6, 0.5, claims)
    np.testing.assert_allclose(rows.raw(0.5), raw.numpy(), rtol=1e-5)
    plain = confidence_rows(lambda batch: -batch["attention"].log(), loader, SCRConfig(num_sources=6))
    assert not np.allclose(rows.raw(), plain.raw())
