"""How much of two-pass's edit a method keeps, and whether the model feels the edit at all.

Judged where it can't be luck: on the hidden states that the edit changes, and on next-token distributions. What
answers say hangs on the few that change; it stands beside, and not alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from evaluation.batches import Batch, Prompts, fresh
from evaluation.methods import ONE_PASS, TWO_PASS, VANILLA
from evaluation.scores import Answered
from predictor.metrics import Interval, bootstrap_interval
from scr_runtime.diagnostic import residual_stream
from scr_runtime.families import blocks_of

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class States:
    """What one run of a batch leaves behind the last edited block, and at its end.

    Attributes:
        visual: Per row, [N, d] states of its patches.
        last: [B, d] states of the last text row.
        logits: [B, V] of the next token.
    """

    visual: list[Tensor]
    last: Tensor
    logits: Tensor


@torch.no_grad()
def run_states(
    model: Any, prompts: Prompts, last_block: int, applied: AbstractContextManager[Any], batch: Batch
) -> States:
    """Runs a batch inside a method's context, and keeps what lies behind the last edited block.

    The edit is made in place on that block's output, so a reference to it sees the edit whichever hook comes first.
    """
    seen: list[Tensor] = []

    def keep(module: Any, arguments: Any, output: Any) -> None:
        seen[:] = [residual_stream(output)]  # the last run: a nested diagnostic passes here first

    handle = blocks_of(model)[last_block].register_forward_hook(keep)
    try:
        with applied:
            logits = model(**fresh(prompts.inputs), logits_to_keep=1).logits[:, -1].float()
    finally:
        handle.remove()
    hidden = seen[0]  # [B, S, d]
    flat = hidden.reshape(-1, hidden.shape[-1])
    positions = {
        image: group.positions[place]
        for group in batch.layout.groups
        for place, image in enumerate(group.images)
    }  # fmt: skip
    visual = [flat[torch.cat([positions[image] for image in images])].float() for images in batch.images]
    return States(visual, hidden[:, -1].float(), logits)


@dataclass(frozen=True)
class Kept:
    """What a method keeps of two-pass's edit on one prompt.

    Attributes:
        edit: <D, D2> / <D2, D2> over the patches' states behind the last edited block, where D is the method's
            difference from vanilla and D2 two-pass's: 1 for the same edit, 0 for one that has nothing to do with it.
        edit_cosine: Cosine of D and D2.
        effect: The same projection on the last text row, whose state makes the answer.
        effect_cosine: Cosine there.
        kl: KL(two-pass || method) of the next token, in nats.
        kl_vanilla: KL(two-pass || vanilla): what there was to keep.
    """

    edit: float
    edit_cosine: float
    effect: float
    effect_cosine: float
    kl: float
    kl_vanilla: float


def kept(vanilla: States, two: States, mine: States) -> list[Kept]:
    """Compares the runs of a batch, row by row."""
    rows: list[Kept] = []
    for n in range(len(two.visual)):
        edit, edit_cosine = projection(mine.visual[n] - vanilla.visual[n], two.visual[n] - vanilla.visual[n])
        effect, effect_cosine = projection(mine.last[n] - vanilla.last[n], two.last[n] - vanilla.last[n])
        kl = divergence(two.logits[n], mine.logits[n])
        rows.append(Kept(edit, edit_cosine, effect, effect_cosine, kl, divergence(two.logits[n], vanilla.logits[n])))
    return rows


def projection(mine: Tensor, target: Tensor) -> tuple[float, float]:
    """<mine, target> / <target, target> and the cosine; NaN where the target is 0, and a cosine of 0 where mine is."""
    mine, target = mine.double().flatten(), target.double().flatten()
    dot, own, size = float(mine @ target), float(mine @ mine), float(target @ target)
    if size == 0:
        return math.nan, math.nan
    return dot / size, dot / math.sqrt(own * size) if own else 0.0


def divergence(p_logits: Tensor, q_logits: Tensor) -> float:
    """KL(p || q) in nats, of two vectors of logits."""
    p, q = p_logits.double().log_softmax(-1), q_logits.double().log_softmax(-1)
    return max(float((p.exp() * (p - q)).nan_to_num(0.0).sum()), 0.0)  # a banned token is one in both


@dataclass(frozen=True)
class Fidelity:
    """One method against two-pass.

    Attributes:
        edit_kept: Mean over images, with its interval; `None` where hidden states were not compared.
        edit_cosine: Mean cosine.
        effect_kept: At the last text row.
        effect_cosine: Mean cosine there.
        kl: Mean KL(two-pass || method).
        kl_vanilla: Mean KL(two-pass || vanilla).
        spearman: Rank correlation of the shifts of the yes margin with two-pass's, over all questions.
        shift_correlation: Pearson r of the same: hangs on a few questions, and stands in the JSON file only.
        changed: Answers that two-pass changed.
        followed: How many of those the method answers as two-pass does.
        agreement: Share of all answers equal to two-pass's. Doing nothing has a high one too.
        agreement_of_vanilla: The same for doing nothing.
    """

    edit_kept: Interval | None
    edit_cosine: float
    effect_kept: Interval | None
    effect_cosine: float
    kl: float
    kl_vanilla: float
    spearman: float = math.nan
    shift_correlation: float = math.nan
    changed: int = 0
    followed: int = 0
    agreement: float = math.nan
    agreement_of_vanilla: float = math.nan


def fidelity(
    answered: Answered | None, method: str, rows: Sequence[Kept] = (), resamples: int = 2000, seed: int = 0
) -> Fidelity:
    """Sums up how a method follows two-pass.

    Args:
        answered: With two-pass and vanilla; `None` where hidden states alone are compared.
        method: Which method.
        rows: Its comparison of hidden states, one row per image.
        resamples: Behind the intervals.
        seed: Of the resamples.
    """

    def mean(name: str) -> float:
        values = np.array([getattr(row, name) for row in rows], dtype=np.float64)
        return float(np.nanmean(values)) if np.isfinite(values).any() else math.nan

    def interval(name: str) -> Interval | None:
        values = np.array([getattr(row, name) for row in rows], dtype=np.float64)
        values = values[np.isfinite(values)]
        return bootstrap_interval(values, np.arange(len(values)), resamples, seed) if len(values) else None

    return Fidelity(
        edit_kept=interval("edit"),
        edit_cosine=mean("edit_cosine"),
        effect_kept=interval("effect"),
        effect_cosine=mean("effect_cosine"),
        kl=mean("kl"),
        kl_vanilla=mean("kl_vanilla"),
        **({} if answered is None else _followed(answered, method)),
    )


def _followed(answered: Answered, method: str) -> dict[str, Any]:
    """The part of `Fidelity` that answers tell."""
    vanilla, target, mine = (answered.margins[name] for name in (VANILLA, TWO_PASS, method))
    before, wanted, own = (answered.parsed[name][0] for name in (VANILLA, TWO_PASS, method))
    changed = wanted != before
    return {
        "spearman": _spearman(mine - vanilla, target - vanilla),
        "shift_correlation": _correlation(mine - vanilla, target - vanilla),
        "changed": int(changed.sum()),
        "followed": int((own == wanted)[changed].sum()),
        "agreement": float((own == wanted).mean()),
        "agreement_of_vanilla": float((~changed).mean()),
    }


@dataclass(frozen=True)
class Sensitivity:
    """How far the model feels two-pass's edit.

    Attributes:
        strength: Of the edit.
        layers: First and last edited block.
        shift: Median |shift of the yes margin|, in logits.
        margin: Median |yes margin| of vanilla.
        changed: Questions whose margin changed its sign.
        questions: Questions asked.
    """

    strength: float
    layers: tuple[int, int]
    shift: float
    margin: float
    changed: int
    questions: int

    @property
    def is_felt(self) -> bool:
        """Whether any choice of sources could show in answers: at least 1 in 100 answers changes."""
        return self.changed >= max(0.01 * self.questions, 1)

    @property
    def in_words(self) -> str:
        """For the report."""
        blocks = f"blocks {self.layers[0]} to {self.layers[1]}"
        return (
            f"at strength {self.strength:.2f} over {blocks} the median shift of the yes margin is {self.shift:.3f}, "
            f"of margins of {self.margin:.2f} logits, and {self.changed} of {self.questions} answers change"
        )


def sensitivity(vanilla: Floats, edited: Floats, strength: float, layers: tuple[int, int]) -> Sensitivity:
    """Compares yes margins [Q] of vanilla and two-pass."""
    return Sensitivity(
        strength, layers, float(np.median(np.abs(edited - vanilla))), float(np.median(np.abs(vanilla))),
        int(((edited > 0) != (vanilla > 0)).sum()), len(vanilla),
    )  # fmt: skip


@dataclass(frozen=True)
class FallbackPoint:
    """`auto` with a threshold that hands a share of the questions to the diagnostic run.

    Attributes:
        share: Of the questions, those of lowest confidence first.
        error: Mean |margin - two-pass's margin|, as a share of vanilla's.
        error_random: The same with the share drawn at random: what the confidence adds is the difference.
        shift_correlation: Pearson r of the margin shifts with two-pass's; for the JSON file.
    """

    share: float
    error: float
    error_random: float
    shift_correlation: float


def fallback_curve(
    margins: Mapping[str, Floats], confidence: Floats, shares: Sequence[float], seed: int = 0, draws: int = 20
) -> list[FallbackPoint]:
    """How `auto` follows two-pass as its threshold rises: each of its answers is one-pass's or two-pass's.

    Args:
        margins: Method -> [Q], with one-pass, two-pass and vanilla.
        confidence: [Q] of the predictor.
        shares: Of the questions to hand over, 0 to 1.
        seed: Of the random order.
        draws: Random orders to average over.
    """
    vanilla, target, mine = (margins[name] for name in (VANILLA, TWO_PASS, ONE_PASS))
    generator = np.random.default_rng(seed)
    orders = [np.argsort(confidence, kind="stable"), *(generator.permutation(len(mine)) for _ in range(draws))]
    scale = float(np.abs(vanilla - target).mean()) or math.nan

    def mixed(order: NDArray[np.int64], share: float) -> Floats:
        handed = order[: round(share * len(order))]
        result = mine.copy()
        result[handed] = target[handed]
        return result

    def error(values: Floats) -> float:
        return float(np.abs(values - target).mean()) / scale

    points: list[FallbackPoint] = []
    for share in shares:
        chosen, *at_random = (mixed(order, share) for order in orders)
        correlation = _correlation(chosen - vanilla, target - vanilla)
        points.append(FallbackPoint(share, error(chosen), float(np.mean(list(map(error, at_random)))), correlation))
    return points


def first_difference(mine: Sequence[int], other: Sequence[int]) -> int | None:
    """Tokens that two captions have in common at their start; `None` if they are equal."""
    if list(mine) == list(other):
        return None
    pairs = zip(mine, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(mine), len(other)))


def _correlation(shift: Floats, wanted: Floats) -> float:
    constant = shift.std() == 0 or wanted.std() == 0
    return math.nan if constant else float(np.corrcoef(shift, wanted)[0, 1])


def _spearman(shift: Floats, wanted: Floats) -> float:
    constant = shift.std() == 0 or wanted.std() == 0
    return math.nan if constant else float(np.corrcoef(stats.rankdata(shift), stats.rankdata(wanted))[0, 1])
