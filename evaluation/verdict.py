"""What a comparison shows, in sentences: the verdict first, then what its numbers say and what they do not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from evaluation.compare import Comparison, Prompted
from evaluation.methods import AUTO, ONE_PASS, ONLINE, TWO_PASS, VANILLA
from predictor.metrics import Interval

Kind = Literal["gain", "none", "harm", "unclear", "insensitive", "open"]
_ENOUGH = 10  # changed answers under which a share of them is no figure
_VISIBLE = 1.0  # points; a comparison that can't see so large a change says nothing
_TELLING = 200  # questions from which on unchanged answers say something about the model

_EMBEDDED = (
    "This small world shows that the chain works: harvest, fit, export, the edit, and how closely one-pass follows "
    "two-pass. It does not show that SCR lowers hallucination in real models; for that, run it on COCO and POPE. "
    "Prefill ratios here are dominated by Python overhead on so small a model; benchmarks/prefill.py measures them at "
    "a size that means something."
)


@dataclass(frozen=True)
class Verdict:
    """The conclusion of a comparison.

    Attributes:
        kind: gain; harm; none: no effect beyond noise or beyond the controls; unclear: too few questions;
            insensitive: the model does not feel the edit; open: no yes/no questions were asked.
        sentence: For a manager.
        reason: Why, with the figures.
    """

    kind: Kind
    sentence: str
    reason: str


def verdict(comparison: Comparison) -> Verdict:
    """Judges the method that would be deployed: one-pass if there is one, else two-pass."""
    headline, quiz = comparison.headline, comparison.quiz
    if headline is None and quiz is not None:
        return Verdict(
            "open", "No verdict: these pictures have no annotations, so there is no hallucination rate.",
            "This report says how closely the predictor follows two-pass, and what a prefill costs. For a verdict, "
            "ask questions with known answers: evaluation.pope_files=FILE evaluation.images_dir=FOLDER behind python "
            "-m evaluation.",
        )  # fmt: skip
    if headline is None or quiz is None:
        return Verdict("open", "No verdict: no yes/no questions were asked.", "Add pope to evaluation.benchmarks.")
    method = deployed(comparison)
    if method is None:
        return Verdict("open", "No verdict: no method with an edit was asked.", "Add two-pass to evaluation.methods.")
    absent = int((~quiz.splits[quiz.headline].truth).sum())
    if not absent:
        return Verdict(
            "open", "No verdict: no question is about an absent object, so there is no hallucination rate.",
            f"All {len(quiz.splits[quiz.headline].ids):,} {quiz.headline} questions have the answer yes: add some "
            "with no.",
        )  # fmt: skip
    score = headline.scores[method, quiz.headline]
    change, accuracy = score.hr_change, score.accuracy_change
    assert change is not None and accuracy is not None
    # a file of one's own is called questions.json
    named = "questions" if quiz.headline == "questions" else f"{quiz.headline} questions"
    where = f"{len(quiz.splits[quiz.headline].ids):,} {named}, prompt {headline.name}"
    base = f"{method} changes the hallucination rate by {points(change)} points ({where})"
    felt = comparison.sensitivity
    if change.high < 0 and accuracy.high >= 0:
        beaten, unbeaten = _controls(headline, method, quiz.headline)
        if not beaten and not unbeaten:
            return Verdict("open", f"{method} lowers the hallucination rate; no control was asked.", f"{base}.")
        if not unbeaten:
            cost = _cost(comparison, method)
            return Verdict(
                "gain", f"HR {points(change)} points with {method}, beyond all {len(beaten)} controls{cost}.",
                f"{base}; minus each control's the change stays below 0.",
            )  # fmt: skip
        return Verdict(
            "none", "No effect beyond controls: don't deploy.",
            f"{base}, but {', '.join(unbeaten)} can't be told from it: the gain does not come from where the sources "
            "are.",
        )  # fmt: skip
    if change.low > 0 or accuracy.high < 0:
        return Verdict("harm", f"{method} makes answers worse: don't deploy.",
                       f"{base}, accuracy by {points(accuracy)}.")  # fmt: skip
    if felt and felt[0].questions >= _TELLING and not any(one.is_felt for one in felt):
        return Verdict(
            "insensitive",
            "This model does not feel the edit, so no choice of sources can show an effect: don't deploy.",
            f"{base}; {felt[-1].in_words}.",
        )  # fmt: skip
    return _nothing_shown(base, change, absent, f"; {felt[0].in_words}." if felt else ".")


def _nothing_shown(base: str, change: Interval, absent: int, felt: str) -> Verdict:
    """No change beyond noise: none to be seen, or too few questions about absent objects to see one."""
    # where nothing changed, 3/n (Hanley and Lippman-Hand, JAMA 1983): the upper end of 95 % for 0 of n
    seen = max(50 * (change.high - change.low), 300 / absent)
    unclear = seen > _VISIBLE
    return Verdict(
        "unclear" if unclear else "none",
        "Too few questions to say: don't deploy on this alone." if unclear else "No effect shown: don't deploy.",
        f"{base}: not distinguishable from none. Changes under about {seen:.1f} points can't be seen with {absent:,} "
        f"questions about absent objects{felt}",
    )  # fmt: skip


def deployed(comparison: Comparison) -> str | None:
    """The row that a deployment would be."""
    return next((name for name in (ONE_PASS, AUTO, TWO_PASS) if name in comparison.names), None)


def _controls(headline: Prompted, method: str, split: str) -> tuple[list[str], list[str]]:
    """Controls that the method beats, and those that it does not: HR lower beyond the interval."""
    beaten: list[str] = []
    unbeaten: list[str] = []
    for (own, control, where), difference in headline.differences.items():
        if own == method and where == split and control != ONLINE:
            (beaten if difference.high < 0 else unbeaten).append(control)
    return beaten, unbeaten


def _cost(comparison: Comparison, method: str) -> str:
    if method not in comparison.costs or VANILLA not in comparison.costs:
        return ""
    added = comparison.costs[method].milliseconds - comparison.costs[VANILLA].milliseconds
    return f", at {added:+.1f} ms per prefill ({comparison.costs[method].ratio:.2f}x)"


def essentials(comparison: Comparison, *, embedded: bool) -> list[str]:
    """What a terminal has room for: why the verdict is what it is, and the most telling sentences of ``reading``."""
    headline, quiz = comparison.headline, comparison.quiz
    lines = [verdict(comparison).reason]
    if headline is not None and quiz is not None:
        lines += _if_few(len(quiz.splits[quiz.headline].ids)) + _about_effect(comparison, headline, quiz.headline)
    return lines + _about_fidelity(comparison)[:1] + [_EMBEDDED] * embedded


def reading(comparison: Comparison, *, embedded: bool) -> list[str]:
    """What the numbers show and what they do not, sentence by sentence."""
    headline, quiz = comparison.headline, comparison.quiz
    lines: list[str] = []
    if headline is not None and quiz is not None:
        questions, parser = len(quiz.splits[quiz.headline].ids), comparison.facts["parser"]
        read_by = parser if parser.startswith("no ") else f"parser: {parser}"
        lines.append(
            f"{len(quiz.images):,} images, {questions:,} {quiz.headline} questions; prompt {headline.name}; answers: "
            f"{comparison.facts['decoding']}; {read_by}. Rates in percent, changes in percentage "
            "points against vanilla with 95 % intervals over images."
        )
        lines += quiz.notes
        lines += _if_few(questions) + _about_effect(comparison, headline, quiz.headline)
        lines += _about_answers(comparison, headline)
    elif quiz is not None:
        lines.append(
            f"{len(quiz.images):,} pictures that the predictor was not fitted to, each with one of the harvest's "
            "prompts. Shares of two-pass's edit with 95 % intervals over pictures."
        )
    lines += _about_fidelity(comparison) + _about_sensitivity(comparison) + _about_auto(comparison)
    if comparison.analysis is not None and math.isfinite(comparison.analysis.by_image):
        one = comparison.analysis
        lines.append(
            f"Credit entropy {one.entropy:.2f} nats ({one.entropy_normalised:.3f} of ln N); against vanilla's "
            f"hallucination rate, over images: r = {one.by_image:.2f} (the paper finds about -.6 to -.7)."
        )
    return lines + [_EMBEDDED] * embedded


def _if_few(questions: int) -> list[str]:
    if questions >= 300:
        return []
    return [
        f"{questions} questions are few: a rate of 10 % has an interval of about ±"
        f"{196 * math.sqrt(0.09 / max(questions / 2, 1)):.0f} points. Take these figures as a trial of the chain."
    ]


def _about_effect(comparison: Comparison, headline: Prompted, split: str) -> list[str]:
    if TWO_PASS not in comparison.names:
        return []
    two = headline.scores[TWO_PASS, split].hr_change
    assert two is not None
    lines = [f"Two-pass changes the {split} HR by {points(two)}: {_direction(two)}."]
    controls = [
        f"{control} {points(change)}"
        for (method, control, where), change in headline.differences.items()
        if method == TWO_PASS and where == split and control != ONLINE
    ]
    if controls:
        lines.append(
            f"Two-pass's HR minus each control's: {'; '.join(controls)}. Only what stays below 0 against all of them "
            "comes from where two-pass's sources are."
        )
    for (method, other, where), change in headline.differences.items():
        if method.split(":")[0] == ONE_PASS and other == ONLINE and where == split:
            better = "the predictor is worth its fit" if change.high < 0 else "not shown to be worth a fit"
            lines.append(f"{method}'s HR minus that of online, which needs no predictor: {points(change)}: {better}.")
    return lines


def _about_answers(comparison: Comparison, headline: Prompted) -> list[str]:
    lines: list[str] = []
    quiz = comparison.quiz
    assert quiz is not None
    vanilla = headline.scores[VANILLA, quiz.headline]
    if comparison.settings.decoding != "margin":
        unread = sum(headline.scores[VANILLA, split].unread for split in quiz.splits)
        lines.append(
            f"Margin and generated answer disagree on {100 * vanilla.disagrees:.1f} % of the questions (vanilla); the "
            f"three parsers disagree on {100 * headline.answered.parser_matters:.1f} % of the answers; {unread} "
            "answers are neither yes nor no, and count as wrong."
        )
    for name in (TWO_PASS, ONE_PASS):
        test = headline.scores[name, quiz.headline].mcnemar if name in comparison.names else None
        if test is not None:
            answers = "1 answer" if test.corrected == 1 else f"{test.corrected} answers"
            lines.append(
                f"{name} corrects {answers} and breaks {test.broken} (McNemar's exact test: p = {test.p:.2g})."
            )
    return lines


def _about_fidelity(comparison: Comparison) -> list[str]:
    lines: list[str] = []
    for name, found in comparison.fidelity.items():
        if name.split(":")[0] != ONE_PASS:
            continue
        if found.edit_kept is not None and found.effect_kept is not None:
            lines.append(
                f"{name} keeps {share(found.edit_kept)} of two-pass's edit (cosine {found.edit_cosine:.2f}), and "
                f"{share(found.effect_kept)} of its effect on the last text row (cosine {found.effect_cosine:.2f}); "
                f"KL of the next token to two-pass's {found.kl:.2g} nats, vanilla's {found.kl_vanilla:.2g}."
            )
        followed = f"it follows {found.followed} of the {found.changed} answers that two-pass changes"
        if found.changed < _ENOUGH:
            followed += ": too few to make a share of"
        if math.isfinite(found.spearman):
            lines.append(
                f"{name}: rank correlation of the margin shifts with two-pass's {found.spearman:.2f}; {followed}."
            )
    control = comparison.fidelity.get("uniform")
    if lines and control is not None and control.edit_kept is not None:
        lines.append(f"Random sources keep {share(control.edit_kept)} of the edit: the floor of that measure.")
    return lines


def _about_sensitivity(comparison: Comparison) -> list[str]:
    if not comparison.sensitivity:
        return []
    words = "Sensitivity: " + "; ".join(one.in_words for one in comparison.sensitivity) + "."
    if not any(one.is_felt for one in comparison.sensitivity):
        words += (
            " Such a model can show no effect of any choice of sources: differences between methods here are noise, "
            "whatever their signs."
        )
    elif not comparison.sensitivity[0].is_felt:
        words += " At the configured strength hardly any answer can change; a stronger edit could show an effect."
    return [words]


def _about_auto(comparison: Comparison) -> list[str]:
    lines: list[str] = []
    for name, curve in comparison.curves.items():
        half = next(point for point in curve if point.share == 0.3)
        if not math.isfinite(half.error):
            continue
        lines.append(
            f"auto behind {name}: handing over the 30 % least confident questions leaves {100 * half.error:.0f} % of "
            f"vanilla's distance to two-pass, {100 * half.error_random:.0f} % if drawn at random."
        )
    shares = [f"{name} {100 * value:.0f} %" for name, value in comparison.fallback.items()]
    return lines + ([f"Handed to the diagnostic run: {', '.join(shares)} of the questions."] if shares else [])


def _direction(change: Interval) -> str:
    if change.high < 0:
        return "lower, beyond noise"
    return "higher, beyond noise" if change.low > 0 else "not distinguishable from none"


def points(interval: Interval) -> str:
    """Percentage points with their interval."""
    return f"{100 * interval.mean:+.1f} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"


def share(interval: Interval) -> str:
    """A share with its interval."""
    mean, low, high = (round(100 * value) for value in interval)  # whole numbers: no -0
    return f"{mean} % [{low}, {high}]"
