from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data.questions import STRATEGIES
from evaluation import report
from evaluation.compare import FALLBACKS, METHODS, TIMED, Comparison
from evaluation.fidelity import fallback_curve, fidelity
from evaluation.latency import Cost
from evaluation.methods import ONE_PASS, TWO_PASS, VANILLA
from evaluation.pope import Answers, score
from evaluation.settings import EvaluationSettings
from evaluation.tables import table


@pytest.fixture
def comparison() -> Comparison:
    rng = np.random.default_rng(0)
    count = 240
    truth = np.tile([True, False], count // 2)
    vanilla = rng.normal(size=count) + 2 * truth - 0.5
    margins = {name: vanilla + 0.3 * rng.normal(size=count) - 0.2 for name in METHODS}
    margins[VANILLA] = vanilla
    answers = Answers(
        np.arange(count) // 6,
        truth,
        {s: np.arange(count) for s in STRATEGIES},
        margins,
        rng.random(count),
        rng.random(count),
        0.25,
    )
    return Comparison(
        answers=answers,
        scores={(m, s): score(answers, m, s, EvaluationSettings(bootstrap=100)) for m in METHODS for s in STRATEGIES},
        fidelity={m: fidelity(answers, m) for m in METHODS if m != TWO_PASS},
        curve=fallback_curve(answers, FALLBACKS),
        costs={m: Cost(10.0, 1.4 if m == TWO_PASS else 1.0, 0.9, 1.1) for m in TIMED},
        images=40,
        entropy_correlation=-0.2,
    )


def test_the_table_has_a_row_per_method_and_is_aligned(comparison: Comparison) -> None:
    rows = report.answer_rows(comparison)
    assert [row[0] for row in rows[1:]] == list(METHODS)
    assert len({len(row) for row in rows}) == 1
    lines = table(rows).splitlines()
    assert len(lines) == len(rows) + 1
    two = comparison.scores[TWO_PASS, "adversarial"]
    assert f"{100 * two.hr:.1f}" in lines[3]
    assert "1.40x" in lines[3]


def test_the_reading_says_what_is_not_shown(comparison: Comparison) -> None:
    text = " ".join(report.reading(comparison, embedded=True))
    assert "does not show that SCR lowers hallucination in real models" in text
    assert "25% of the questions" in text
    assert "real models" not in " ".join(report.reading(comparison, embedded=False))


def test_metrics_are_finite_and_named_stably(comparison: Comparison) -> None:
    values = report.metrics(comparison)
    assert values["eval/two-pass/adversarial/hr"] == comparison.scores[TWO_PASS, "adversarial"].hr
    assert values["eval/auto/fallback"] == 0.25
    assert values["eval/two-pass/prefill_ratio"] == 1.4
    assert values["eval/auto_0/shift_correlation"] == values["eval/one-pass/shift_correlation"]
    assert values["eval/auto_100/shift_correlation"] == pytest.approx(1)
    change = comparison.scores[ONE_PASS, "adversarial"].hr_change
    assert change and values["eval/one-pass/hr_kept"] == pytest.approx(
        change.mean / comparison.scores[TWO_PASS, "adversarial"].hr_change.mean  # type: ignore[union-attr]
    )
    assert all(np.isfinite(value) for value in values.values())


def test_files_are_written(comparison: Comparison, tmp_path: Path) -> None:
    paths = report.write(tmp_path / "reports", comparison, embedded=True)
    assert json.loads(paths["json"].read_text()) == pytest.approx(report.metrics(comparison))
    assert paths["md"].read_text().count("| two-pass |") == 2  # the numbers, and what it is
    assert paths["png"].stat().st_size > 10_000
