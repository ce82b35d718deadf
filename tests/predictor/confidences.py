"""Confidence rows with a known law, for the tests of calibration, reliability and figures."""

from __future__ import annotations

import numpy as np

from predictor.calibration import ConfidenceRows

SPREAD = 0.05  # of the scores' errors: a temperature of 1 takes them for far less sharp


def confidences(count: int = 1000, seed: int = 0) -> ConfidenceRows:
    """Patches whose chance to be a true source is a squared logistic function of their gap: no temperature fits."""
    generator = np.random.default_rng(seed)
    gaps = generator.gamma(1.0, 2 * SPREAD, (count, 8)) * generator.uniform(0, 2, (count, 1))
    hits = generator.random((count, 8)) < 1 / (1 + np.exp(-gaps / SPREAD)) ** 2
    return ConfidenceRows(gaps, hits.astype(float))
