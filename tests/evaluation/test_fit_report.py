from __future__ import annotations

import pytest

from evaluation import fit_report
from predictor.metrics import METRICS, Interval

FITTED = {name: Interval(0.9, 0.85, 0.95) for name in METRICS}
OTHERS = {"position": dict.fromkeys(METRICS, Interval(0.5, 0.4, 0.6)), "other prompts (reference)": FITTED}


def test_the_predictor_stands_below_floors_and_reference() -> None:
    rows = fit_report.source_rows(FITTED, OTHERS, 8)
    assert rows[0] == ["scores from", "recall@8", "ndcg@8", "mass@8"]
    assert [row[0] for row in rows[1:]] == ["position", "other prompts (reference)", "predictor"]
    assert rows[1][1:] == ["0.500 [0.400, 0.600]"] * 3


def test_numbers_have_stable_names_and_are_finite() -> None:
    values = fit_report.metrics(FITTED, OTHERS, {"ece": 0.02, "recall_kept": float("nan")})
    assert values["test/mass"] == 0.9 and values["test/mass_low"] == 0.85 and values["test/mass_high"] == 0.95
    assert values["test/position/iou"] == 0.5 and values["test/other_prompts/mass"] == pytest.approx(0.9)
    assert values["test/confidence/ece"] == 0.02 and "test/confidence/recall_kept" not in values
