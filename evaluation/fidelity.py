"""How far a method follows two-pass, judged by what two-pass changed: doing nothing wins at raw agreement."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from evaluation.methods import TWO_PASS, VANILLA
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
    shift, wanted = mine - vanilla, target - vanilla
    constant = shift.std() == 0 or wanted.std() == 0
    return Fidelity(
        shift_correlation=float("nan") if constant else float(np.corrcoef(shift, wanted)[0, 1]),
        flips=int(flipped.sum()),
        flips_followed=float(((mine > 0) == (target > 0))[flipped].mean()) if flipped.any() else float("nan"),
        agreement=float(((mine > 0) == (target > 0)).mean()),
        agreement_of_vanilla=float((~flipped).mean()),
    )
