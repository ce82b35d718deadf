"""Judges a calibration on rows it was not fitted on: reliability bins, calibration error, risk and coverage."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from predictor.calibration import Calibration, ConfidenceRows, Floats


def expected_calibration_error(confidence: ArrayLike, recall: ArrayLike, bins: int = 10) -> float:
    """Mean distance between confidence and recall over bins of equally many rows (adaptive ECE).

    Equal-mass bins (Nixon et al., "Measuring Calibration in Deep Learning", CVPR workshops 2019), because
    confidences of one model lie close together. A finite sample keeps it above 0 even for a perfect map.
    """
    mean_confidence, mean_recall, count = reliability_bins(confidence, recall, bins)
    return float(np.abs(mean_confidence - mean_recall) @ count / count.sum())


def reliability_bins(confidence: ArrayLike, recall: ArrayLike, bins: int = 10) -> tuple[Floats, Floats, Floats]:
    """Returns mean confidence, mean recall and row count of equal-mass bins, [bins] each, in rising order."""
    confidence, recall = np.asarray(confidence, dtype=np.float64), np.asarray(recall, dtype=np.float64)
    order = np.argsort(confidence, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    return (
        np.array([confidence[part].mean() for part in parts]),
        np.array([recall[part].mean() for part in parts]),
        np.array([len(part) for part in parts]),
    )


def risk_coverage(confidence: ArrayLike, recall: ArrayLike) -> tuple[Floats, Floats]:
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
        of rows under the threshold), recall_kept (mean recall of the rows that stay one-pass; nan if none do),
        recall_fallback (of the others), aurc (area under the risk-coverage curve) and aurc_random (the same without
        any ranking: the mean risk).
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


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else float("nan")
