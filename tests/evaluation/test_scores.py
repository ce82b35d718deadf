"""Rates, intervals and tests of yes/no answers, against values worked out by hand or by scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, precision_score

from evaluation.questions import Split
from evaluation.scores import (
    Answered,
    Resampling,
    Score,
    auc_above,
    changed_answers,
    hr_at_tpr,
    hr_difference,
    mcnemar,
    roc,
    score,
)


def answered(parsed: dict[str, list[str]], margins: dict[str, list[float]] | None = None) -> Answered:
    signs = {"yes": 1.0, "no": -1.0, "neither": -0.5}
    found = margins or {name: [signs[text] for text in texts] for name, texts in parsed.items()}
    return Answered(
        {name: np.array(values) for name, values in found.items()},
        {name: np.array([texts]) for name, texts in parsed.items()},
        0.0,
    )


def split(truth: list[bool]) -> Split:
    return Split(np.arange(len(truth)), np.array(truth), list(range(len(truth))), "", "")


def resampling(count: int, per_image: int = 1) -> Resampling:
    return Resampling(np.arange(count) // per_image, 300, 0)


def from_margins(margins: dict[str, np.ndarray]) -> Answered:
    parsed = {name: np.where(values > 0, "yes", "no").tolist() for name, values in margins.items()}
    return answered(parsed, {name: values.tolist() for name, values in margins.items()})


def test_scores_equal_a_confusion_matrix() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random(400) < 0.5
    vanilla, other = rng.normal(size=400) + truth, rng.normal(size=400) + truth
    found = score(
        from_margins({"vanilla": vanilla, "two-pass": other}), "two-pass", split(truth.tolist()), resampling(400)
    )
    tn, fp, fn, tp = confusion_matrix(truth, other > 0).ravel()
    assert found.hr.mean == pytest.approx(fp / (fp + tn))
    assert found.tpr == pytest.approx(tp / (tp + fn))
    assert found.accuracy == pytest.approx((tp + tn) / 400)
    assert found.precision == pytest.approx(precision_score(truth, other > 0))
    assert found.f1 == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert found.yes_ratio == pytest.approx((tp + fp) / 400)
    pairs = (other[truth][:, None] > other[~truth][None, :]).mean()  # AUC is the share of pairs in order
    assert found.auc == pytest.approx(pairs)
    before = score(from_margins({"vanilla": vanilla}), "vanilla", split(truth.tolist()), resampling(400))
    assert before.hr_change is None and found.hr_change is not None
    assert found.hr_change.mean == pytest.approx(found.hr.mean - before.hr.mean)
    assert found.hr_change.low < found.hr_change.mean < found.hr_change.high


def test_an_answer_that_is_neither_counts_as_wrong_and_is_counted() -> None:
    found = score(
        answered({"vanilla": ["yes", "neither", "no", "neither"]}), "vanilla", split([True, True, False, False]),
        resampling(4),
    )  # fmt: skip
    assert (found.accuracy, found.tpr, found.hr.mean, found.unread) == (0.5, 0.5, 0.0, 2)
    assert found.disagrees == 0.0


def test_margin_and_answer_may_disagree() -> None:
    found = answered({"vanilla": ["yes", "no"]}, {"vanilla": [-1.0, -1.0]})
    assert score(found, "vanilla", split([True, False]), resampling(2)).disagrees == 0.5


def test_sampled_answers_are_averaged_over_seeds() -> None:
    parsed = {"vanilla": np.array([["yes", "no"], ["no", "no"]])}
    found = score(Answered({"vanilla": np.zeros(2)}, parsed, 0.0), "vanilla", split([True, False]), resampling(2))
    assert (found.tpr, found.accuracy) == (0.5, 0.75)


def test_the_interval_is_paired_and_clustered_by_image() -> None:
    truth = split([True, False] * 200)
    vanilla = np.random.default_rng(1).normal(size=400)
    same = score(from_margins({"vanilla": vanilla, "two-pass": vanilla}), "two-pass", truth, resampling(400, 4))
    assert same.hr_change is not None and same.hr_change[1:] == (
        0.0,
        0.0,
    )  # unpaired resampling would not be that sure
    flips = np.repeat(np.random.default_rng(2).random(100) < 0.5, 4)  # all questions of an image flip together
    shifted = from_margins({"vanilla": np.ones(400), "two-pass": np.where(flips, -1.0, 1.0)})
    widths = []
    for per_image in (4, 1):
        change = score(shifted, "two-pass", truth, resampling(400, per_image)).hr_change
        assert change is not None
        widths.append(change.high - change.low)
    assert widths[0] > 1.25 * widths[1]
    difference = hr_difference(shifted, "two-pass", "vanilla", truth, resampling(400, 4))
    assert difference == score(shifted, "two-pass", truth, resampling(400, 4)).hr_change


@pytest.mark.parametrize(
    ("corrected", "broken", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (6, 0, 2 / 2**6), (8, 2, 2 * (1 + 10 + 45) / 2**10), (3, 3, 1.0)],
)
def test_mcnemar_is_the_exact_binomial(corrected: int, broken: int, p: float) -> None:
    before = np.array([False] * corrected + [True] * broken + [True, False])
    after = np.array([True] * corrected + [False] * broken + [True, False])
    found = mcnemar(before, after)
    assert (found.corrected, found.broken, found.p) == (corrected, broken, pytest.approx(p))


def test_changed_answers_are_listed_with_their_direction() -> None:
    found = answered({"vanilla": ["yes", "yes", "no", "no"], "two-pass": ["no", "no", "yes", "no"]})
    changed = changed_answers(found, "two-pass", split([False, True, True, False]))
    assert [(one.item, one.corrected) for one in changed] == [(0, True), (1, False), (2, True)]


def test_methods_are_compared_at_equal_recall() -> None:
    truth = split([True] * 4 + [False] * 4)
    found = from_margins({"vanilla": np.array([4.0, 3, 2, -1, 1, 0, -2, -3])})
    assert hr_at_tpr(found, "vanilla", truth, 0.75) == 0.0
    assert hr_at_tpr(found, "vanilla", truth, 1.0) == 0.5
    assert auc_above(found, "vanilla", truth, 0.99) < auc_above(found, "vanilla", truth, 0.5) <= 1


def test_without_absent_objects_there_is_no_rate() -> None:
    found: Score = score(answered({"vanilla": ["yes"]}), "vanilla", split([True]), resampling(1))
    assert math.isnan(found.hr.mean) and math.isnan(found.auc)


@pytest.mark.parametrize("answer", [True, False])
def test_questions_that_all_have_one_answer_have_no_roc(answer: bool) -> None:
    found = from_margins({"vanilla": np.array([1.0, -1.0, 2.0])})
    assert all(np.isnan(rates).all() for rates in roc(found, "vanilla", split([answer] * 3)))
    assert math.isnan(hr_at_tpr(found, "vanilla", split([answer] * 3), 0.9))
