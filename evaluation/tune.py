"""Chooses strength, sources and layers on images that nothing else uses, by AUC at equal TPR."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from data.images import CocoImages
from evaluation.asking import Asker, Task
from evaluation.decoding import Decoding
from evaluation.errors import EvaluationError
from evaluation.methods import TWO_PASS, VANILLA, Method
from evaluation.pictures import Pictures
from evaluation.questions import quiz_from_annotations
from evaluation.scores import Answered, auc_above, hr_at_tpr, read_answers
from evaluation.settings import EvaluationSettings
from scr_runtime import SCRConfig
from scr_runtime.errors import SCRError


@dataclass(frozen=True)
class Trial:
    """One setting that was tried.

    Attributes:
        scr: The settings.
        auc: Mean true-negative rate of the yes margin, from vanilla's TPR to 1.
        hr: Hallucination rate at vanilla's TPR.
        shift: Questions whose answer changes.
    """

    scr: SCRConfig
    auc: float
    hr: float
    changed: int


@dataclass(frozen=True)
class Tuned:
    """What tuning came to.

    Attributes:
        vanilla: The model as it is; its `scr` is the model's own.
        trials: All settings that were tried, best first.
        images: Images asked about.
        questions: Questions of the headline split.
        tpr: Vanilla's, at which all are compared.
    """

    vanilla: Trial
    trials: list[Trial]
    images: int
    questions: int
    tpr: float


def candidates(scr: SCRConfig, settings: EvaluationSettings, depth: int) -> list[SCRConfig]:
    """Every setting of the grid that is legal for a model of so many blocks; the model's own is one."""
    first = scr.edit_layers[0]
    lasts = settings.tune_edit_ends or [scr.edit_layers[1]]
    starts = settings.tune_map_starts or [scr.attention_layers[0]]
    sources = settings.tune_sources or [scr.num_sources]
    width = scr.attention_layers[1] - scr.attention_layers[0]
    found = [scr]
    for strength, k, last, start in product(settings.tune_strengths, sources, lasts, starts):
        try:
            tried = replace(
                scr, strength=strength, num_sources=k, edit_layers=(first, last),
                attention_layers=(start, min(start + width, depth - 1)),
            )  # fmt: skip
            tried.check_depth(depth)
        except SCRError as error:
            raise EvaluationError(f"evaluation.tune_*: {error}") from error
        if tried not in found:
            found.append(tried)
    return found


def tune_settings(
    model: Any, processor: Any, tried: Sequence[SCRConfig], images: CocoImages, image_ids: Sequence[int],
    settings: EvaluationSettings, cache: Path | None = None,
) -> Tuned:  # fmt: skip
    """Asks the tuning images under two-pass with every setting.

    Args:
        model: A supported model in eval mode.
        processor: Its processor.
        tried: Settings to try; the first is the model's own.
        images: Training images with annotations.
        image_ids: The tuning images among them.
        settings: Questions per image, batch size and seed.
        cache: Folder in which answers are kept.
    """
    quiz = quiz_from_annotations(images, list(image_ids), settings)
    pictures = Pictures(images.images_dir)
    pictures.check(quiz.images)
    task = Task("tuning images", quiz.items, next(iter(settings.templates.values())), Decoding("margin", 1))
    split = quiz.splits[quiz.headline]

    def answered(scr: SCRConfig, name: str) -> Iterator[Answered]:
        asker = Asker(model, processor, scr, pictures, settings.batch_size, settings.seed, cache)
        methods = [Method(VANILLA, VANILLA), *([Method(TWO_PASS, TWO_PASS)] if name == TWO_PASS else [])]
        stores = asker.ask(task, methods, {})
        yield read_answers(quiz, stores, methods, {method.name: (None,) for method in methods}, settings.parser, False)

    before = next(answered(tried[0], VANILLA))
    tpr = float(before.yes(VANILLA)[split.rows][split.truth].mean())

    def trial(found: Answered, name: str, scr: SCRConfig) -> Trial:
        changed = int(((found.margins[name] > 0) != (before.margins[VANILLA] > 0)).sum())
        return Trial(scr, auc_above(found, name, split, tpr), hr_at_tpr(found, name, split, tpr), changed)

    trials = [trial(next(answered(scr, TWO_PASS)), TWO_PASS, scr) for scr in tried]
    trials.sort(key=lambda one: -one.auc)
    return Tuned(trial(before, VANILLA, tried[0]), trials, len(quiz.images), len(split.ids), tpr)


def tuned_rows(tuned: Tuned) -> list[list[str]]:
    """Header, vanilla, and every setting that was tried, best first."""
    rows = [["lambda", "K", "edit blocks", "map blocks", "AUC at equal TPR", "HR at equal TPR", "answers changed"]]
    rows.append(["vanilla", "-", "-", "-", f"{tuned.vanilla.auc:.4f}", f"{100 * tuned.vanilla.hr:.1f}", "-"])
    for one in tuned.trials:
        scr = one.scr
        layers = ["{}-{}".format(*scr.edit_layers), "{}-{}".format(*scr.attention_layers)]
        figures = [f"{one.auc:.4f}", f"{100 * one.hr:.1f}", str(one.changed)]
        rows.append([f"{scr.strength:g}", str(scr.num_sources), *layers, *figures])
    return rows
