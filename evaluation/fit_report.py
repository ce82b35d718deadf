"""Reports a fit: its table between floors and reference, and its numbers under stable names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from predictor.metrics import Interval

_SHOWN = ("recall", "ndcg", "mass")


@dataclass(frozen=True)
class FitTable:
    """What a fit found on the test split, as the terminal and the report page show it.

    Attributes:
        title: How many images, and K.
        notes: What the columns mean.
        rows: Header, floors, reference and predictor.
        confidence: How far the predictor's confidence can be trusted.
        figures: PNG files that the page holds, too.
    """

    title: str
    notes: Sequence[str]
    rows: Sequence[Sequence[str]]
    confidence: str
    figures: Sequence[Path] = ()


def source_rows(
    fitted: Mapping[str, Interval], others: Mapping[str, Mapping[str, Interval]], k: int
) -> list[list[str]]:
    """Table of the predictor between its floors and its reference.

    Args:
        fitted: Metric -> interval, of the predictor on the test split.
        others: Floor or reference -> the same.
        k: Sources per image.
    """
    rows = [["scores from", *(f"{name}@{k}" for name in _SHOWN)]]
    for label, metrics in {**others, "predictor": fitted}.items():
        cells = [f"{metrics[n].mean:.3f} [{metrics[n].low:.3f}, {metrics[n].high:.3f}]" for n in _SHOWN]
        rows.append([label, *cells])
    return rows


def metrics(
    fitted: Mapping[str, Interval], others: Mapping[str, Mapping[str, Interval]], confidence: Mapping[str, float]
) -> dict[str, float]:
    """Every number under its name in fit.json: ``test/mass``, ``test/mass_low``, ``test/position/mass``, ..."""
    values: dict[str, float] = {}
    for name, interval in fitted.items():
        values |= {
            f"test/{name}": interval.mean,
            f"test/{name}_low": interval.low,
            f"test/{name}_high": interval.high,
        }
    for other, intervals in others.items():
        label = other.split(" (")[0].replace(" ", "_")
        values |= {f"test/{label}/{name}": interval.mean for name, interval in intervals.items()}
    return values | {f"test/confidence/{name}": value for name, value in confidence.items() if np.isfinite(value)}


def headlines(fitted: Mapping[str, Interval], confidence: Mapping[str, float]) -> dict[str, float]:
    """The few numbers of a fit that a table of runs has room for."""
    values = {name: fitted[name].mean for name in _SHOWN} | {"ece": confidence["ece"]}
    return {name: round(float(value), 4) for name, value in values.items() if np.isfinite(value)}
