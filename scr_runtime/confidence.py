"""How far a predictor's scores can be trusted: calibrated confidence, and drift of the features that they came from.

Plain functions; ``SourcePredictor`` holds the numbers that they take and puts them together in ``judge``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Judgement(NamedTuple):
    """What a predictor's own numbers say about its scores of I images.

    Attributes:
        confidence: [I] float32, calibrated expected share of true sources among those that the scores choose.
        drift: [I] float32, see ``drift_ratio``; 1 without a drift guard.
        drifted: [I] bool, whether the drift is over the guard's limit.
    """

    confidence: Tensor
    drift: Tensor
    drifted: Tensor


def check_calibration(raw: Tensor, expected: Tensor, temperature: float) -> None:
    """Checks what ``SourcePredictor.set_calibration`` is given.

    Args:
        raw: [M] raw confidences, the calibration's knots.
        expected: [M] expected shares of true sources at those.
        temperature: Of the raw confidences.

    Raises:
        ValueError: If the knots are not finite, not ascending or differ in number, or the temperature is not over 0.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"calibration temperature {temperature}: expected a number over 0")
    if raw.ndim != 1 or raw.shape != expected.shape or len(raw) < 2:
        raise ValueError(
            f"calibration knots of shapes {tuple(raw.shape)} and {tuple(expected.shape)}: expected [M] twice, M >= 2"
        )
    if not (bool(raw.isfinite().all()) and bool(expected.isfinite().all())):
        raise ValueError("calibration knots must be finite")
    if not (bool((raw.diff() > 0).all()) and bool((expected.diff() >= 0).all())):
        raise ValueError("calibration knots must be ascending in raw and non-decreasing in expected")


def interpolate(raw: Tensor, knots: Tensor, expected: Tensor) -> Tensor:
    """Reads a piecewise linear curve, constant outside its knots.

    Args:
        raw: [...] where to read it.
        knots: [M] ascending places.
        expected: [M] values there.

    Returns:
        [...] values at ``raw``; NaN stays NaN.
    """
    knots, expected = knots.to(raw.device), expected.to(raw.device)
    right = torch.searchsorted(knots, raw.contiguous()).clamp(1, len(knots) - 1)
    left = right - 1
    step = ((raw - knots[left]) / (knots[right] - knots[left])).clamp(0.0, 1.0)
    return expected[left] + step * (expected[right] - expected[left])


def check_drift(typical: float, limit: float) -> None:
    """Checks what ``SourcePredictor.set_drift`` is given.

    Raises:
        ValueError: If the spread is not over 0, or the limit is below 1, or one of them is not finite.
    """
    if not (math.isfinite(typical) and typical > 0 and math.isfinite(limit) and limit >= 1):
        raise ValueError(f"typical={typical}, limit={limit}: expected a spread over 0 and a ratio of at least 1")


def drift_ratio(spread: Tensor, typical: float) -> Tensor:
    """How many times wider, or narrower, features spread than usual.

    Args:
        spread: [I] standard deviation of each image's features.
        typical: That of a usual image of the fit, over 0.

    Returns:
        [I] at least 1, where 1 is usual; infinity for features that don't vary or are not finite.
    """
    ratio = spread / typical
    return torch.maximum(ratio, 1 / ratio).nan_to_num(nan=math.inf, posinf=math.inf)
