"""Scores of yes/no answers: rates with paired bootstrap intervals over images, McNemar's test, changed answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import roc_auc_score, roc_curve

from evaluation.answers import AnswerStore
from evaluation.decoding import parse_margin
from evaluation.methods import SHIFT, TWO_PASS, VANILLA, Method
from evaluation.parsers import NEITHER, PARSERS, YES
from evaluation.questions import Quiz, Split
from evaluation.settings import ParserName
from predictor.metrics import Interval, bootstrap_interval

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Answered:
    """All answers to one prompt, read.

    Attributes:
        margins: Method -> [Q] yes margin.
        parsed: Method -> [S, Q] yes, no or neither; S sampled answers, or one.
        parser_matters: Share of vanilla's answers on which the three parsers disagree.
    """

    margins: Mapping[str, Floats]
    parsed: Mapping[str, NDArray[np.str_]]
    parser_matters: float

    def yes(self, method: str) -> Floats:
        """[Q] share of a question's answers that are yes."""
        return (self.parsed[method] == YES).mean(0)

    def right(self, method: str, truth: NDArray[np.bool_]) -> Floats:
        """[Q] share of a question's answers that are right; one that is neither yes nor no is wrong."""
        wanted = np.where(truth, "yes", "no")
        return (self.parsed[method] == wanted).mean(0)


def read_answers(
    quiz: Quiz, stores: Mapping[str, AnswerStore], methods: Sequence[Method],
    seeds: Mapping[str, Sequence[int | None]], parser: ParserName, text: bool,
) -> Answered:  # fmt: skip
    """Parses what was answered, and derives the constant shift.

    Args:
        quiz: The questions.
        stores: Method -> its answers.
        methods: Rows of the tables.
        seeds: Method -> seeds of its answers.
        parser: How texts are read.
        text: Whether texts were generated; else the margin's sign is the answer.
    """
    margins: dict[str, Floats] = {}
    parsed: dict[str, NDArray[np.str_]] = {}
    items = range(len(quiz.items))
    matters = 0.0
    for method in methods:
        if method.base == SHIFT:
            continue
        store, own = stores[method.name], seeds[method.name]
        margins[method.name] = np.array([store[item, own[0]].margin for item in items], dtype=np.float64)
        sampled_or_text = text or own[0] is not None
        read = PARSERS[parser]
        parsed[method.name] = np.array(
            [
                [
                    read(store[item, seed].text) if sampled_or_text else parse_margin(store[item, seed].margin or 0.0)
                    for item in items
                ]
                for seed in own
            ]
        )
        if method.name == VANILLA and text:
            answers = [store[item, own[0]].text for item in items]
            matters = float(np.mean([len({parse(answer) for parse in PARSERS.values()}) > 1 for answer in answers]))
    if any(method.base == SHIFT for method in methods):
        before = margins[VANILLA]
        margins[SHIFT] = before + (margins[TWO_PASS] - before).mean()
        flipped = (margins[SHIFT] > 0) != (before > 0)
        sign = np.where(margins[SHIFT] > 0, "yes", "no")
        parsed[SHIFT] = np.where(flipped, sign, parsed[VANILLA][0])[None]
    return Answered(margins, parsed, matters)


@dataclass(frozen=True)
class McNemar:
    """Answers that a method corrected and broke, against vanilla's.

    Attributes:
        corrected: Wrong before, right now.
        broken: Right before, wrong now.
        p: Two-sided exact probability of so uneven a split, if both were as likely; 1 where nothing changed.
    """

    corrected: int
    broken: int
    p: float


def mcnemar(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> McNemar:
    """McNemar's exact test on paired right/wrong answers [Q]."""
    corrected, broken = int((~before & after).sum()), int((before & ~after).sum())
    both = corrected + broken
    p = stats.binomtest(corrected, both).pvalue if both else 1.0
    return McNemar(corrected, broken, float(p))


@dataclass(frozen=True)
class Score:
    """One method on one split under one prompt.

    Attributes:
        hr: Hallucination rate FP / (FP + TN) over absent objects, with its interval; an answer that is neither yes
            nor no is no hallucination.
        accuracy: Share of right answers; neither yes nor no is wrong.
        precision: TP / (TP + FP); NaN if nothing is affirmed.
        tpr: Recall, "yes" to present objects.
        f1: Of precision and recall.
        yes_ratio: Share of answers that are yes.
        auc: Area under the ROC curve of the yes margin.
        unread: Answers that are neither yes nor no.
        disagrees: Share of questions where the margin's sign and the answer differ.
        hr_change: HR minus vanilla's, paired over images; `None` for vanilla.
        accuracy_change: Accuracy minus vanilla's.
        tpr_change: TPR minus vanilla's.
        mcnemar: Right and wrong answers against vanilla's; `None` for vanilla.
    """

    hr: Interval
    accuracy: float
    precision: float
    tpr: float
    f1: float
    yes_ratio: float
    auc: float
    unread: int
    disagrees: float
    hr_change: Interval | None = None
    accuracy_change: Interval | None = None
    tpr_change: Interval | None = None
    mcnemar: McNemar | None = None


@dataclass(frozen=True)
class Resampling:
    """Paired bootstrap over images.

    Attributes:
        images: [Q] image of each question.
        resamples: How often images are drawn.
        seed: Of the draws: the same images for every method.
    """

    images: NDArray[np.int64]
    resamples: int
    seed: int

    def interval(self, values: Floats, rows: NDArray[np.bool_] | None = None) -> Interval:
        """Mean over questions with its 95 % interval; `rows` [Q] chooses among them."""
        images = self.images
        if rows is not None:
            values, images = values[rows], images[rows]
        if not len(values):
            return Interval(math.nan, math.nan, math.nan)
        return bootstrap_interval(values, images, self.resamples, self.seed)


def score(answered: Answered, method: str, split: Split, resampling: Resampling) -> Score:
    """Scores one method on one split.

    Args:
        answered: All answers under one prompt.
        method: One of `answered.parsed`.
        split: Which questions, and their truth.
        resampling: Of all questions' images.
    """
    rows, truth = split.rows, split.truth
    own = Resampling(resampling.images[rows], resampling.resamples, resampling.seed)
    yes, right = answered.yes(method)[rows], answered.right(method, _truth(answered, split))[rows]
    margin, parsed = answered.margins[method][rows], answered.parsed[method][:, rows]
    true_yes, false_yes = yes[truth].sum(), yes[~truth].sum()
    precision = float(true_yes / (true_yes + false_yes)) if true_yes + false_yes else math.nan
    tpr = float(yes[truth].mean()) if truth.any() else math.nan
    found = Score(
        hr=own.interval(yes, ~truth),
        accuracy=float(right.mean()),
        precision=precision,
        tpr=tpr,
        f1=float(2 * precision * tpr / (precision + tpr)) if true_yes else 0.0,
        yes_ratio=float(yes.mean()),
        auc=float(roc_auc_score(truth, margin)) if 0 < truth.sum() < len(truth) else math.nan,
        unread=int((parsed == NEITHER).sum()),
        disagrees=float(np.mean((parsed == YES) != (margin > 0))),
    )
    if method == VANILLA:
        return found
    before_yes = answered.yes(VANILLA)[rows]
    before = answered.right(VANILLA, _truth(answered, split))[rows]
    return Score(
        **{**vars(found),
           "hr_change": own.interval(yes - before_yes, ~truth),
           "accuracy_change": own.interval(right - before),
           "tpr_change": own.interval(yes - before_yes, truth),
           "mcnemar": mcnemar(before > 0.5, right > 0.5)}
    )  # fmt: skip


def hr_difference(answered: Answered, method: str, other: str, split: Split, resampling: Resampling) -> Interval:
    """HR of a method minus that of another, paired over images."""
    rows = split.rows
    own = Resampling(resampling.images[rows], resampling.resamples, resampling.seed)
    return own.interval(answered.yes(method)[rows] - answered.yes(other)[rows], ~split.truth)


def roc(answered: Answered, method: str, split: Split) -> tuple[Floats, Floats]:
    """False and true positive rates of the yes margin, by falling threshold; NaN where all answers are the same."""
    if split.truth.all() or not split.truth.any():
        return np.full(2, np.nan), np.full(2, np.nan)
    false_rate, true_rate, _ = roc_curve(split.truth, answered.margins[method][split.rows], drop_intermediate=False)
    return false_rate, true_rate


def hr_at_tpr(answered: Answered, method: str, split: Split, tpr: float) -> float:
    """Hallucination rate of the yes margin at the threshold that reaches a TPR: methods at equal recall."""
    return float(_least_false(answered, method, split, np.array([tpr]))[0])


def auc_above(answered: Answered, method: str, split: Split, tpr: float) -> float:
    """Mean true-negative rate over TPR from `tpr` to 1: AUC in the range where a model is used."""
    return float(1.0 - _least_false(answered, method, split, np.linspace(tpr, 1.0, 101)).mean())


def _least_false(answered: Answered, method: str, split: Split, wanted: Floats) -> Floats:
    """The lowest false positive rates at which true positive rates are reached."""
    false_rate, true_rate = roc(answered, method, split)
    if np.isnan(true_rate).any():
        return np.full(len(wanted), np.nan)
    return false_rate[np.searchsorted(true_rate, wanted - 1e-9)]


def _truth(answered: Answered, split: Split) -> NDArray[np.bool_]:
    """[Q] truth of a split's questions at their places among all; others are not looked at."""
    whole = np.zeros(answered.parsed[VANILLA].shape[1], dtype=bool)
    whole[split.rows] = split.truth
    return whole


@dataclass(frozen=True)
class Changed:
    """A question whose answer a method changed.

    Attributes:
        item: Its place.
        method: Which method.
        corrected: Whether the new answer is right.
        label: The right answer.
        before: Vanilla's answer.
        after: The method's.
    """

    item: int
    method: str
    corrected: bool
    label: str
    before: str
    after: str


def changed_answers(answered: Answered, method: str, split: Split) -> list[Changed]:
    """Corrected and newly broken answers of one split, of the first sampling seed."""
    found: list[Changed] = []
    for item, truth in zip(split.rows.tolist(), split.truth.tolist(), strict=True):
        before, after = str(answered.parsed[VANILLA][0, item]), str(answered.parsed[method][0, item])
        label = "yes" if truth else "no"
        if before != after and label in (before, after):
            found.append(Changed(item, method, after == label, label, before, after))
    return found
