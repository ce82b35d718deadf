"""The whole comparison of one model: answers, scores, captions, fidelity, and prefill cost, under every method."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.chat import chat_inputs
from data.images import CocoImages
from data.ranks import Rank
from data.vlm import library_versions, model_identity
from evaluation.analysis import Analysis, analyse
from evaluation.answers import ALONE, AnswerStore
from evaluation.asking import Run, Stores, threshold_of
from evaluation.captions import CaptionScore, score_captions
from evaluation.fidelity import FallbackPoint, Fidelity, Sensitivity, fallback_curve, fidelity, sensitivity
from evaluation.latency import Cost, prefill_costs
from evaluation.methods import AUTO, ONE_PASS, ONLINE, SHIFT, TWO_PASS, UNIFORM, VANILLA, Method, expand
from evaluation.pictures import Pictures, image_id
from evaluation.questions import Quiz
from evaluation.reference import Reference, decoding_of, prepare_reference
from evaluation.scores import Answered, Changed, Resampling, Score, changed_answers, hr_difference, read_answers, score
from evaluation.settings import EvaluationSettings
from evaluation.states import States, compare_states
from predictor.metrics import Interval
from scr_runtime import SCR, SCRConfig, SourcePredictor, load_predictor
from scr_runtime.families import blocks_of

FALLBACKS = tuple(round(0.05 * step, 2) for step in range(21))  # shares of the questions
TIMED = (TWO_PASS, ONE_PASS, AUTO, UNIFORM, ONLINE)


@dataclass(frozen=True)
class Prompted:
    """What was found under one prompt.

    Attributes:
        name: Of the prompt.
        template: Its text.
        answered: Every answer.
        scores: (method, split) -> score.
        differences: (method, control or online, split) -> HR of the method minus that one's.
        changed: Method -> answers of the headline split that it changed.
    """

    name: str
    template: str
    answered: Answered
    scores: Mapping[tuple[str, str], Score]
    differences: Mapping[tuple[str, str, str], Interval]
    changed: Mapping[str, list[Changed]]


@dataclass(frozen=True)
class Comparison:
    """What was measured.

    Attributes:
        settings: What was asked, and how.
        methods: Rows of the tables.
        quiz: The yes/no questions, if any were asked, or prompts whose answers nobody knows.
        prompts: What was found under each prompt; the first is the headline.
        captions: (method, tokens) -> caption scores; empty where none were made.
        fidelity: Method -> how it follows two-pass, under the first prompt.
        sensitivity: How far the model feels the edit: as configured, and the strongest legal one.
        curves: Predictor's one-pass row -> how auto follows two-pass, by the share of questions that it hands over.
        fallback: Row of auto -> share of its images that the diagnostic run decided.
        costs: Method -> prefill cost on one image with one question.
        analysis: Entropy, norms and objects.
        facts: Model, data, seeds and versions.
        stores: (task, method) -> answers.
        pictures: Where the images are.
    """

    settings: EvaluationSettings
    methods: list[Method]
    quiz: Quiz | None
    prompts: list[Prompted]
    captions: Mapping[tuple[str, int], CaptionScore]
    fidelity: Mapping[str, Fidelity]
    sensitivity: list[Sensitivity]
    curves: Mapping[str, Sequence[FallbackPoint]]
    fallback: Mapping[str, float]
    costs: Mapping[str, Cost]
    analysis: Analysis | None
    facts: dict[str, Any]
    stores: dict[tuple[str, str], AnswerStore]
    pictures: Pictures

    @property
    def images(self) -> int:
        """Images asked about."""
        return len(self.quiz.images) if self.quiz else int(self.facts.get("caption_images", 0))

    @property
    def names(self) -> list[str]:
        """Names of the methods."""
        return [method.name for method in self.methods]

    @property
    def headline(self) -> Prompted | None:
        """What the verdict is about."""
        return self.prompts[0] if self.prompts else None


def measure_reference(
    model: Any,
    processor: Any,
    scr: SCRConfig,
    images: CocoImages | None,
    settings: EvaluationSettings,
    cache: Path | None = None,
    rank: Rank = ALONE,
) -> Reference:
    """Asks everything under every method that needs no predictor. Arguments and errors are `prepare_reference`'s."""
    reference = prepare_reference(model, processor, scr, images, settings, cache, rank)
    _ask(reference, expand(settings, {}), {})
    return reference


Predictors = Mapping[str, SourcePredictor]


def compare(
    reference: Reference, predictors: str | Path | SourcePredictor | Predictors, settings: EvaluationSettings
) -> Comparison:
    """Compares predictors with two-pass, vanilla and the controls.

    Args:
        reference: Everything that needs no predictor.
        predictors: A predictor folder, a loaded predictor, or several by name; none is `{}`.
        settings: Resamples behind every interval with their seed, and timed prefills per method. Questions are asked
            as the reference's were.
    """
    loaded = _loaded(predictors)
    methods = expand(reference.settings, loaded)
    asked = _ask(reference, methods, loaded)
    methods = [method for method in methods if method.asked or method.base == SHIFT]
    prompts = [_prompted(reference, name, asked[name], methods, settings) for name in reference.tasks()]
    quiz, headline = reference.quiz, prompts[0] if prompts else None
    states = None
    if quiz is not None and "fidelity" in settings.benchmarks:
        states = compare_states(reference.asker, _template(reference), quiz, methods, loaded, settings)
    captions: dict[tuple[str, int], CaptionScore] = {}
    if reference.gallery is not None:
        decode = reference.asker.processor.tokenizer.decode
        spoken = {name: store for name, store in asked["chair"].items() if name != SHIFT}
        captions = score_captions(
            reference.gallery, spoken, lambda tokens: decode(list(tokens), skip_special_tokens=True), settings
        )
    costs = {}
    if "latency" in settings.benchmarks:
        costs = _prefill_costs(reference, methods, loaded, settings.latency_repeats)
    follow, felt, curves, fallback = {}, [], {}, {}
    if headline is not None:
        follow, felt, curves, fallback = _following(reference, headline, asked[headline.name], methods, loaded, states)
    elif states is not None:
        rows = {name: own for name, own in states.kept.items() if name != TWO_PASS}
        follow = {name: fidelity(None, name, own, settings.bootstrap, settings.seed) for name, own in rows.items()}
    analysis = None
    if headline is not None and quiz is not None and TWO_PASS in headline.answered.margins:
        store, crops = asked[headline.name][TWO_PASS], _crops(reference)
        analysis = analyse(quiz, headline, store, reference.images, states, crops)
    return Comparison(
        settings=settings,
        methods=methods,
        quiz=quiz,
        prompts=prompts,
        captions=captions,
        fidelity=follow,
        sensitivity=felt,
        curves=curves,
        fallback=fallback,
        costs=costs,
        analysis=analysis,
        facts=_facts(reference, loaded, settings),
        stores={(task, name): store for task, stores in asked.items() for name, store in stores.items()},
        pictures=reference.asker.pictures,
    )


def _loaded(predictors: str | Path | SourcePredictor | Predictors) -> dict[str, SourcePredictor]:
    if isinstance(predictors, SourcePredictor):
        return {"": predictors}
    if isinstance(predictors, str | Path):
        return {"": load_predictor(predictors)}
    return dict(predictors)


def _ask(reference: Reference, methods: list[Method], predictors: Predictors) -> dict[str, Stores]:
    """Task -> method -> answers."""
    found = {name: reference.asker.ask(task, methods, predictors) for name, task in reference.tasks().items()}
    if (task := reference.caption_task()) is not None:
        found["chair"] = reference.asker.ask(task, methods, predictors)
    return found


def _prompted(
    reference: Reference, name: str, stores: Stores, methods: list[Method], settings: EvaluationSettings
) -> Prompted:
    quiz, task = reference.quiz, reference.tasks()[name]
    assert quiz is not None
    run = Run(reference.asker, task, [method for method in methods if method.predictor is None], {})
    seeds = {method.name: run.seeds(method) for method in methods}
    text = task.decoding.name != "margin"
    answered = read_answers(quiz, stores, methods, seeds, settings.parser, text)
    resampling = Resampling(_image_numbers(quiz), settings.bootstrap, settings.seed)
    names = [method.name for method in methods]
    others = [method.name for method in methods if method.entry.control or method.base == ONLINE]
    judged = [method.name for method in methods if method.base in (TWO_PASS, ONE_PASS, AUTO, ONLINE)]
    last = quiz.splits[quiz.headline]
    return Prompted(
        name=name,
        template=task.template,
        answered=answered,
        scores={
            (method, split): score(answered, method, part, resampling)
            for method in names
            for split, part in quiz.splits.items()
        },
        differences={
            (method, control, quiz.headline): hr_difference(answered, method, control, last, resampling)
            for method in judged
            for control in others
            if method != control
        },
        changed={method: changed_answers(answered, method, last) for method in names if method != VANILLA},
    )


def _image_numbers(quiz: Quiz) -> NDArray[np.int64]:
    places = {name: place for place, name in enumerate(quiz.images)}
    return np.array([places[item.image] for item in quiz.items])


def _following(
    reference: Reference, headline: Prompted, stores: Stores, methods: list[Method], predictors: Predictors,
    states: States | None,
) -> tuple[dict[str, Fidelity], list[Sensitivity], dict[str, Sequence[FallbackPoint]], dict[str, float]]:  # fmt: skip
    """Fidelity, sensitivity, and what auto hands over, under the headline prompt."""
    answered, settings, quiz = headline.answered, reference.settings, reference.quiz
    assert quiz is not None
    if TWO_PASS not in answered.margins:
        return {}, [], {}, {}
    follow = {
        method.name: fidelity(
            answered,
            method.name,
            states.kept.get(method.name, ()) if states else (),
            settings.bootstrap,
            settings.seed,
        )
        for method in methods
        if method.name != TWO_PASS
    }
    scr = reference.asker.scr
    felt = [sensitivity(answered.margins[VANILLA], answered.margins[TWO_PASS], scr.strength, scr.edit_layers)]
    felt += [states.strongest] if states and states.strongest else []
    curves: dict[str, Sequence[FallbackPoint]] = {}
    fallback: dict[str, float] = {}
    items = range(len(quiz.items))
    seed = next(seed for seed in (None, *settings.sampling_seeds) if (0, seed) in stores[TWO_PASS])
    for method in methods:
        if method.predictor is None:
            continue
        confidence = np.array(
            [min(image.confidence or 0.0 for image in stores[method.name][item, seed].images) for item in items]
        )
        if method.base == AUTO:
            fallback[method.name] = float(
                (np.float32(confidence) < threshold_of(method, predictors[method.predictor])).mean()
            )
        elif method.base == ONE_PASS:
            margins = {**answered.margins, ONE_PASS: answered.margins[method.name]}
            curves[method.name] = fallback_curve(margins, confidence, FALLBACKS, settings.seed)
    return follow, felt, curves, fallback


def _prefill_costs(
    reference: Reference, methods: list[Method], predictors: Predictors, repeats: int
) -> dict[str, Cost]:
    """Prefill of the first image with one question under each mode of the runtime."""
    asker = reference.asker
    items = reference.quiz.items if reference.quiz else reference.gallery.items if reference.gallery else []
    if not items:
        return {}
    text = _template(reference).replace("{question}", items[0].text)
    inputs = chat_inputs(asker.processor, [asker.pictures.open(items[0].image)], [text])
    inputs = inputs.to(asker.model.device, dtype=asker.model.dtype)
    runtimes: dict[str, SCR] = {VANILLA: SCR(asker.model, mode="off")}
    for method in methods:
        if method.base not in TIMED:
            continue
        predictor = None if method.predictor is None else predictors[method.predictor]
        mode: Any = method.base
        scr = asker.scr.behind_map(len(blocks_of(asker.model))) if method.base == ONLINE else asker.scr
        runtimes[method.name] = SCR(
            asker.model, config=scr, mode=mode, predictor=predictor, threshold=method.threshold, seed=asker.seed
        )
    return prefill_costs(asker.model, inputs, list(runtimes), runtimes.__getitem__, repeats=repeats)


def _template(reference: Reference) -> str:
    """The first prompt of yes/no questions; other prompts are whole."""
    return next((task.template for task in reference.tasks().values()), "{question}")


def _facts(reference: Reference, predictors: Predictors, settings: EvaluationSettings) -> dict[str, Any]:
    """What identifies a result, beside its numbers."""
    asker = reference.asker
    decoding = decoding_of(settings)
    facts: dict[str, Any] = {
        "model": model_identity(asker.model, asker.processor),
        "scr": asker.scr.to_dict(),
        "predictors": {name or "predictor": _about(predictor) for name, predictor in predictors.items()},
        "images": str(asker.pictures.folder),
        "prompts": settings.templates,
        "decoding": decoding.in_words,
        "parser": settings.parser if decoding.name != "margin" else "no parser: the sign of the margin",
        "seed": settings.seed,
        "settings": settings.model_dump(),
        "libraries": library_versions(),
        "grid_crops": _crops(reference),
        **reference.origin,
    }
    if reference.quiz is not None:
        names = sorted(reference.quiz.images)
        facts["question_images"] = len(names)
        facts["question_images_sha256"] = hashlib.sha256(json.dumps(names).encode()).hexdigest()
        facts["question_image_ids"] = [image_id(name) for name in names]
        facts["notes"] = reference.quiz.notes
    return facts


def _crops(reference: Reference) -> bool:
    """Whether the model sees the middle square of an image."""
    return bool(getattr(reference.asker.processor.image_processor, "do_center_crop", False))


def _about(predictor: SourcePredictor) -> dict[str, Any]:
    info = getattr(predictor, "info", {}) or {}
    provenance = info.get("provenance") or {}
    return {
        "parameters": predictor.count_parameters(),
        "threshold": None if math.isnan(predictor.threshold) else predictor.threshold,
        "mlflow_run_id": provenance.get("mlflow_run_id"),
        "data_fingerprint": provenance.get("data_fingerprint"),
    }
