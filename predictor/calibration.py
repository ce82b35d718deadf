"""Turns scores into "expected share of true sources", and picks the threshold under which `auto` falls back.

The raw confidence of an image is `SourceRule.confidence`: how far its sources stand out from the first patch that was
not chosen, in units of a temperature. Temperature and an isotonic map of the result to the recall are both fitted on
validation rows, and go into the predictor folder (`SourcePredictor.set_calibration`). `predictor.reliability` judges
what comes out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit
from sklearn.isotonic import IsotonicRegression
from torch import Tensor

from predictor.batch import Batch, Score, progress, rule_of
from predictor.errors import FitError
from predictor.metrics import hits
from predictor.settings import PredictorSettings
from scr_runtime.config import SCRConfig

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Calibration:
    """A monotone piecewise-linear map from raw confidence to expected recall, and the fallback threshold."""

    raw: list[float]
    """Knots, strictly increasing raw confidences."""
    expected: list[float]
    """Expected share of true sources at each knot, not decreasing; constant beyond the end knots."""
    threshold: float
    """`auto` falls back to two-pass where the expected share is below it. A float32, as the shares at run time are."""
    temperature: float = 1.0
    """Of the raw confidences: spread of the scores' errors."""

    def __call__(self, raw: ArrayLike) -> Floats:
        """Maps raw confidences to expected shares in float32, step by step as `SourcePredictor.calibrate` does.

        So the same rows are under the threshold here and at run time, also where shares are equal to it.
        """
        x, knots, values = (np.asarray(given, dtype=np.float32) for given in (raw, self.raw, self.expected))
        right = np.searchsorted(knots, x).clip(1, len(knots) - 1)
        left = right - 1
        step = ((x - knots[left]) / (knots[right] - knots[left])).clip(0, 1)
        return (values[left] + step * (values[right] - values[left])).astype(np.float64)


class ConfidenceRows(NamedTuple):
    """What calibration is fitted on, and checked on: one row per map, its K sources side by side."""

    gaps: Floats
    """[R, K] score of each source over the cut (see `SourceRule.gaps`), for the largest K of all grids; nan where a
    grid has fewer sources."""
    hits: Floats
    """[R, K] whether two-pass chooses it too; nan as in `gaps`."""

    @property
    def recall(self) -> Floats:
        """[R] true share of the chosen sources."""
        return np.nanmean(self.hits, axis=1)

    def raw(self, temperature: float = 1.0) -> Floats:
        """[R] raw confidence, as `SourceRule.confidence` gives it."""
        return np.nanmean(expit(self.gaps / temperature), axis=1)


@torch.inference_mode()
def confidence_rows(score: Score, dataloader: Iterable[Batch], scr: SCRConfig) -> ConfidenceRows:
    """Scores a set and returns how each row's sources stand out, and which of them are true.

    Args:
        score: `batch -> scores [B, N]`, e.g. `SourceModule.score`.
        dataloader: Batches of held-out rows (validation to fit, test to check).
        scr: How sources are chosen.

    Raises:
        FitError: No rows, or a score is not finite.
    """
    gaps: list[Tensor] = []
    true: list[Tensor] = []
    for batch in progress(dataloader, "confidence"):
        rule = rule_of(batch, scr)
        scores = score(batch)
        if not scores[:, rule.eligible].isfinite().all():
            raise FitError("scores are inf or nan: the fit diverged; lower trainer.learning_rate")
        gap, chosen = rule.gaps(scores)
        gaps.append(gap)
        true.append(hits(chosen, rule.choose(batch["attention"])))
    if not gaps:
        raise FitError("calibration needs held-out rows, and the split is empty; see harvest.validation, harvest.test")
    return ConfidenceRows(_side_by_side(gaps), _side_by_side(true))


def _side_by_side(batches: list[Tensor]) -> Floats:
    """Batches [B, K] of several K -> [R, largest K] float64, filled up with nan."""
    most = max(batch.shape[1] for batch in batches)
    filled = [F.pad(batch.double(), (0, most - batch.shape[1]), value=torch.nan) for batch in batches]
    return torch.cat(filled).cpu().numpy()


def fit_temperature(rows: ConfidenceRows) -> float:
    """Fits the spread of the scores' errors: the likeliest temperature of `sigmoid(gap / temperature)` for the hits.

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, for membership of the top K. Infinite gaps (of
    grids with a single eligible patch, which can't be missed) fit any temperature; 1 if there are no others.
    """
    kept = np.isfinite(rows.gaps)
    gaps, found = rows.gaps[kept], rows.hits[kept]
    if not len(gaps):
        return 1.0
    scale = float(np.abs(gaps).mean()) or 1.0
    temperatures = scale * np.logspace(-3, 3, 241)
    losses = [np.logaddexp(0, np.where(found > 0, -gaps, gaps) / t).mean() for t in temperatures]
    return float(temperatures[int(np.argmin(losses))])


def calibrate(rows: ConfidenceRows, settings: PredictorSettings) -> Calibration:
    """Fits temperature, isotonic map and threshold on rows of the validation split, see `fit_calibration`."""
    temperature = fit_temperature(rows)
    found = fit_calibration(rows.raw(temperature), rows.recall, settings)
    return replace(found, temperature=temperature)


def fit_calibration(
    raw: ArrayLike, recall: ArrayLike, settings: PredictorSettings, max_knots: int = 32
) -> Calibration:
    """Fits the isotonic map from raw confidence to recall on validation rows, and the threshold.

    Isotonic regression gives a step function. Its steps are joined through their centres (centred isotonic
    regression, Oron and Flournoy, "Centered Isotonic Regression: Point and Interval Estimation for
    Dose-Response Studies", Statistics in Biopharmaceutical Research 2017), because on a flat step a threshold
    could not split the rows at the wanted quantile. Steps are then merged, the lightest first, until
    `max_knots` remain.

    Args:
        raw: [R] raw confidences.
        recall: [R] true shares in [0, 1].
        settings: `target_fallback`, the share of these rows that `auto` would hand to two-pass; or `target_fidelity`,
            the mean expected share of true sources of the rows that stay one-pass, of which as many as possible stay.
        max_knots: Most knots to keep, at least 4; a step holds at least 1 / max_knots of the rows.

    Raises:
        FitError: No rows, or a value is not finite.
        ValueError: Rows of unequal number, or too few knots.
    """
    raw, recall = np.asarray(raw, dtype=np.float64), np.asarray(recall, dtype=np.float64)
    if raw.ndim != 1 or raw.shape != recall.shape:
        raise ValueError(f"fit_calibration got raw of shape {raw.shape} and recall of {recall.shape}; legal: [R] both")
    if max_knots < 4:
        raise ValueError(f"max_knots is {max_knots}; legal: 4 or more")
    if not len(raw):
        raise FitError("calibration needs 1 or more rows, and the validation split is empty; see harvest.validation")
    if not (np.isfinite(raw).all() and np.isfinite(recall).all()):
        raise FitError("confidence or recall is inf or nan: the fit diverged; lower trainer.learning_rate")

    rounded = raw.round(6)  # knots stay apart when they are stored as float32
    centres, values, weights = _isotonic_steps(rounded, recall)
    centres, values = _merge_steps(centres, values, weights, max_knots)
    knots, expected = _extend_to(centres, values, float(rounded.min()), float(rounded.max()))
    calibration = Calibration(knots.tolist(), expected.tolist(), 0.0)
    confidence = calibration(raw)
    fallback = settings.target_fallback
    if fallback is None:
        fallback = _fallback_for(confidence, settings.target_fidelity or 0.0)
    return replace(calibration, threshold=_threshold(confidence, fallback))


@torch.inference_mode()
def spread_rows(spread: Score, dataloader: Iterable[Batch]) -> Floats:
    """Returns [R], how far each row's features reach.

    Args:
        spread: `batch -> spreads [B]`, e.g. `SourceModule.spread`.
        dataloader: Batches of held-out rows.

    Raises:
        FitError: No rows.
    """
    parts = [spread(batch).double().cpu() for batch in dataloader]
    if not parts:
        raise FitError("the drift guard needs held-out rows, and the split is empty; see harvest.validation")
    return torch.cat(parts).numpy()


def fit_drift(spread: ArrayLike, quantile: float = 0.999, margin: float = 1.25) -> tuple[float, float]:
    """Fits the drift guard on validation rows: features that reach unusually far, or not far enough, trip it.

    Args:
        spread: [R] spreads.
        quantile: Share of validation rows whose drift the limit is to cover. The largest decides for fewer than
            1,000 rows.
        margin: Factor on that quantile's drift. Held-out images of the same kind stay under it; the cost of a false
            alarm is one diagnostic run.

    Returns:
        The median spread, and the limit on how many times wider or narrower a spread may be.

    Raises:
        FitError: Rows are missing, not finite, or not over 0.
    """
    spread = np.asarray(spread, dtype=np.float64)
    if spread.ndim != 1 or not len(spread) or not (np.isfinite(spread).all() and (spread > 0).all()):
        raise FitError(
            "spreads are missing, inf, nan or 0: the fit diverged (lower trainer.learning_rate), "
            "or the states are constant"
        )
    typical = float(np.median(spread))
    drift = np.maximum(spread / typical, typical / spread)
    return typical, margin * float(np.quantile(drift, quantile))


def _isotonic_steps(raw: Floats, recall: Floats) -> tuple[Floats, Floats, Floats]:
    """Centre (mean raw), height and weight of every step of the isotonic fit, by rising raw."""
    fitted = IsotonicRegression(y_min=0.0, y_max=1.0).fit_transform(raw, recall)
    order = np.argsort(raw, kind="stable")
    fitted, raw = fitted[order], raw[order]
    starts = np.flatnonzero(np.r_[True, np.diff(fitted) > 1e-12])
    weights = np.diff(np.r_[starts, len(raw)]).astype(np.float64)
    return np.add.reduceat(raw, starts) / weights, fitted[starts], weights


def _merge_steps(centres: Floats, values: Floats, weights: Floats, max_knots: int) -> tuple[Floats, Floats]:
    """Merges the lightest step into its lighter neighbour, until they are few and each holds enough rows."""
    steps = list(zip(centres, values, weights, strict=True))
    enough = weights.sum() / max_knots
    while len(steps) > 1:
        at = min(range(len(steps)), key=lambda i: steps[i][2])
        if len(steps) <= max_knots - 2 and steps[at][2] >= enough:  # two knots are for the ends
            break
        if at == len(steps) - 1 or (at > 0 and steps[at - 1][2] < steps[at + 1][2]):
            at -= 1
        (c0, v0, w0), (c1, v1, w1) = steps[at : at + 2]
        weight = w0 + w1
        steps[at : at + 2] = [((c0 * w0 + c1 * w1) / weight, (v0 * w0 + v1 * w1) / weight, weight)]
    merged = np.array(steps)
    return merged[:, 0], merged[:, 1]


def _extend_to(centres: Floats, values: Floats, low: float, high: float) -> tuple[Floats, Floats]:
    """Continues the end segments to the range of the rows, so that the end steps rank their rows too."""
    knots, expected = list(centres), list(values)
    if len(centres) == 1:  # raw confidence says nothing about recall: a constant, as the two knots of a map
        knots, expected = [low, max(high, low + 1e-3)], [values[0]] * 2
    else:
        first = (values[1] - values[0]) / (centres[1] - centres[0])
        last = (values[-1] - values[-2]) / (centres[-1] - centres[-2])
        if centres[0] - low > 1e-6:
            knots.insert(0, low)
            expected.insert(0, max(values[0] - first * (centres[0] - low), 0.0))
        if high - centres[-1] > 1e-6:
            knots.append(high)
            expected.append(min(values[-1] + last * (high - centres[-1]), 1.0))
    return np.array(knots), np.array(expected)


def _threshold(confidence: Floats, target_fallback: float) -> float:
    """Float32 value with the wanted share of rows strictly below it, or less where rows tie.

    Args:
        confidence: [R] float32 values, as the runtime compares them.
        target_fallback: The wanted share.
    """
    ordered = np.sort(confidence)
    wanted = round(target_fallback * len(ordered))
    if wanted == 0:
        return 0.0
    if wanted == len(ordered):
        return float(np.float32(1.0 + 1e-6))  # above every share
    below, above = ordered[wanted - 1 : wanted + 1]
    middle = float(np.float32((below + above) / 2))
    return middle if middle > below else float(above)  # between neighbouring numbers there is no middle


def _fallback_for(confidence: Floats, target_fidelity: float) -> float:
    """Smallest share of rows to give up, lowest first, so that the mean of the others reaches the target; else 1."""
    ordered = np.sort(confidence)
    kept_means = np.cumsum(ordered[::-1])[::-1] / np.arange(len(ordered), 0, -1)  # without the first i rows
    reached = np.flatnonzero(kept_means >= target_fidelity)
    return float(reached[0] / len(ordered)) if len(reached) else 1.0
