"""Measures a scene model on held-out scenes with the project's own code: POPE's questions, and CHAIR of captions."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data.chat import chat_inputs
from data.images import CocoImages
from data.questions import STRATEGIES
from data.settings import VLMSettings
from data.vlm import load_vlm
from data.wording import CAPTION_PROMPT
from evaluation.chair import Chair, chair
from evaluation.compare import compare
from evaluation.methods import VANILLA
from evaluation.reference import prepare_reference
from evaluation.scores import Score
from evaluation.settings import EvaluationSettings
from evaluation.synonyms import Vocabulary
from evaluation.tables import table
from scenes.world import write_stream
from scr_runtime import SCRConfig

STREAM = "fit-check"  # which no stage was trained on
_BATCH = 50
_CAPTIONED = 300  # scenes at most
_CAPTION_TOKENS = 48
_ANY_LAYERS = SCRConfig(edit_layers=(0, 2), attention_layers=(2, 4))  # that the model has: vanilla alone is asked


@dataclass(frozen=True)
class Measured:
    """What a checkpoint reaches.

    Attributes:
        scenes: Held-out scenes asked about.
        scores: Strategy -> score of the yes/no questions.
        questions: Strategy -> number of its questions.
        captioned: Scenes described.
        captions: How faithful the descriptions are.
    """

    scenes: int
    scores: dict[str, Score]
    questions: dict[str, int]
    captioned: int
    captions: Chair


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
        images = held_out_images(Path(folder), seed, count)
        asked = EvaluationSettings(
            images=count, batch_size=_BATCH, seed=seed, benchmarks=["pope"], methods=[VANILLA], prompts=["plain"],
            decoding="margin",
        )  # fmt: skip
        found = compare(prepare_reference(model, processor, _ANY_LAYERS, images, asked), {}, asked)
        captions = describe(model, processor, images, images.ids[:_CAPTIONED])
    assert found.headline is not None and found.quiz is not None
    words = Vocabulary({name: [] for name in images.categories})
    return Measured(
        scenes=count,
        scores={name: found.headline.scores[VANILLA, name] for name in STRATEGIES},
        questions={name: len(split.ids) for name, split in found.quiz.splits.items()},
        captioned=len(captions),
        captions=chair(captions, words, [images.present(i) for i in images.ids[: len(captions)]]),
    )


def held_out_images(folder: Path, seed: int, count: int) -> CocoImages:
    """Renders the first scenes of the held-out stream into a folder."""
    with tqdm(total=count, desc="render scenes", unit="image") as progress:
        write_stream(folder, STREAM, count, seed, progress)
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
    captions = measured.captions
    return (
        f"\nYes/no questions as in POPE, {measured.scenes} held-out scenes, greedy\n\n{table(rows)}\n\n"
        f"Captions of {measured.captioned} held-out scenes, greedy, at most {_CAPTION_TOKENS} tokens: "
        f"CHAIR-s {captions.chair_s:.3f}, CHAIR-i {captions.chair_i:.3f}, "
        f"recall {captions.recall:.3f}, {captions.mentioned:.1f} objects named"
    )
