"""Measures a scene model on held-out scenes with the project's own code.

POPE's questions, CHAIR of captions, and the sensitivity: how far the edit moves an answer.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from data.chat import chat_inputs
from data.images import CocoImages
from data.questions import STRATEGIES
from data.settings import VLMSettings
from data.vlm import load_vlm
from data.wording import CAPTION_PROMPT
from evaluation.chair import Chair, chair
from evaluation.compare import Comparison, compare
from evaluation.methods import TWO_PASS, UNIFORM, VANILLA
from evaluation.reference import prepare_reference
from evaluation.scores import Score
from evaluation.settings import EvaluationSettings, MethodName
from evaluation.synonyms import Vocabulary
from evaluation.tables import table
from scenes.drawing import LOOKS, SQUARE, Look
from scenes.world import write_stream
from scr_runtime import SCRConfig

STREAM = "fit-check"  # which no stage was trained on
_BATCH = 50
_CAPTIONED = 300  # scenes at most
_CAPTION_TOKENS = 48
_MOVED = 60  # scenes at most whose answers are edited
SOURCE_FRACTION = 0.0556  # the paper's 32 sources of 24 x 24 patches


@dataclass(frozen=True)
class Sensitivity:
    """How far SCR moves the yes margin of held-out questions.

    Attributes:
        scr: Its settings.
        questions: Number of questions.
        margin: Median of |yes margin| without SCR.
        shift: Method -> median of |change of the yes margin|.
        changed: Method -> answers that change.
    """

    scr: SCRConfig
    questions: int
    margin: float
    shift: dict[str, float]
    changed: dict[str, int]

    def share(self, method: str) -> float:
        """The median shift as a share of the median margin."""
        return self.shift[method] / self.margin


@dataclass(frozen=True)
class Measured:
    """What a checkpoint reaches.

    Attributes:
        scenes: Held-out scenes asked about.
        scores: Strategy -> score of the yes/no questions.
        questions: Strategy -> number of its questions.
        captioned: Scenes described.
        captions: How faithful the descriptions are.
        repeating: Share of the descriptions that name a category twice.
        moved: How far the edit moves the answers, at the paper's settings.
    """

    scenes: int
    scores: dict[str, Score]
    questions: dict[str, int]
    captioned: int
    captions: Chair
    repeating: float
    moved: Sensitivity


def measure(checkpoint: Path, seed: int = 0, count: int = 500) -> Measured:
    """Loads a checkpoint, runs it in fp32 on the CPU, and measures it on the first scenes of the held-out stream.

    Args:
        checkpoint: Folder of the model.
        seed: Seed of the scenes and of the questions.
        count: Number of scenes, at least 2.

    Raises:
        ValueError: `count` is too small.
        ModelLoadError: There is no whole model in the folder.
    """
    if count < 2:
        raise ValueError(f"check={count}: ask about at least 2 scenes, such as 500")
    settings = VLMSettings(hub_id=str(checkpoint.resolve()), dtype="float32", device="cpu")
    model, processor = load_vlm(settings)
    with tempfile.TemporaryDirectory() as folder:
        images = held_out_images(Path(folder), seed, count, look_of(checkpoint))
        found = ask(model, processor, images, scr_of(model), [VANILLA], count, seed)
        captions = describe(model, processor, images, images.ids[:_CAPTIONED])
        moved = sensitivity(model, processor, images, scr_of(model), min(count, _MOVED), seed)
    assert found.headline is not None and found.quiz is not None
    words = Vocabulary({name: [] for name in images.categories})
    return Measured(
        scenes=count,
        scores={name: found.headline.scores[VANILLA, name] for name in STRATEGIES},
        questions={name: len(split.ids) for name, split in found.quiz.splits.items()},
        captioned=len(captions),
        captions=chair(captions, words, [images.present(i) for i in images.ids[: len(captions)]]),
        repeating=repeating(captions, images.categories),
        moved=moved,
    )


def look_of(checkpoint: Path) -> Look:
    """What the scenes looked like that a checkpoint was fitted on, as its fit.json says."""
    file = checkpoint / "fit.json"
    return LOOKS[json.loads(file.read_text()).get("sizes", "square")] if file.is_file() else SQUARE


def scr_of(model: Any, strength: float = SCRConfig.strength) -> SCRConfig:
    """The paper's settings, as shares of the model's depth and of its grids."""
    blocks = SCRConfig.for_depth(model.config.get_text_config().num_hidden_layers)
    return dataclasses.replace(blocks, source_fraction=SOURCE_FRACTION, strength=strength)


def ask(
    model: Any, processor: Any, images: CocoImages, scr: SCRConfig, methods: list[MethodName], count: int, seed: int
) -> Comparison:
    """Asks POPE's questions about the first images (arXiv 2305.10355), by the margin of the first token."""
    asked = EvaluationSettings(
        images=count, batch_size=_BATCH, seed=seed, benchmarks=["pope"], methods=list(methods), prompts=["plain"],
        decoding="margin",
    )  # fmt: skip
    return compare(prepare_reference(model, processor, scr, images, asked), {}, asked)


def sensitivity(
    model: Any, processor: Any, images: CocoImages, scr: SCRConfig, count: int, seed: int = 0
) -> Sensitivity:
    """Asks POPE's questions without SCR, with two-pass sources and with random ones, and compares the margins.

    A model whose answers an edit does not move cannot tell a good choice of sources from a bad one.

    Args:
        model: A scene model in eval mode.
        processor: Its processor.
        images: Held-out images with annotations.
        scr: What is edited, where and how strongly.
        count: How many images are asked about, at least 2.
        seed: Of the questions.
    """
    found = ask(model, processor, images, scr, [VANILLA, TWO_PASS, UNIFORM], count, seed).headline
    assert found is not None
    margins = found.answered.margins
    before = margins[VANILLA]
    names = (TWO_PASS, UNIFORM)
    return Sensitivity(
        scr=scr,
        questions=len(before),
        margin=float(np.median(np.abs(before))),
        shift={name: float(np.median(np.abs(margins[name] - before))) for name in names},
        changed={name: int(((margins[name] > 0) != (before > 0)).sum()) for name in names},
    )


def repeating(captions: Sequence[str], categories: Collection[str]) -> float:
    """Share of the captions that name one category twice or more, in any case, with or without -s."""
    patterns = [re.compile(rf"\b{re.escape(name)}(?:s|es)?\b", re.IGNORECASE) for name in categories]
    return float(np.mean([any(len(pattern.findall(text)) > 1 for pattern in patterns) for text in captions]))


def held_out_images(folder: Path, seed: int, count: int, look: Look = SQUARE) -> CocoImages:
    """Renders the first scenes of the held-out stream into a folder."""
    with tqdm(total=count, desc="render scenes", unit="image") as progress:
        write_stream(folder, STREAM, count, seed, progress, look=look)
    return CocoImages(folder / STREAM, folder / "annotations" / f"instances_{STREAM}.json")


@torch.no_grad()
def describe(model: Any, processor: Any, images: CocoImages, image_ids: tuple[int, ...]) -> list[str]:
    """One greedy caption per image."""
    captions: list[str] = []
    for begin in tqdm(range(0, len(image_ids), _BATCH), desc="captions", unit="batch"):
        pictures = [images.open(image_id) for image_id in image_ids[begin : begin + _BATCH]]
        inputs = chat_inputs(processor, pictures, [CAPTION_PROMPT] * len(pictures))
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=_CAPTION_TOKENS)
        captions += processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return captions


def as_text(measured: Measured) -> str:
    """The figures as a table and a sentence."""
    rows = [["split", "questions", "accuracy", "HR", "TPR", "yes", "AUC"]]
    for name, found in measured.scores.items():
        figures = (found.accuracy, found.hr.mean, found.tpr, found.yes_ratio, found.auc)
        rows.append([name, f"{measured.questions[name]:,}", *(f"{figure:.3f}" for figure in figures)])
    captions, moved = measured.captions, measured.moved
    first, last = moved.scr.edit_layers
    shifts = ", ".join(
        f"{name} {moved.shift[name]:.4f} ({moved.share(name):.2%}; {moved.changed[name]} answers change)"
        for name in moved.shift
    )
    return (
        f"\nYes/no questions as in POPE, {measured.scenes} held-out scenes, greedy\n\n{table(rows)}\n\n"
        f"Captions of {measured.captioned} held-out scenes, greedy, at most {_CAPTION_TOKENS} tokens: "
        f"CHAIR-s {captions.chair_s:.3f}, CHAIR-i {captions.chair_i:.3f}, "
        f"recall {captions.recall:.3f}, {captions.mentioned:.1f} objects named, "
        f"{measured.repeating:.3f} name one twice\n\n"
        f"Sensitivity, {moved.questions:,} questions, strength {moved.scr.strength:.2f}, blocks {first} to {last}: "
        f"median |margin| {moved.margin:.3f}, median |shift| {shifts}"
    )
