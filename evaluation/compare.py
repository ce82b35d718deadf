"""The whole comparison of one model and one predictor: answers, scores, fidelity and prefill cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.images import CocoImages, seeded_order
from data.questions import STRATEGIES, image_prompts
from data.questions import count_objects as count
from data.vlm import chat_inputs
from evaluation.fidelity import Fidelity, fidelity
from evaluation.latency import Cost, prefill_costs
from evaluation.methods import AUTO, ONE_PASS, SHIFT, SWAPPED, TWO_PASS, UNIFORM, VANILLA, Methods
from evaluation.pope import Answers, Score, ask, score
from scr_runtime import SCRConfig, SourcePredictor

METHODS = (VANILLA, TWO_PASS, ONE_PASS, AUTO, UNIFORM, SWAPPED, SHIFT)
TIMED = (VANILLA, TWO_PASS, ONE_PASS, AUTO, UNIFORM)


@dataclass(frozen=True)
class Comparison:
    """What was measured.

    Attributes:
        answers: Every margin of every question.
        scores: (method, split) -> score.
        fidelity: Method -> how it follows two-pass.
        costs: Method -> prefill cost on one image with one question.
        images: Held-out images asked about.
        entropy_correlation: Pearson r, over images, of normalised credit entropy and vanilla's hallucination rate.
    """

    answers: Answers
    scores: Mapping[tuple[str, str], Score]
    fidelity: Mapping[str, Fidelity]
    costs: Mapping[str, Cost]
    images: int
    entropy_correlation: float


def compare(
    model: Any,
    processor: Any,
    predictor: str | Path | SourcePredictor,
    config: SCRConfig,
    images: CocoImages,
    *,
    num_images: int,
    questions_per_image: int,
    batch_size: int,
    bootstrap: int,
    latency_repeats: int,
    seed: int,
) -> Comparison:
    """Compares all methods on held-out images.

    Args:
        model: A supported model in eval mode.
        processor: Its processor.
        predictor: A predictor folder, or a loaded predictor.
        config: The method's settings.
        images: Held-out images with annotations.
        num_images: How many of them to ask about, drawn by the seed.
        questions_per_image: Per strategy.
        batch_size: Questions per forward.
        bootstrap: Resamples behind every interval.
        latency_repeats: Timed prefills per method.
        seed: Of images, questions, the uniform control and the resamples.

    Raises:
        ValueError: If there are fewer images than asked for.
    """
    if num_images > len(images):
        raise ValueError(f"evaluation.images={num_images}, but there are {len(images)} in {images.images_dir}")
    chosen = seeded_order(images.ids, seed, "evaluation")[:num_images]
    methods = Methods(model, predictor, config, seed)
    answers = ask(
        model,
        processor,
        methods,
        images,
        chosen,
        questions_per_image=questions_per_image,
        batch_size=batch_size,
        seed=seed,
    )
    scores = {
        (method, split): score(answers, method, split, bootstrap=bootstrap, seed=seed)
        for method in METHODS
        for split in STRATEGIES
    }
    question = image_prompts(images, count(images), chosen[0], 1, seed=seed)[0]
    inputs = chat_inputs(processor, [images.open(chosen[0])], [question.text])
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
