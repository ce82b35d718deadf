"""The whole comparison of one model and one predictor: answers, scores, fidelity and prefill cost."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data.chat import chat_inputs
from data.images import CocoImages, seeded_order
from data.questions import STRATEGIES
from data.vlm import model_identity
from evaluation.answers import AnswerLog
from evaluation.errors import EvaluationError
from evaluation.fidelity import FallbackPoint, Fidelity, fallback_curve, fidelity
from evaluation.latency import Cost, prefill_costs
from evaluation.methods import AUTO, ONE_PASS, SHIFT, SWAPPED, TWO_PASS, UNIFORM, VANILLA, Methods
from evaluation.pope import Answers, Floats, Quiz, Score, ask, make_quiz, score
from evaluation.settings import EvaluationSettings
from scr_runtime import SCRConfig, SourcePredictor, load_predictor

METHODS = (VANILLA, TWO_PASS, ONE_PASS, AUTO, UNIFORM, SWAPPED, SHIFT)
TIMED = (VANILLA, TWO_PASS, ONE_PASS, AUTO, UNIFORM)
FALLBACKS = tuple(round(0.05 * step, 2) for step in range(21))  # shares of the questions


@dataclass(frozen=True)
class Reference:
    """What a comparison knows before it has a predictor: asked once, compared with any number of predictors.

    Attributes:
        model: A supported model in eval mode.
        processor: Its processor.
        scr: The method's settings.
        images: Held-out images with annotations.
        settings: How the questions were asked.
        quiz: The questions.
        margins: [Q] yes margins of vanilla, two-pass and the controls.
        entropy: [Q] normalised credit entropy of the image, before any edit.
        cache: Folder in which answers are kept while they are asked for; ``None`` for none.
    """

    model: Any
    processor: Any
    scr: SCRConfig
    images: CocoImages
    settings: EvaluationSettings
    quiz: Quiz
    margins: dict[str, Floats]
    entropy: Floats
    cache: Path | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What the answers depend on, beside methods and predictor."""
        asked = {"images", "questions_per_image", "batch_size", "seed"}
        return {
            "model": model_identity(self.model, self.processor),
            "scr": self.scr.to_dict(),
            "annotations_sha256": self.images.annotations_sha256,
            "settings": self.settings.model_dump(include=asked),
        }


@dataclass(frozen=True)
class Comparison:
    """What was measured.

    Attributes:
        answers: Every margin of every question.
        scores: (method, split) -> score.
        fidelity: Method -> how it follows two-pass.
        curve: How ``auto`` follows two-pass, by the share of questions that it hands over.
        costs: Method -> prefill cost on one image with one question.
        images: Held-out images asked about.
        entropy_correlation: Pearson r, over images, of normalised credit entropy and vanilla's hallucination rate.
    """

    answers: Answers
    scores: Mapping[tuple[str, str], Score]
    fidelity: Mapping[str, Fidelity]
    curve: Sequence[FallbackPoint]
    costs: Mapping[str, Cost]
    images: int
    entropy_correlation: float


def measure_reference(
    model: Any,
    processor: Any,
    scr: SCRConfig,
    images: CocoImages,
    settings: EvaluationSettings,
    cache: Path | None = None,
) -> Reference:
    """Asks held-out questions under every method that needs no predictor.

    Args:
        model: A supported model in eval mode.
        processor: Its processor.
        scr: The method's settings.
        images: Held-out images with annotations.
        settings: How many images and questions, and the seed of both and of the uniform control.
        cache: Folder in which answers are kept: an interrupted call resumes, a finished one asks nothing again.

    Raises:
        EvaluationError: If there are fewer images than asked for, or the tokenizer has no single token for yes or no.
    """
    if settings.images > len(images):
        raise EvaluationError(
            f"evaluation.images={settings.images}, but there are {len(images)} in {images.images_dir}: lower it"
        )
    chosen = seeded_order(images.ids, settings.seed, "evaluation")[: settings.images]
    quiz = make_quiz(images, chosen, settings)
    methods = Methods(model, scr, seed=settings.seed)
    names = (VANILLA, TWO_PASS, UNIFORM, SWAPPED)
    reference = Reference(model, processor, scr, images, settings, quiz, {}, np.empty(0), cache)
    log = AnswerLog(cache, {**reference.identity, "methods": names})
    margins, reports = ask(model, processor, methods, names, images, quiz, settings.batch_size, log)
    margins[SHIFT] = margins[VANILLA] + (margins[TWO_PASS] - margins[VANILLA]).mean()
    entropy = np.array([report.entropy_normalised for report in reports[TWO_PASS]])
    return replace(reference, margins=margins, entropy=entropy)


def compare(reference: Reference, predictor: str | Path | SourcePredictor, settings: EvaluationSettings) -> Comparison:
    """Compares a predictor with two-pass, vanilla and the controls.

    Args:
        reference: Everything that needs no predictor.
        predictor: A predictor folder, or a loaded predictor.
        settings: Resamples behind every interval with their seed, and timed prefills per method. Questions are asked
            as the reference's were.
    """
    loaded = predictor if isinstance(predictor, SourcePredictor) else load_predictor(predictor)
    methods = Methods(reference.model, reference.scr, loaded, reference.settings.seed)
    answers = _answer(reference, methods, loaded)
    return Comparison(
        answers=answers,
        scores={(name, split): score(answers, name, split, settings) for name in METHODS for split in STRATEGIES},
        fidelity={name: fidelity(answers, name) for name in METHODS if name != TWO_PASS},
        curve=fallback_curve(answers, FALLBACKS, settings.seed),
        costs=_prefill_costs(reference, methods, settings.latency_repeats),
        images=len(set(answers.image.tolist())),
        entropy_correlation=_entropy_correlation(answers),
    )


def _answer(reference: Reference, methods: Methods, predictor: SourcePredictor) -> Answers:
    """Adds one-pass's answers to the reference's, and auto's: one-pass's or two-pass's, as the confidence decides."""
    quiz = reference.quiz
    log = AnswerLog(reference.cache, {**reference.identity, "methods": (ONE_PASS,), "predictor": _weights(predictor)})
    found, reports = ask(
        reference.model,
        reference.processor,
        methods,
        (ONE_PASS,),
        reference.images,
        quiz,
        reference.settings.batch_size,
        log,
    )
    limit = math.inf if predictor.drift_limit is None else predictor.drift_limit
    confidence = np.array([0.0 if (r.drift or 1) > limit else r.confidence or 0.0 for r in reports[ONE_PASS]])
    falls_back = confidence < predictor.threshold
    margins = reference.margins | found
    margins[AUTO] = np.where(falls_back, margins[TWO_PASS], margins[ONE_PASS])
    return Answers(
        image=quiz.image,
        truth=quiz.truth,
        splits=quiz.splits,
        margins=margins,
        entropy=reference.entropy,
        confidence=confidence,
        fallback=float(falls_back.mean()),
    )


def _weights(predictor: SourcePredictor) -> str:
    """Checksum of everything that a predictor's scores and confidences depend on."""
    digest = hashlib.sha256(repr((predictor.config, predictor.drift_typical, predictor.drift_limit)).encode())
    for name, tensor in predictor.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _prefill_costs(reference: Reference, methods: Methods, repeats: int) -> dict[str, Cost]:
    """Prefill of the first question's image under each method."""
    model, first = reference.model, reference.quiz.questions[0]
    inputs = chat_inputs(reference.processor, [reference.images.open(first.image_id)], [first.text])
    inputs = inputs.to(model.device, dtype=model.dtype)
    return prefill_costs(model, inputs, TIMED, methods.applied, repeats=repeats)


def _entropy_correlation(answers: Answers) -> float:
    """Over images: r of normalised entropy and the share of absent objects that vanilla affirms."""
    absent = ~answers.truth
    affirmed = (answers.margins[VANILLA] > 0).astype(float)
    ids = np.unique(answers.image[absent])
    entropy = [answers.entropy[absent & (answers.image == image)].mean() for image in ids]
    rate = [affirmed[absent & (answers.image == image)].mean() for image in ids]
    if np.std(entropy) == 0 or np.std(rate) == 0:
        return float("nan")
    return float(np.corrcoef(entropy, rate)[0, 1])
