"""Source providers: the state layer's output in (block 0's, in the paper), one score per visual token out.

The same edit follows whichever provider was asked (decision D2):

    predicted   the SourcePredictor                                              one-pass
    diagnosed   a nested run of the next blocks on the same output               two-pass
    auto        the predictor, and the diagnostic for rows of low confidence
    online      the attention of the running pass itself, before its edits     training-free, single pass
    uniform     a seeded random draw, the control
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scr_runtime.config import Mode
from scr_runtime.diagnostic import StateLayerOutput
from scr_runtime.layout import ImageGroup, VisualLayout
from scr_runtime.network import SourcePredictor
from scr_runtime.rule import SourceRule, source_rule

ONE_PASS, TWO_PASS, ONLINE, UNIFORM = "one-pass", "two-pass", "online", "uniform"
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
        providers: Per image, who scored it: ``"one-pass"``, ``"two-pass"``, ``"online"`` or ``"uniform"``.
        fallbacks: Per image, why the diagnostic run stood in for the predictor; ``None`` where it did not.
        predicted: [I, N] the predictor's scores, also where others stood in; ``None`` if it was not asked.
        spread: [I] spread of the features that it read; ``None`` if it was not asked or has no drift guard.
        predictor: Who predicted them; ``None`` if none was asked.
    """

    scores: Tensor
    rule: SourceRule
    providers: list[str]
    fallbacks: list[Fallback | None]
    predicted: Tensor | None = None
    spread: Tensor | None = None
    predictor: SourcePredictor | None = None

    def only(self, places: list[int]) -> Scores:
        """What it says about some of the images."""
        if places == list(range(len(self.providers))):
            return self
        index = torch.tensor(places).to(self.scores.device, non_blocking=True)
        return Scores(
            self.scores[index],
            self.rule,
            [self.providers[place] for place in places],
            [self.fallbacks[place] for place in places],
            None if self.predicted is None else self.predicted[index],
            None if self.spread is None else self.spread[index],
            self.predictor,
        )


@dataclass(frozen=True)
class Choice:
    """The sources of one group of images in a prefill.

    Attributes:
        scores: What the provider said.
        sources: [I, K] int64, best first.
        norms: [I, N] float32 l2 norms of the patches' states before the edit.
    """

    scores: Scores
    sources: Tensor
    norms: Tensor

    def only(self, places: list[int]) -> Choice:
        """The choice for some of the images."""
        scores = self.scores.only(places)
        if scores is self.scores:
            return self
        index = torch.tensor(places).to(self.sources.device, non_blocking=True)
        return Choice(scores, self.sources[index], self.norms[index])


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
    if mode == "online":
        return online
    if mode in ("two-pass", "off") or predictor is None:
        return diagnosed(None if reason is None else Fallback(NO_PREDICTOR, reason))
    return predicted(predictor) if mode == "one-pass" else auto(predictor, threshold)


def predicted(predictor: SourcePredictor) -> Provider:
    """One-pass: the predictor alone."""
    placed = _on_any_device(predictor)

    def provide(state: StateLayerOutput) -> list[Scores]:
        ask = placed(state.hidden.device)
        results: list[Scores] = []
        for group in state.layout.groups:
            question = state.question(group) if ask.config.reads_question else None
            given = (state.states(group), group.grid, question)
            guarded = ask.drift_limit is not None
            scores, spread = ask.score_and_spread(*given) if guarded else (ask(*given), None)
            result = _scores(state, group, scores, ONE_PASS)
            result.predicted, result.spread, result.predictor = scores, spread, predictor
            results.append(result)
        return results

    return provide


def diagnosed(fallback: Fallback | None = None) -> Provider:
    """Two-pass: the nested diagnostic run, for every image; ``fallback`` is the reason where it stands in."""

    def provide(state: StateLayerOutput) -> list[Scores]:
        maps = zip(state.layout.groups, state.diagnose(), strict=True)
        return [_scores(state, group, scores, TWO_PASS, fallback) for group, scores in maps]

    return provide


def online(state: StateLayerOutput) -> list[Scores]:
    """Online: the map that the running pass has made by now, for every image."""
    maps = zip(state.layout.groups, state.running_maps(), strict=True)
    return [_scores(state, group, scores, ONLINE) for group, scores in maps]


def auto(predictor: SourcePredictor, threshold: float) -> Provider:
    """The predictor, and the diagnostic run for images whose scores are not to be trusted.

    Those are images of low confidence, images whose features are unlike those of the fit, and scores that are not
    finite. One host sync per prefill decides whether there are any.
    """
    ask = predicted(predictor)
    least = torch.tensor(threshold, dtype=torch.float32).item()  # as precise as the confidences that meet it

    def verdict(confidence: float, drift: float, drifted: bool, finite: bool) -> Fallback | None:
        if not finite:
            return Fallback(NOT_FINITE, "the predictor's scores are not finite")
        if drifted:
            limit = f"the limit {predictor.drift_limit:.2f}"
            return Fallback(DRIFT, f"drift {drift:.2f} is over {limit}: the features are unlike those of the fit")
        if not confidence >= least:  # NaN is not
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
    """The Uniform-Smooth control of arXiv 2602.22469: sources drawn uniformly, from one seeded stream.

    One draw per image of the prompt: its beams share it.
    """
    generators: dict[torch.device, torch.Generator] = {}

    def provide(state: StateLayerOutput) -> list[Scores]:
        device = state.hidden.device
        if device not in generators:
            generators.setdefault(device, torch.Generator(device).manual_seed(seed))  # of several threads one wins
        results: list[Scores] = []
        for group in state.layout.groups:
            images, patches = group.positions.shape
            firsts = state.layout.firsts(group)
            shape = (len(firsts), patches)
            draw = torch.rand(shape, generator=generators[device], device=device, dtype=torch.float32)
            if len(firsts) < images:
                draw = draw[_places_of_firsts(state.layout, group, firsts)]
            results.append(_scores(state, group, draw, UNIFORM))
        return results

    return provide


def _places_of_firsts(layout: VisualLayout, group: ImageGroup, firsts: list[int]) -> list[int]:
    """Per image of a group, where among the group's firsts the image is that it is a copy of."""
    assert layout.copy_of is not None  # or there would be no copies
    drawn = {group.images[place]: index for index, place in enumerate(firsts)}
    return [drawn[layout.copy_of[image]] for image in group.images]


def _on_any_device(predictor: SourcePredictor) -> Callable[[torch.device], SourcePredictor]:
    """Device -> the predictor there: itself, or a copy that is kept. Blocks of one model may lie on several."""
    copies: dict[torch.device, SourcePredictor] = {}

    def placed(device: torch.device) -> SourcePredictor:
        if predictor.state_mean.device == device:
            return predictor
        if device not in copies:
            copies[device] = copy.deepcopy(predictor).to(device)
        return copies[device]

    return placed


def _scores(
    state: StateLayerOutput, group: ImageGroup, scores: Tensor, provider: str, fallback: Fallback | None = None
) -> Scores:
    """Scores [I, N] that one provider gave to all images of a group."""
    count = len(group.images)
    rule = source_rule(state.config, group.grid, scores.device)
    return Scores(scores, rule, [provider] * count, [fallback] * count)
