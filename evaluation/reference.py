"""What is asked about, read and checked before any forward pass."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.images import CocoImages, seeded_order
from data.ranks import Rank
from evaluation.answers import ALONE
from evaluation.asking import Asker, Task
from evaluation.captions import Gallery, choose_images
from evaluation.decoding import Decoding
from evaluation.errors import EvaluationError
from evaluation.methods import ONLINE, SHIFT
from evaluation.pictures import Pictures
from evaluation.questions import Item, Quiz, quiz_from_annotations, quiz_from_files
from evaluation.settings import EvaluationSettings
from scr_runtime import SCRConfig
from scr_runtime.families import blocks_of

_SHOWN = 10  # of the prompts, in a report


@dataclass(frozen=True)
class Reference:
    """What a comparison knows before it has a predictor: asked once, compared with any number of predictors.

    Attributes:
        asker: The model, and the answers that it has given.
        settings: What is asked, and how.
        quiz: The yes/no questions, or prompts whose answers nobody knows; `None` where there are none.
        gallery: The images that are captioned; `None` where none are.
        images: Held-out images with annotations, if there are any.
        origin: Where questions and images come from, for the result.
    """

    asker: Asker
    settings: EvaluationSettings
    quiz: Quiz | None
    gallery: Gallery | None
    images: CocoImages | None
    origin: dict[str, Any] = field(default_factory=dict[str, Any])

    def tasks(self) -> dict[str, Task]:
        """Prompt name -> the yes/no questions under it."""
        if self.quiz is None or not self.quiz.splits:
            return {}
        decoding = decoding_of(self.settings)
        return {
            name: Task(f"pope, prompt {name}", self.quiz.items, template, decoding)
            for name, template in self.settings.templates.items()
        }

    def caption_task(self) -> Task | None:
        """The captions."""
        if self.gallery is None:
            return None
        decoding = Decoding("greedy", max(self.settings.chair_tokens), margins=False)
        return Task("chair", self.gallery.items, "{question}", decoding)


def decoding_of(settings: EvaluationSettings) -> Decoding:
    """How yes/no questions are answered."""
    seeds: tuple[int | None, ...] = tuple(settings.sampling_seeds)
    return Decoding(settings.decoding or "greedy", settings.max_new_tokens, seeds, settings.temperature)


def prepare_reference(
    model: Any,
    processor: Any,
    scr: SCRConfig,
    images: CocoImages | None,
    settings: EvaluationSettings,
    cache: Path | None = None,
    rank: Rank = ALONE,
) -> Reference:
    """Reads everything that will be asked about, and checks it before any forward pass.

    Args:
        model: A supported model in eval mode.
        processor: Its processor.
        scr: The method's settings.
        images: Held-out images with annotations; `None` where question files and a folder of images are enough.
        settings: What is asked.
        cache: Folder in which answers are kept: an interrupted call resumes, a finished one asks nothing again.
        rank: This process among several that answer together.

    Raises:
        ConfigurationError: Online is asked for, and no block is left behind the map's.
        EvaluationError: Files, images or annotations are missing or wrong; all missing images are counted at once.
    """
    if ONLINE in settings.methods:
        scr.behind_map(len(blocks_of(model)))
    quiz, origin = None, {}
    folder = settings.images_dir or (images.images_dir if images else None)
    if folder is None:
        raise EvaluationError("no folder of images: set evaluation.images_dir, or data.root with data.eval_images")
    pictures = Pictures(folder)
    if {"pope", "fidelity"} & set(settings.benchmarks):
        quiz = _quiz(images, settings, cache)
        origin["questions"] = {name: [s.origin, len(s.ids), s.sha256] for name, s in quiz.splits.items()}
        pictures.check(quiz.images)
        if len(quiz.images) < 2:
            raise EvaluationError(
                f"a comparison needs questions about at least 2 images, and there are {len(quiz.images)}: raise "
                "evaluation.images"
            )
    gallery = None
    if "chair" in settings.benchmarks:
        if images is None:
            raise EvaluationError("chair needs annotations: set data.root, or evaluation.annotations")
        gallery = choose_images(images, settings)
        pictures.check(item.image for item in gallery.items)
        origin |= {
            "caption_images": len(gallery.ids),
            "caption_ids_sha256": gallery.sha256,
            "caption_ids": gallery.ids,
        }
    asker = Asker(model, processor, scr, pictures, settings.batch_size, settings.seed, cache, rank)
    return Reference(asker, settings, quiz, gallery, images, origin)


def unlabelled_reference(
    model: Any, processor: Any, scr: SCRConfig, folder: Path, items: Sequence[Item], settings: EvaluationSettings
) -> Reference:
    """What can be compared on pictures without annotations: how methods follow two-pass, and what a prefill costs.

    Args:
        model: A supported model in eval mode.
        processor: Its processor.
        scr: The method's settings.
        folder: Of the pictures.
        items: Pictures that the predictor was not fitted to, at least two, each with a prompt.
        settings: Of them methods, `fidelity_images`, sizes and seed count.

    Raises:
        EvaluationError: Pictures are missing.
    """
    pictures = Pictures(folder)
    pictures.check(item.image for item in items)
    methods = [name for name in settings.methods if name != SHIFT]  # it follows from answers
    settings = settings.model_copy(update={"prompts": [], "methods": methods})
    asker = Asker(model, processor, scr, pictures, settings.batch_size, settings.seed)
    texts = list(dict.fromkeys(item.text for item in items))
    origin = {"prompts": {str(number): text for number, text in enumerate(texts[:_SHOWN], 1)}}
    return Reference(asker, settings, Quiz(list(items), {}), None, None, origin)


def _quiz(images: CocoImages | None, settings: EvaluationSettings, cache: Path | None) -> Quiz:
    if settings.pope_files:
        return quiz_from_files(settings.pope_files, settings.pope_labels)
    if images is None:
        raise EvaluationError("no questions: set evaluation.pope_files, or data.root for questions from annotations")
    if settings.images > len(images):
        raise EvaluationError(
            f"evaluation.images={settings.images}, but there are {len(images)} in {images.images_dir}: lower it"
        )
    chosen = seeded_order(images.ids, settings.seed, "evaluation")[: settings.images]
    place = None
    if cache is not None:
        asked = [images.annotations_sha256, settings.images, settings.questions_per_image, settings.seed]
        place = cache / f"pope-{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]}"
    return quiz_from_annotations(images, chosen, settings, place)
