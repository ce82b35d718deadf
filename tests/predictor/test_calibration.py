from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from predictor.calibration import (
    Calibration,
    ConfidenceRows,
    calibrate,
    confidence_rows,
    fit_calibration,
    fit_drift,
    fit_temperature,
)
from predictor.errors import FitError
from predictor.metrics import recall_at_k
from predictor.reliability import expected_calibration_error
from predictor.settings import PredictorSettings
from scr_runtime.config import PredictorConfig, SCRConfig
from scr_runtime.network import SourcePredictor
from scr_runtime.rule import source_rule
from tests.predictor.confidences import SPREAD, confidences

DEFAULT = PredictorSettings()


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return calibrate(confidences(), DEFAULT)


def test_is_monotone_with_few_knots(calibration: Calibration) -> None:
    assert 2 <= len(calibration.raw) <= 32
    assert (np.diff(calibration.raw) > 0).all()
    assert (np.diff(calibration.expected) > 0).all()  # on a flat step no threshold could split the rows
    assert min(calibration.expected) >= 0 and max(calibration.expected) <= 1


@pytest.mark.parametrize("target", [0.0, 0.01, 0.2, 0.5, 0.99, 1.0])
def test_threshold_gives_the_wanted_fallback(target: float) -> None:
    rows = confidences()
    calibration = calibrate(rows, PredictorSettings(target_fallback=target))
    confidence = calibration(rows.raw(calibration.temperature))
    assert (confidence < calibration.threshold).mean() == pytest.approx(target, abs=0.005)


@pytest.mark.parametrize("target", [0.0, 0.7, 0.8, 1.0])
def test_threshold_keeps_the_rows_of_the_wanted_fidelity(target: float) -> None:
    rows = confidences(4000)
    calibration = calibrate(rows, PredictorSettings(target_fallback=None, target_fidelity=target))
    confidence = calibration(rows.raw(calibration.temperature))
    kept = confidence >= calibration.threshold
    if target == 0:
        assert kept.all()
    elif target == 1:
        assert not kept.any()
    else:
        assert rows.recall.mean() < target <= confidence[kept].mean() == pytest.approx(target, abs=0.005)
        assert confidences(4000, seed=1).recall.mean() < target
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


@pytest.mark.parametrize("max_knots", [4, 5, 8, 32])
def test_knots_are_thinned(max_knots: int) -> None:
    rows = confidences(3000)
    calibration = fit_calibration(rows.raw(SPREAD), rows.recall, DEFAULT, max_knots)
    assert 2 <= len(calibration.raw) <= max_knots
    assert expected_calibration_error(calibration(rows.raw(SPREAD)), rows.recall) < 0.05


def test_predictor_takes_it_and_maps_alike(calibration: Calibration) -> None:
    predictor = runtime(calibration)
    raw = torch.linspace(0, 1, 101)
    np.testing.assert_allclose(predictor.calibrate(raw).numpy(), calibration(raw.numpy()), atol=1e-5)
    found = confidences().raw(calibration.temperature)
    kept = calibration(found) >= calibration.threshold
    at_runtime = predictor.calibrate(torch.tensor(found, dtype=torch.float32)) >= predictor.threshold
    assert (at_runtime.numpy() == kept).mean() > 0.998


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
    calibration = fit_calibration(raw, recall, DEFAULT)
    assert calibration([0.0, 0.5, 1.0]) == pytest.approx(float(np.mean(recall)))
    SourcePredictor(PredictorConfig(hidden_size=8)).set_calibration(
        torch.tensor(calibration.raw), torch.tensor(calibration.expected), calibration.threshold
    )


@pytest.mark.parametrize(
    ("raw", "recall", "max_knots", "message"),
    [
        ([], [], 32, "1 or more rows.*harvest.validation"),
        ([0.1, 0.2], [0.1], 32, "shape"),
        ([0.1, np.nan], [0.1, 0.2], 32, "diverged.*trainer.learning_rate"),
        ([0.1], [0.1], 3, "max_knots is 3"),
    ],
)
def test_bad_input(raw: list[float], recall: list[float], max_knots: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_calibration(raw, recall, DEFAULT, max_knots)


def runtime(calibration: Calibration) -> SourcePredictor:
    """A predictor with this calibration."""
    predictor = SourcePredictor(PredictorConfig(hidden_size=8))
    raw, expected = torch.tensor(calibration.raw), torch.tensor(calibration.expected)
    predictor.set_calibration(raw, expected, calibration.threshold, calibration.temperature)
    return predictor


@pytest.mark.parametrize("recall", [0.5, 1 / 3, 0.7, 11 / 32])
@pytest.mark.parametrize("settings", [{"target_fallback": 0.0}, {}, {"target_fallback": 1.0}])
def test_a_constant_map_gives_the_runtime_all_rows_or_none_as_the_fit_counts(
    recall: float, settings: dict[str, Any]
) -> None:
    raw = np.random.default_rng(0).uniform(0.5, 0.6, 40)
    calibration = fit_calibration(raw, np.full(40, recall), PredictorSettings(**settings))
    counted = float((calibration(raw) < calibration.threshold).mean())
    predictor = runtime(calibration)
    found = predictor.calibrate(torch.tensor(raw, dtype=torch.float32)).tolist()
    assert counted == np.mean([share < predictor.threshold for share in found])
    assert counted == (1.0 if settings.get("target_fallback") == 1.0 else 0.0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("target", [0.0, 0.1, 0.5, 1.0])
def test_the_threshold_splits_the_rows_as_the_runtime_will(seed: int, target: float) -> None:
    rows = confidences(60, seed)
    calibration = calibrate(rows, PredictorSettings(target_fallback=target))
    predictor = runtime(calibration)
    assert float(np.float32(calibration.threshold)) == calibration.threshold == predictor.threshold
    raw = rows.raw(calibration.temperature)
    at_runtime = predictor.calibrate(torch.tensor(raw, dtype=torch.float32)).double()
    np.testing.assert_array_equal(calibration(raw), at_runtime.numpy())  # so no row is on two sides


def test_confidence_rows_of_a_loader(make_loader: Callable[..., Any]) -> None:
    loader = make_loader(images=10, batch_size=8)
    rows = confidence_rows(lambda batch: batch["attention"].log(), loader, SCRConfig(num_sources=6))
    np.testing.assert_allclose(rows.recall, 1.0)
    attention = torch.cat([batch["attention"] for batch in loader])
    rule = source_rule(SCRConfig(num_sources=6), (8, 8))
    for temperature in (1.0, 0.2):
        wanted = rule.confidence(attention.log(), temperature)
        np.testing.assert_allclose(rows.raw(temperature), wanted.numpy(), rtol=1e-5)

    flipped = confidence_rows(lambda batch: -batch["attention"], loader, SCRConfig(num_sources=6))
    batch = next(iter(loader))
    wanted = recall_at_k(-batch["attention"], batch["attention"], rule)
    np.testing.assert_allclose(flipped.recall[:8], wanted.numpy())


def test_confidence_rows_reject_an_empty_set() -> None:
    with pytest.raises(FitError, match=r"empty; see harvest\.validation"):
        confidence_rows(lambda batch: batch["attention"], [], SCRConfig(num_sources=6))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scores_of_a_fit_that_diverged_are_rejected(value: float) -> None:
    batch = grid_batch((5, 5))
    batch["scores"][1, 12] = value
    with pytest.raises(FitError, match=r"diverged; lower trainer\.learning_rate"):
        confidence_rows(lambda batch: batch["scores"], [batch], SCRConfig())


def grid_batch(grid: tuple[int, int], rows: int = 3, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, grid[0] * grid[1], generator=generator)
    noise = torch.randn(scores.shape, generator=generator)
    return {"scores": scores, "attention": (scores + noise / 2).exp(), "grid": grid, "key": ["k"] * rows}


def test_a_grid_with_one_eligible_patch_is_no_divergence() -> None:
    batches = [grid_batch((3, 3), rows=2), grid_batch((8, 8), rows=40)]
    rows = confidence_rows(lambda batch: batch["scores"], batches, SCRConfig(num_sources=6))
    assert np.isinf(rows.gaps[:2, 0]).all() and np.isnan(rows.gaps[:2, 1:]).all()
    assert rows.raw()[:2].tolist() == rows.recall[:2].tolist() == [1.0, 1.0]
    others = ConfidenceRows(rows.gaps[2:], rows.hits[2:])
    assert fit_temperature(rows) == fit_temperature(others)
    assert np.isfinite(calibrate(rows, DEFAULT).expected).all()
    assert fit_temperature(ConfidenceRows(rows.gaps[:2], rows.hits[:2])) == 1.0  # nothing to fit to


@pytest.mark.parametrize(
    ("scr", "counts"),
    [
        (SCRConfig(num_sources=32), [32, 2, 12]),
        (SCRConfig(num_sources=4, source_fraction=0.25), [36, 2, 12]),  # more than num_sources, and of each grid's own
        (SCRConfig(num_sources=6, suppress_claimed=True), [6, 2, 6]),
    ],
)
def test_rows_of_grids_with_another_number_of_sources(scr: SCRConfig, counts: list[int]) -> None:
    batches = [grid_batch(grid) for grid in ((12, 12), (4, 4), (6, 8))]
    rows = confidence_rows(lambda batch: batch["scores"], batches, scr)
    assert rows.gaps.shape == rows.hits.shape == (9, max(counts))
    assert (
        (~np.isnan(rows.hits)).sum(1).tolist()
        == (~np.isnan(rows.gaps)).sum(1).tolist()
        == np.repeat(counts, 3).tolist()
    )
    rules = [source_rule(scr, batch["grid"]) for batch in batches]
    wanted = [recall_at_k(b["scores"], b["attention"], rule) for b, rule in zip(batches, rules, strict=True)]
    np.testing.assert_allclose(rows.recall, torch.cat(wanted).numpy(), rtol=1e-6)
    wanted = [rule.confidence(b["scores"], 0.5) for b, rule in zip(batches, rules, strict=True)]
    np.testing.assert_allclose(rows.raw(0.5), torch.cat(wanted).numpy(), rtol=1e-5)


def test_the_drift_limit_is_the_quantile_times_the_margin() -> None:
    spread = np.concatenate([np.full(99, 2.0), [3.0]])
    assert fit_drift(spread) == pytest.approx((2.0, 1.25 * np.quantile([1.0] * 99 + [1.5], 0.999)))
    assert fit_drift(1 / spread)[1] == pytest.approx(fit_drift(spread)[1])  # narrower counts like wider
    assert fit_drift(spread, quantile=0.5, margin=2.0)[1] == 2.0
    for bad in ([], [1.0, float("nan")], [0.0, 1.0]):
        with pytest.raises(FitError, match="spreads are missing"):
            fit_drift(bad)


def test_sources_that_keep_apart_have_their_own_confidence(make_loader: Callable[..., Any]) -> None:
    loader = make_loader(images=10, batch_size=8)
    scr = SCRConfig(num_sources=6, suppress_claimed=True)
    rule = source_rule(scr, (8, 8))
    rows = confidence_rows(lambda batch: -batch["attention"].log(), loader, scr)
    attention = torch.cat([batch["attention"] for batch in loader])
    wanted = recall_at_k(-attention.log(), attention, rule)
    np.testing.assert_allclose(rows.recall, wanted.numpy())
    np.testing.assert_allclose(rows.raw(0.5), rule.confidence(-attention.log(), 0.5).numpy(), rtol=1e-5)
    plain = confidence_rows(lambda batch: -batch["attention"].log(), loader, SCRConfig(num_sources=6))
    assert not np.allclose(rows.raw(), plain.raw())
