"""The whole comparison of one model and one predictor: answers, scores, fidelity and prefill cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.images import CocoImages, seeded_order
from data.questions import STRATEGIES
from data.vlm import chat_inputs
from evaluation.fidelity import FallbackPoint, Fidelity, fallback_curve, fidelity
from evaluation.latency import Cost, prefill_costs
from evaluation.methods import AUTO, ONE_PASS, SHIFT, SWAPPED, TWO_PASS, UNIFORM, VANILLA, Methods
from evaluation.pope import Answers, Floats, Quiz, Score, ask, make_quiz, score
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
        config: The method's settings.
        images: Held-out images with annotations.
        quiz: The questions.
        margins: [Q] yes margins of vanilla, two-pass and the controls.
        entropy: [Q] normalised credit entropy of the image, before any edit.
        batch_size: Questions per forward.
        seed: Of images, questions and the uniform control.
    """

    model: Any
    processor: Any
    config: SCRConfig
    images: CocoImages
    quiz: Quiz
    margins: dict[str, Floats]
    entropy: Floats
    batch_size: int
    seed: int


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
    config: SCRConfig,
    images: CocoImages,
    *,
    num_images: int,
    questions_per_image: int,
    batch_size: int,
    seed: int,
) -> Reference:
    """Asks held-out questions under every method that needs no predictor.

    Args:
        model: A supported model in eval mode.
        processor: Its processor.
        config: The method's settings.
        images: Held-out images with annotations.
        num_images: How many of them to ask about, drawn by the seed.
        questions_per_image: Per strategy.
        batch_size: Questions per forward.
        seed: Of images, questions and the uniform control.

    Raises:
        ValueError: If there are fewer images than asked for.
    """
    if num_images > len(images):
        raise ValueError(f"evaluation.images={num_images}, but there are {len(images)} in {images.images_dir}")
    chosen = seeded_order(images.ids, seed, "evaluation")[:num_images]
    quiz = make_quiz(images, chosen, questions_per_image, seed)
    methods = Methods(model, config, seed=seed)
    names = (VANILLA, TWO_PASS, UNIFORM, SWAPPED)
    margins, reports = ask(model, processor, methods, names, images, quiz, batch_size)
    margins[SHIFT] = margins[VANILLA] + (margins[TWO_PASS] - margins[VANILLA]).mean()
    entropy = np.array([report.entropy_normalised for report in reports[TWO_PASS]])
    return Reference(model, processor, config, images, quiz, margins, entropy, batch_size, seed)


def compare(
    reference: Reference,
    predictor: str | Path | SourcePredictor,
    *,
    bootstrap: int,
    latency_repeats: int,
) -> Comparison:
    """Compares a predictor with two-pass, vanilla and the controls.

    ``auto`` is not asked anew: each of its answers is one-pass's or two-pass's, as the confidence decides.

    Args:
        reference: Everything that needs no predictor.
        predictor: A predictor folder, or a loaded predictor.
        bootstrap: Resamples behind every interval.
        latency_repeats: Timed prefills per method.
    """
    loaded = predictor if isinstance(predictor, SourcePredictor) else load_predictor(predictor)
    model, seed, quiz = reference.model, reference.seed, reference.quiz
    methods = Methods(model, reference.config, loaded, seed)
    found, reports = ask(
        model, reference.processor, methods, (ONE_PASS,), reference.images, quiz, reference.batch_size
    )
    limit = math.inf if loaded.drift_limit is None else loaded.drift_limit
    confidence = np.array([0.0 if (r.drift or 1) > limit else r.confidence or 0.0 for r in reports[ONE_PASS]])
    falls_back = confidence < loaded.threshold
    margins = reference.margins | found
    margins[AUTO] = np.where(falls_back, margins[TWO_PASS], margins[ONE_PASS])
    answers = Answers(
        image=quiz.image,
        truth=quiz.truth,
        splits=quiz.splits,
        margins=margins,
        entropy=reference.entropy,
        confidence=confidence,
        fallback=float(falls_back.mean()),
    )
    scores = {
        (method, split): score(answers, method, split, bootstrap=bootstrap, seed=seed)
        for method in METHODS
        for split in STRATEGIES
    }
    asked = quiz.questions[0]
    inputs = chat_inputs(reference.processor, [reference.images.open(asked.image_id)], [asked.text])
    costs = prefill_costs(
        model,
        inputs.to(model.device, dtype=model.dtype),
        TIMED,
        methods.applied,
        repeats=latency_repeats,
    )
    return Comparison(
        answers=answers,
        scores=scores,
        fidelity={method: fidelity(answers, method) for method in METHODS if method != TWO_PASS},
        curve=fallback_curve(answers, FALLBACKS, seed),
        costs=costs,
        images=len(set(answers.image.tolist())),
        entropy_correlation=_entropy_correlation(answers),
    )


def _entropy_correlation(answers: Answers) -> float:
    """Over images: r of normalised entropy and the share of absent objects that vanilla affirms."""
    absent = ~answers.truth
    said = (answers.margins[VANILLA] > 0).astype(float)
    ids = np.unique(answers.image[absent])
    entropy = [answers.entropy[absent & (answers.image == image)].mean() for image in ids]
    rate = [said[absent & (answers.image == image)].mean() for image in ids]
    if np.std(entropy) == 0 or np.std(rate) == 0:
        return float("nan")
    return float(np.corrcoef(entropy, rate)[0, 1])
