"""Source providers: the state layer's output in (block 0's, in the paper), one score per visual token out.

The same edit follows whichever provider was asked (decision D2):

    predicted   the SourcePredictor                                              one-pass
    diagnosed   a nested run of the next blocks on the same output               two-pass
    auto        the predictor, and the diagnostic for rows of low confidence
    uniform     a seeded random draw, the control
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scr_runtime.config import Mode
from scr_runtime.diagnostic import StateLayerOutput
from scr_runtime.layout import ImageGroup
from scr_runtime.network import SourcePredictor
from scr_runtime.rule import SourceRule, source_rule

ONE_PASS, TWO_PASS, UNIFORM = "one-pass", "two-pass", "uniform"
LOW_CONFIDENCE, DRIFT, NOT_FINITE, NO_PREDICTOR = "low confidence", "drift", "not finite", "no predictor"
FALLBACKS = (LOW_CONFIDENCE, DRIFT, NOT_FINITE, NO_PREDICTOR)


@dataclass(frozen=True)
class Fallback:
    """Why the diagnostic run stood in for the predictor.

    Attributes:
        kind: One of ``FALLBACKS``.
        reason: The same in a sentence, with the values that decided.
    """

    kind: str
    reason: str


@dataclass
class Scores:
    """What a provider says about the images of one group.

    Attributes:
        scores: [I, N] float32.
        rule: How sources are chosen from them.
        providers: Per image, who scored it: ``"one-pass"``, ``"two-pass"`` or ``"uniform"``.
        fallbacks: Per image, why the diagnostic run stood in for the predictor; ``None`` where it did not.
        predicted: [I, N] the predictor's scores, also where others stood in; ``None`` if it was not asked.
        spread: [I] spread of the features that it read; ``None`` if it was not asked or has no drift guard.
    """

    scores: Tensor
    rule: SourceRule
    providers: list[str]
    fallbacks: list[Fallback | None]
    predicted: Tensor | None = None
    spread: Tensor | None = None


Provider = Callable[[StateLayerOutput], list[Scores]]
"""State layer output -> Scores per group of the layout, in order."""


def provider_of(
    mode: Mode, predictor: SourcePredictor | None, reason: str | None, threshold: float, seed: int
) -> Provider:
    """The provider of a mode.

    Args:
        mode: Of the SCR.
        predictor: ``None`` if there is none that can be used: the diagnostic run then stands in for it.
        reason: Why there is none, where the mode would ask it.
        threshold: Confidence under which ``"auto"`` falls back.
        seed: Of the uniform draw.
    """
    if mode == "uniform":
        return uniform(seed)
    if mode in ("two-pass", "off") or predictor is None:
        return diagnosed(None if reason is None else Fallback(NO_PREDICTOR, reason))
    return predicted(predictor) if mode == "one-pass" else auto(predictor, threshold)


def predicted(predictor: SourcePredictor) -> Provider:
    """One-pass: the predictor alone."""

    def provide(state: StateLayerOutput) -> list[Scores]:
        results: list[Scores] = []
        for group in state.layout.groups:
            question = state.question(group) if predictor.config.reads_question else None
            given = (state.states(group), group.grid, question)
            guarded = predictor.drift_limit is not None
            scores, spread = predictor.score_and_spread(*given) if guarded else (predictor(*given), None)
            result = _scores(state, group, scores, ONE_PASS)
            result.predicted, result.spread = scores, spread
            results.append(result)
        return results

    return provide


def diagnosed(fallback: Fallback | None = None) -> Provider:
    """Two-pass: the nested diagnostic run, for every image; ``fallback`` is the reason where it stands in."""

    def provide(state: StateLayerOutput) -> list[Scores]:
        maps = zip(state.layout.groups, state.diagnose(), strict=True)
        return [_scores(state, group, scores, TWO_PASS, fallback) for group, scores in maps]

    return provide


def auto(predictor: SourcePredictor, threshold: float) -> Provider:
    """The predictor, and the diagnostic run for images whose scores are not to be trusted.

    Those are images of low confidence, images whose features are unlike those of the fit, and scores that are not
    finite. One host sync per prefill decides whether there are any.
    """
    ask = predicted(predictor)

    def verdict(confidence: float, drift: float, drifted: bool, finite: bool) -> Fallback | None:
        if not finite:
            return Fallback(NOT_FINITE, "the predictor's scores are not finite")
        if drifted:
            limit = f"the limit {predictor.drift_limit:.2f}"
            return Fallback(DRIFT, f"drift {drift:.2f} is over {limit}: the features are unlike those of the fit")
        if confidence < threshold:
            return Fallback(LOW_CONFIDENCE, f"confidence {confidence:.3f} is under the threshold {threshold:.3f}")
        return None

    def provide(state: StateLayerOutput) -> list[Scores]:
        results = ask(state)
        columns: list[Tensor] = []
        for group, result in zip(state.layout.groups, results, strict=True):
            judged = predictor.judge(result.scores, result.spread, result.rule)
            finite = result.scores.isfinite().all(-1)
            columns.append(torch.stack([*judged, finite, group.rows]))  # [5, I] float32
        table = torch.cat(columns, dim=1).T.tolist()  # the one sync: per image, its verdict's arguments and its row

        verdicts = [verdict(sure, drift, bool(drifted), bool(ok)) for sure, drift, drifted, ok, _ in table]
        rows = sorted({int(line[-1]) for line, fallback in zip(table, verdicts, strict=True) if fallback})
        if not rows:
            return results
        maps = state.diagnose(None if len(rows) == len(state.hidden) else rows)
        start = 0
        for result, scores in zip(results, maps, strict=True):
            mine = verdicts[start : start + len(scores)]
            start += len(scores)
            low = torch.tensor([fallback is not None for fallback in mine], device=scores.device)
            result.scores = torch.where(low[:, None], scores, result.scores)
            result.providers = [TWO_PASS if fallback else ONE_PASS for fallback in mine]
            result.fallbacks = list(mine)
        return results

    return provide


def uniform(seed: int) -> Provider:
    """The Uniform-Smooth control of arXiv 2602.22469: sources drawn uniformly, from one seeded stream."""
    generators: dict[torch.device, torch.Generator] = {}

    def provide(state: StateLayerOutput) -> list[Scores]:
        device = state.hidden.device
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(seed)
        results: list[Scores] = []
        for group in state.layout.groups:
            draw = torch.rand(group.positions.shape, generator=generators[device], device=device)
            results.append(_scores(state, group, draw, UNIFORM))
        return results

    return provide


def _scores(
    state: StateLayerOutput, group: ImageGroup, scores: Tensor, provider: str, fallback: Fallback | None = None
) -> Scores:
    """Scores [I, N] that one provider gave to all images of a group."""
    count = len(group.images)
    rule = source_rule(state.config, group.grid, scores.device)
    return Scores(scores, rule, [provider] * count, [fallback] * count)
