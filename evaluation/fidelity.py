"""How far a method follows two-pass, judged by what two-pass changed: doing nothing wins at raw agreement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluation.methods import ONE_PASS, TWO_PASS, VANILLA
from evaluation.pope import Answers


@dataclass(frozen=True)
class Fidelity:
    """One method against two-pass, over all questions.

    Attributes:
        shift_correlation: Pearson r, over questions, between the method's shift of the yes margin from vanilla and
            two-pass's.
        flips: Answers that two-pass flipped.
        flips_followed: Share of those on which the method answers as two-pass does; NaN if there are none.
        agreement: Share of all answers equal to two-pass's. Vanilla's own is ``agreement_of_vanilla``.
        agreement_of_vanilla: The same for doing nothing, to show how little ``agreement`` says.
    """

    shift_correlation: float
    flips: int
    flips_followed: float
    agreement: float
    agreement_of_vanilla: float


def fidelity(answers: Answers, method: str) -> Fidelity:
    """Compares a method's answers with two-pass's."""
    vanilla, target, mine = (answers.margins[name] for name in (VANILLA, TWO_PASS, method))
    flipped = (target > 0) != (vanilla > 0)
    return Fidelity(
        shift_correlation=_correlation(mine - vanilla, target - vanilla),
        flips=int(flipped.sum()),
        flips_followed=float(((mine > 0) == (target > 0))[flipped].mean()) if flipped.any() else float("nan"),
        agreement=float(((mine > 0) == (target > 0)).mean()),
        agreement_of_vanilla=float((~flipped).mean()),
    )


@dataclass(frozen=True)
class FallbackPoint:
    """``auto`` with a threshold that hands a share of the questions to the diagnostic run.

    Attributes:
        share: Of the questions, those of lowest confidence first.
        shift_correlation: Against two-pass, as in ``Fidelity``.
        shift_correlation_random: The same with the share drawn at random: what the confidence adds is the difference.
        flips_followed: As in ``Fidelity``.
    """

    share: float
    shift_correlation: float
    shift_correlation_random: float
    flips_followed: float


def fallback_curve(answers: Answers, shares: Sequence[float], seed: int = 0, draws: int = 20) -> list[FallbackPoint]:
    """How ``auto`` follows two-pass as its threshold rises: each of its answers is one-pass's or two-pass's.

    Args:
        answers: With one-pass, two-pass and vanilla.
        shares: Of the questions to hand over, 0 to 1.
        seed: Of the random order.
        draws: Random orders to average over.
    """
    vanilla, target, mine = (answers.margins[name] for name in (VANILLA, TWO_PASS, ONE_PASS))
    flipped = (target > 0) != (vanilla > 0)
    generator = np.random.default_rng(seed)
    orders = [np.argsort(answers.confidence, kind="stable")]
    orders += [generator.permutation(len(mine)) for _ in range(draws)]

    def mixed(order: NDArray[np.int64], share: float) -> NDArray[np.float64]:
        handed = order[: round(share * len(order))]
        result = mine.copy()
        result[handed] = target[handed]
        return result

    points: list[FallbackPoint] = []
    for share in shares:
        by_confidence, *at_random = (mixed(order, share) for order in orders)
        follows = (by_confidence > 0) == (target > 0)
        points.append(
            FallbackPoint(
                share,
                _correlation(by_confidence - vanilla, target - vanilla),
                float(np.mean([_correlation(margins - vanilla, target - vanilla) for margins in at_random])),
                float(follows[flipped].mean()) if flipped.any() else float("nan"),
            )
        )
    return points


def _correlation(shift: NDArray[np.float64], wanted: NDArray[np.float64]) -> float:
    constant = shift.std() == 0 or wanted.std() == 0
    return float("nan") if constant else float(np.corrcoef(shift, wanted)[0, 1])
