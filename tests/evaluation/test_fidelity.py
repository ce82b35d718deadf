from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from evaluation.fidelity import (
    Kept,
    States,
    divergence,
    fallback_curve,
    fidelity,
    first_difference,
    kept,
    projection,
    sensitivity,
)
from tests.evaluation.test_scores import from_margins


def test_projection_and_cosine_by_hand() -> None:
    target = torch.tensor([[3.0, 4.0]])
    assert projection(target, target) == (1.0, pytest.approx(1.0))
    assert projection(torch.tensor([[6.0, 8.0]]), target) == (2.0, pytest.approx(1.0))
    assert projection(torch.tensor([[-4.0, 3.0]]), target) == (0.0, 0.0)
    assert projection(torch.tensor([[3.0, 0.0]]), target) == (9 / 25, pytest.approx(9 / 15))
    assert projection(torch.zeros(1, 2), target) == (0.0, 0.0)
    assert all(map(math.isnan, projection(target, torch.zeros(1, 2))))


def test_divergence_by_hand() -> None:
    p, q = torch.tensor([0.75, 0.25]).log(), torch.tensor([0.5, 0.5]).log()
    assert divergence(p, q) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert divergence(p, p + 3) == pytest.approx(0.0, abs=1e-12)
    banned = torch.tensor([0.0, -torch.inf])
    assert divergence(banned, banned) == 0.0


def test_what_is_kept_of_the_edit_and_of_its_effect() -> None:
    zero = States([torch.zeros(2, 3)], torch.zeros(1, 3), torch.tensor([[0.0, 0.0]]))
    two = States([torch.ones(2, 3)], torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
    mine = States([torch.full((2, 3), 0.5)], torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
    (found,) = kept(zero, two, mine)
    assert (found.edit, found.edit_cosine) == (0.5, pytest.approx(1.0))
    assert (found.effect, found.effect_cosine) == (0.5, pytest.approx(1 / math.sqrt(2)))
    assert found.kl == 0.0 and found.kl_vanilla > 0.1


def test_answers_are_counted_and_intervals_are_over_images() -> None:
    answered = from_margins(
        {
            "vanilla": np.array([1.0, 1.0, -1.0, -1.0]),
            "two-pass": np.array([-0.5, 2.0, 0.5, -1.5]),
            "one-pass": np.array([-0.2, 1.5, -0.1, -1.2]),
        }
    )
    rows = [Kept(0.5, 0.6, 0.7, 0.8, 0.1, 0.2), Kept(0.9, 0.8, math.nan, math.nan, 0.3, 0.4)]
    found = fidelity(answered, "one-pass", rows, 100)
    assert (found.changed, found.followed) == (2, 1)
    assert (found.agreement, found.agreement_of_vanilla) == (0.75, 0.5)
    shifts = np.array([-1.2, 0.5, 0.9, -0.2]), np.array([-1.5, 1.0, 1.5, -0.5])
    assert found.shift_correlation == pytest.approx(np.corrcoef(*shifts)[0, 1])
    assert found.spearman == pytest.approx(1.0)
    assert found.edit_kept is not None and found.edit_kept.mean == pytest.approx(0.7)
    assert found.effect_kept is not None and found.effect_kept.mean == pytest.approx(0.7)
    assert found.kl == pytest.approx(0.2)


def test_doing_nothing_follows_nothing() -> None:
    same = np.array([1.0, -1.0, 1.0])
    answered = from_margins({"vanilla": same, "two-pass": np.array([-1.0, -2.0, 1.5]), "uniform": same})
    found = fidelity(answered, "uniform")
    assert math.isnan(found.shift_correlation) and math.isnan(found.spearman)
    assert (found.changed, found.followed, found.edit_kept) == (1, 0, None)


def test_sensitivity_says_whether_the_edit_can_be_felt() -> None:
    vanilla = np.array([4.0, -2.0] * 100)
    found = sensitivity(vanilla, vanilla + 0.01, 1.1, (0, 2))
    assert (found.shift, found.margin, found.changed) == (pytest.approx(0.01), 3.0, 0)
    assert not found.is_felt and "0 of 200 answers change" in found.in_words
    assert sensitivity(vanilla, vanilla - 5, 2.0, (0, 7)).is_felt


def test_the_curve_hands_over_the_least_confident_first() -> None:
    margins = {
        "vanilla": np.array([1.0, 1.0, -1.0, -1.0]),
        "two-pass": np.array([-0.5, 2.0, 0.5, -1.5]),
        "one-pass": np.array([1.2, 1.5, -0.1, -1.2]),
    }
    none, half, every = fallback_curve(margins, np.linspace(0, 1, 4), (0.0, 0.5, 1.0))
    distance = np.abs(margins["vanilla"] - margins["two-pass"]).mean()
    assert none.error == pytest.approx(np.abs(margins["one-pass"] - margins["two-pass"]).mean() / distance)
    assert half.error == pytest.approx((0.6 + 0.3) / 4 / distance)  # the first two are the least confident
    assert every.error == every.error_random == 0.0
    assert none.error_random == pytest.approx(none.error) and half.error_random > half.error


def test_where_captions_part() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
