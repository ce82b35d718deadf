from __future__ import annotations

import math

import numpy as np
import pytest

from evaluation.fidelity import fallback_curve, fidelity
from evaluation.methods import ONE_PASS, TWO_PASS, UNIFORM, VANILLA
from evaluation.pope import Answers


def make(vanilla: list[float], two_pass: list[float], one_pass: list[float]) -> Answers:
    count = len(vanilla)
    return Answers(
        image=np.arange(count),
        truth=np.ones(count, dtype=bool),
        splits={},
        margins={
            VANILLA: np.array(vanilla),
            TWO_PASS: np.array(two_pass),
            ONE_PASS: np.array(one_pass),
            UNIFORM: np.array(vanilla),
        },
        entropy=np.zeros(count),
        confidence=np.linspace(0, 1, count),
        fallback=0.0,
    )


def test_flips_and_shifts() -> None:
    answers = make([1.0, 1.0, -1.0, -1.0], [-0.5, 2.0, 0.5, -1.5], [-0.2, 1.5, -0.1, -1.2])
    found = fidelity(answers, ONE_PASS)
    assert (found.flips, found.flips_followed) == (2, 0.5)
    assert (found.agreement, found.agreement_of_vanilla) == (0.75, 0.5)
    shifts = np.array([-1.2, 0.5, 0.9, -0.2]), np.array([-1.5, 1.0, 1.5, -0.5])
    assert found.shift_correlation == pytest.approx(np.corrcoef(*shifts)[0, 1])


def test_doing_nothing_follows_nothing() -> None:
    found = fidelity(make([1.0, -1.0, 1.0], [-1.0, -2.0, 1.5], [0.0, 0.0, 0.0]), UNIFORM)
    assert math.isnan(found.shift_correlation)
    assert found.flips_followed == 0.0


def test_without_flips_there_is_nothing_to_follow() -> None:
    assert math.isnan(fidelity(make([1.0, -1.0], [2.0, -2.0], [1.5, -1.0]), ONE_PASS).flips_followed)


def test_the_curve_hands_over_the_least_confident_first() -> None:
    answers = make([1.0, 1.0, -1.0, -1.0], [-0.5, 2.0, 0.5, -1.5], [1.2, 1.5, -0.1, -1.2])
    none, half, every = fallback_curve(answers, (0.0, 0.5, 1.0))
    assert none.shift_correlation == pytest.approx(fidelity(answers, ONE_PASS).shift_correlation)
    assert none.shift_correlation_random == pytest.approx(none.shift_correlation)
    mixed = np.array([-1.5, 1.0, 0.9, -0.2])  # the first two are the least confident: two-pass's there
    assert half.shift_correlation == pytest.approx(np.corrcoef(mixed, [-1.5, 1.0, 1.5, -0.5])[0, 1])
    assert (none.flips_followed, half.flips_followed, every.flips_followed) == (0.0, 0.5, 1.0)
    assert every.shift_correlation == pytest.approx(1)
