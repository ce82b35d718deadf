"""Turns scores into "expected share of true sources", and picks the threshold under which `auto` falls back.

The raw confidence of an image is `scr_runtime.network.raw_confidence`: how far its chosen patches stand out from the
first that was not chosen, in units of a temperature. Temperature and an isotonic map of the result to the recall are
both fitted on validation rows, and go into the predictor folder (`SourcePredictor.set_calibration`).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from sklearn.isotonic import IsotonicRegression
from torch import Tensor
from tqdm.auto import tqdm

from scr_runtime.config import SCRConfig
from scr_runtime.redistribute import (
    claims_of,
    effective_num_sources,
    eligible_patches,
    rank_patches,
    select_sources,
)

Array = np.ndarray


@dataclass(frozen=True)
class Calibration:
    """A monotone piecewise-linear map from raw confidence to expected recall, and the fallback threshold."""

    raw: list[float]
    """Knots, strictly increasing raw confidences."""
    expected: list[float]
    """Expected share of true sources at each knot, not decreasing; constant beyond the end knots."""
    threshold: float
    """`auto` falls back to two-pass where the expected share is below it."""
    temperature: float = 1.0
    """Of the raw confidences: spread of the scores' errors."""

    def __call__(self, raw: ArrayLike) -> Array:
        """Maps raw confidences to expected shares, as the runtime does."""
        return np.interp(np.asarray(raw, dtype=np.float64), self.raw, self.expected)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain containers, for JSON."""
        return asdict(self)


class ConfidenceRows(NamedTuple):
    """What calibration is fitted on, and checked on: one row per map, its K chosen patches side by side."""

    gaps: Array
    """[R, K] score of each chosen patch over the cut (halfway to the first that was not chosen); nan where a small
    grid has fewer sources."""
    hits: Array
    """[R, K] whether two-pass chooses it too; nan as in `gaps`."""

    @property
    def recall(self) -> Array:
        """[R] true share of the chosen sources."""
        return np.nanmean(self.hits, axis=1)

    def raw(self, temperature: float = 1.0) -> Array:
        """[R] raw confidence, as `scr_runtime.network.raw_confidence` gives it."""
        return np.nanmean(_sigmoid(self.gaps / temperature), axis=1)


@torch.inference_mode()
def confidence_rows(
    score: Callable[[Mapping[str, Any]], Tensor],
    dataloader: Iterable[Mapping[str, Any]],
    scr: SCRConfig,
) -> ConfidenceRows:
    """Scores a set and returns how each row's chosen patches stand out, and which of them are true.

    Args:
        score: `batch -> scores [B, N]`, e.g. `SourceModule.score`.
        dataloader: Batches of held-out rows (validation to fit, test to check).
        scr: How sources are chosen.

    Raises:
        ValueError: No rows.
    """
    gaps: list[Tensor] = []
    hits: list[Tensor] = []
    for batch in tqdm(dataloader, desc="confidence", unit="batch", leave=False, delay=2):
        rows, columns = batch["grid"]
        grid = (int(rows), int(columns))
        scores = score(batch)
        eligible = eligible_patches(grid, scr.exclude_border, scores.device)
        k, claims = effective_num_sources(grid, scr), claims_of(grid, scr, scores.device)
        values, chosen = rank_patches(scores, eligible, k + 1, claims)
        true = select_sources(batch["attention"].to(scores.device), eligible, k, claims)
        hit = (chosen[:, :k, None] == true[:, None, :]).any(-1).double()
        spare = (0, scr.num_sources - k)
        gaps.append(F.pad(values[:, :k] - values[:, k - 1 : k + 1].mean(-1, keepdim=True), spare, value=torch.nan))
        hits.append(F.pad(hit, spare, value=torch.nan))
    if not gaps:
        raise ValueError("confidence_rows got an empty set: calibration needs held-out rows.")
    return ConfidenceRows(torch.cat(gaps).double().cpu().numpy(), torch.cat(hits).cpu().numpy())


def fit_temperature(rows: ConfidenceRows) -> float:
    """Fits the spread of the scores' errors: the likeliest temperature of `sigmoid(gap / temperature)` for the hits.

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, for membership of the top K.

    Raises:
        ValueError: A gap is infinite, or all are missing.
    """
    kept = ~np.isnan(rows.hits)
    gaps, hits = rows.gaps[kept], rows.hits[kept]
    if not len(gaps) or not np.isfinite(gaps).all():
        raise ValueError("scores are inf or nan: the fit diverged; lower trainer.learning_rate.")
    scale = float(np.abs(gaps).mean()) or 1.0
    temperatures = scale * np.logspace(-3, 3, 241)
    losses = [np.logaddexp(0, np.where(hits > 0, -gaps, gaps) / t).mean() for t in temperatures]
    return float(temperatures[int(np.argmin(losses))])


def calibrate(
    rows: ConfidenceRows, target_fallback: float | None = 0.2, target_fidelity: float | None = None
) -> Calibration:
    """Fits temperature, isotonic map and threshold on validation rows.

    Args:
        rows: Of the validation split.
        target_fallback: See `fit_calibration`.
        target_fidelity: See `fit_calibration`.
    """
    temperature = fit_temperature(rows)
    found = fit_calibration(rows.raw(temperature), rows.recall, target_fallback, target_fidelity)
    return replace(found, temperature=temperature)


def fit_calibration(
    raw: ArrayLike,
    recall: ArrayLike,
    target_fallback: float | None = 0.2,
    target_fidelity: float | None = None,
    max_knots: int = 32,
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
        target_fallback: Share of validation rows that `auto` shall hand to two-pass, 0..1.
        target_fidelity: Instead of it (which then is None): what the rows that stay one-pass shall have as mean
            expected share of true sources; the most rows that can have it stay.
        max_knots: Most knots to keep, at least 4; a step holds at least 1 / max_knots of the rows.

    Raises:
        ValueError: Rows are missing, not finite or of unequal number; a target is outside 0..1, or not exactly one
            of the two is given.
    """
    raw, recall = np.asarray(raw, dtype=np.float64), np.asarray(recall, dtype=np.float64)
    if raw.ndim != 1 or raw.shape != recall.shape or not len(raw):
        raise ValueError(
            f"fit_calibration needs 1 or more rows, got raw of shape {raw.shape}, recall of {recall.shape}."
        )
    if not (np.isfinite(raw).all() and np.isfinite(recall).all()):
        raise ValueError("confidence or recall is inf or nan: the fit diverged; lower trainer.learning_rate.")
    if (target_fallback is None) == (target_fidelity is None):
        raise ValueError(f"target_fallback={target_fallback}, target_fidelity={target_fidelity}: give one of the two.")
    for name, target in (("target_fallback", target_fallback), ("target_fidelity", target_fidelity)):
        if target is not None and not 0 <= target <= 1:
            raise ValueError(f"{name} is {target}; legal: 0 to 1.")
    if max_knots < 4:
        raise ValueError(f"max_knots is {max_knots}; legal: 4 or more.")

    raw = raw.round(6)  # knots stay apart when they are stored as float32
    centres, values, weights = _isotonic_steps(raw, recall)
    centres, values = _merge_steps(centres, values, weights, max_knots)
    knots, expected = _extend_to(centres, values, float(raw.min()), float(raw.max()))
    confidence = np.interp(raw, knots, expected)
    if target_fallback is None:
        target_fallback = _fallback_for(confidence, float(target_fidelity or 0))
    return Calibration(knots.tolist(), expected.tolist(), _threshold(confidence, target_fallback))


@torch.inference_mode()
def spread_rows(
    spread: Callable[[Mapping[str, Any]], Tensor],
    dataloader: Iterable[Mapping[str, Any]],
) -> Array:
    """Returns [R], how far each row's features reach.

    Args:
        spread: `batch -> spreads [B]`, e.g. `SourceModule.spread`.
        dataloader: Batches of held-out rows.
    """
    parts = [spread(batch).double().cpu() for batch in dataloader]
    if not parts:
        raise ValueError("spread_rows got an empty set: the drift guard needs held-out rows.")
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
        ValueError: Rows are missing, not finite, or not over 0.
    """
    spread = np.asarray(spread, dtype=np.float64)
    if spread.ndim != 1 or not len(spread) or not (np.isfinite(spread).all() and (spread > 0).all()):
        raise ValueError("spreads are missing, inf, nan or 0: the fit diverged, or the states are constant.")
    typical = float(np.median(spread))
    drift = np.maximum(spread / typical, typical / spread)
    return typical, margin * float(np.quantile(drift, quantile))


def expected_calibration_error(confidence: ArrayLike, recall: ArrayLike, bins: int = 10) -> float:
    """Mean distance between confidence and recall over bins of equally many rows (adaptive ECE).

    Equal-mass bins (Nixon et al., "Measuring Calibration in Deep Learning", CVPR workshops 2019), because
    confidences of one model lie close together. A finite sample keeps it above 0 even for a perfect map.
    """
    mean_confidence, mean_recall, count = reliability_bins(confidence, recall, bins)
    return float(np.abs(mean_confidence - mean_recall) @ count / count.sum())


def reliability_bins(confidence: ArrayLike, recall: ArrayLike, bins: int = 10) -> tuple[Array, Array, Array]:
    """Returns mean confidence, mean recall and row count of equal-mass bins, [bins] each, in rising order."""
    confidence, recall = np.asarray(confidence, dtype=np.float64), np.asarray(recall, dtype=np.float64)
    order = np.argsort(confidence, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    return (
        np.array([confidence[part].mean() for part in parts]),
        np.array([recall[part].mean() for part in parts]),
        np.array([len(part) for part in parts]),
    )


def risk_coverage(confidence: ArrayLike, recall: ArrayLike) -> tuple[Array, Array]:
    """Returns coverage [R] and risk [R], the mean share of missed sources among the most confident rows.

    `risk[i]` is what the rows that `auto` keeps one-pass miss on average if it keeps the share `coverage[i]`.
    """
    confidence, recall = np.asarray(confidence, dtype=np.float64), np.asarray(recall, dtype=np.float64)
    order = np.argsort(-confidence, kind="stable")
    kept = np.arange(1, len(order) + 1)
    return kept / len(order), np.cumsum(1.0 - recall[order]) / kept


def calibration_summary(calibration: Calibration, rows: ConfidenceRows) -> dict[str, float]:
    """Numbers that say how good a calibration is on rows it was not fitted on (the test set).

    Returns:
        ece (isotonic, what the runtime has), ece_temperature (temperature alone), ece_raw (neither), fallback (share
        of rows under the threshold),
        recall_kept (mean recall of the rows that stay one-pass; nan if none do), recall_fallback (of the
        others), aurc (area under the risk-coverage curve) and aurc_random (the same without any ranking: the
        mean risk).
    """
    tempered = rows.raw(calibration.temperature)
    confidence = calibration(tempered)
    falls_back = confidence < calibration.threshold
    _, risk = risk_coverage(confidence, rows.recall)
    return {
        "ece": expected_calibration_error(confidence, rows.recall),
        "ece_temperature": expected_calibration_error(tempered, rows.recall),
        "ece_raw": expected_calibration_error(rows.raw(), rows.recall),
        "fallback": float(falls_back.mean()),
        "recall_kept": _mean(rows.recall[~falls_back]),
        "recall_fallback": _mean(rows.recall[falls_back]),
        "aurc": float(risk.mean()),
        "aurc_random": float(1.0 - rows.recall.mean()),
    }


def _isotonic_steps(raw: Array, recall: Array) -> tuple[Array, Array, Array]:
    """Centre (mean raw), height and weight of every step of the isotonic fit, by rising raw."""
    fitted = IsotonicRegression(y_min=0.0, y_max=1.0).fit_transform(raw, recall)
    order = np.argsort(raw, kind="stable")
    fitted, raw = fitted[order], raw[order]
    starts = np.flatnonzero(np.r_[True, np.diff(fitted) > 1e-12])
    weights = np.diff(np.r_[starts, len(raw)]).astype(np.float64)
    return np.add.reduceat(raw, starts) / weights, fitted[starts], weights


def _merge_steps(centres: Array, values: Array, weights: Array, max_knots: int) -> tuple[Array, Array]:
    """Merge the lightest step into its lighter neighbour, until they are few and each holds enough rows."""
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


def _extend_to(centres: Array, values: Array, low: float, high: float) -> tuple[Array, Array]:
    """Continue the end segments to the range of the rows, so that the end steps rank their rows too."""
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


def _threshold(confidence: Array, target_fallback: float) -> float:
    """Value with the wanted share of rows strictly below it, or less where rows tie."""
    ordered = np.sort(confidence)
    wanted = round(target_fallback * len(ordered))
    if wanted == 0:
        return 0.0
    if wanted == len(ordered):
        return 1.0 + 1e-6  # above every share, in float32 too
    return float((ordered[wanted - 1] + ordered[wanted]) / 2)


def _fallback_for(confidence: Array, target_fidelity: float) -> float:
    """Smallest share of rows to give up, lowest first, so that the mean of the others reaches the target; else 1."""
    ordered = np.sort(confidence)
    kept_means = np.cumsum(ordered[::-1])[::-1] / np.arange(len(ordered), 0, -1)  # without the first i rows
    reached = np.flatnonzero(kept_means >= target_fidelity)
    return float(reached[0] / len(ordered)) if len(reached) else 1.0


def _sigmoid(values: Array) -> Array:
    return 0.5 * (1 + np.tanh(0.5 * values))  # no overflow


def _mean(values: Array) -> float:
    return float(values.mean()) if len(values) else float("nan")
