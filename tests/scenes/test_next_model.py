"""scene-next: a real LLaVA-NeXT with its own processor; the shipped checkpoint loads, sees, and feels the edit."""

import json
import stat
from dataclasses import asdict
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaNextForConditionalGeneration

from data.chat import chat_inputs
from data.wording import question_text
from scenes import CATEGORIES, NEXT_CHECKPOINT
from scenes.drawing import MIXED, render_scene
from scenes.measure import scr_of
from scenes.model import CAPTION_QUESTIONS
from scenes.next_fit import NextRecipe
from scr_runtime import SCR, capture
from tests.scr_runtime.reference import Image as ReferenceImage
from tests.scr_runtime.reference import kept, reference_logits, reference_maps, reference_sources

PHOTOS = {(640, 480): (10, 12), (427, 640): (12, 8), (500, 500): (12, 12), (640, 200): (6, 18)}  # joined grid
SCENES = {(192, 144): (10, 12), (144, 192): (12, 10), (128, 192): (12, 8), (150, 150): (12, 12), (288, 96): (6, 18)}


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    model = AutoModelForImageTextToText.from_pretrained(NEXT_CHECKPOINT, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(NEXT_CHECKPOINT)


def test_checkpoint_is_small_and_that_of_the_default_recipe(shipped: tuple[Any, Any]):
    files = {file.name: file for file in NEXT_CHECKPOINT.iterdir()}
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl", ".ckpt"))]
    assert sum(file.stat().st_size for file in files.values()) < 8_000_000
    assert all(stat.S_IMODE(file.stat().st_mode) & 0o444 == 0o444 for file in files.values())
    fitted = json.loads(files["fit.json"].read_text())
    assert fitted["recipe"] == asdict(NextRecipe())
    assert fitted["sizes"] == "mixed"
    model, processor = shipped
    assert isinstance(model, LlavaNextForConditionalGeneration)
    assert type(processor).__name__ == "LlavaNextProcessor"
    assert type(processor.image_processor).__name__ == "LlavaNextImageProcessorPil"
    assert model.config.get_text_config().num_hidden_layers == 16
    scr = scr_of(model)
    assert (scr.edit_layers, scr.attention_layers, scr.source_fraction) == ((0, 5), (4, 8), 0.0556)


def reference_images(ids: list[int], token: int, row: int, joined: tuple[int, int]) -> list[ReferenceImage]:
    """Thumbnail and joined grid by hand: each row of the joined grid ends in a newline, which is no patch."""
    places = [place for place, found in enumerate(ids) if found == token]
    rows, columns = joined
    assert len(places) == 36 + rows * (columns + 1)
    tiles = [place for i, place in enumerate(places[36:]) if i % (columns + 1) < columns]
    return [ReferenceImage(row, places[:36], (6, 6)), ReferenceImage(row, tiles, joined)]


@pytest.mark.parametrize("size", [*PHOTOS, *SCENES])
def test_processor_makes_the_grids_of_the_runtime(shipped: tuple[Any, Any], size: tuple[int, int]):
    model, processor = shipped
    joined = (PHOTOS | SCENES)[size]
    inputs: Any = chat_inputs(processor, [Image.new("RGB", size)], [question_text("dog")])
    expected = reference_images(inputs["input_ids"][0].tolist(), model.config.image_token_id, 0, joined)
    found = capture(model, scr_of(model), inputs)
    assert [item.grid for item in found] == [image.grid for image in expected]


def test_two_pass_equals_the_eager_reference(shipped: tuple[Any, Any]):
    model, processor = shipped
    scr, sizes = scr_of(model, strength=1.5), [(192, 144), (288, 96)]
    pictures = [Image.fromarray(render_scene(0, "val", i, MIXED, size).image) for i, size in enumerate(sizes)]
    inputs: Any = chat_inputs(processor, pictures, [question_text("dog"), CAPTION_QUESTIONS[0]])
    token = model.config.image_token_id
    images = [
        image
        for row, (ids, size) in enumerate(zip(inputs["input_ids"].tolist(), sizes, strict=True))
        for image in reference_images(ids, token, row, SCENES[size])
    ]
    visual = inputs["input_ids"] == token
    maps = reference_maps(model, inputs, scr, None, images, visual)
    chosen = [
        reference_sources(attention, scr, image.grid, max(1, round(0.0556 * image.grid[0] * image.grid[1])))
        for attention, image in zip(maps, images, strict=True)
    ]
    expected, _ = reference_logits(model, inputs, scr, chosen, None, images, visual)
    with torch.no_grad():
        vanilla = model(**inputs).logits
        with SCR(model, config=scr, mode="two-pass") as attached:
            logits: Tensor = model(**inputs).logits
    assert [report.sources for report in attached.reports] == chosen
    torch.testing.assert_close(kept(inputs, logits), kept(inputs, expected), atol=1e-3, rtol=1e-3)
    assert (kept(inputs, logits) - kept(inputs, vanilla)).abs().max() > 0.1


def answers(shipped: tuple[Any, Any], images: list[Image.Image], questions: list[str], tokens: int = 4) -> list[str]:
    model, processor = shipped
    inputs: Any = chat_inputs(processor, images, questions)
    generated = model.generate(**inputs, do_sample=False, max_new_tokens=tokens)
    return processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_checkpoint_sees_objects_and_stops_after_its_answer(shipped: tuple[Any, Any]):
    images, questions, truth = [], [], []
    for index in range(24):
        scene = render_scene(0, "val", index, MIXED)
        absent = next(i for i, c in enumerate(CATEGORIES) if c.context != scene.context and i not in scene.present)
        for category, answer in ((scene.present[0], "yes"), (absent, "no")):
            images.append(Image.fromarray(scene.image))
            questions.append(question_text(CATEGORIES[category].name))
            truth.append(answer)
    answered = answers(shipped, images, questions)
    assert set(answered) <= {"yes", "no"}
    assert sum(a == b for a, b in zip(answered, truth, strict=True)) / len(truth) > 0.75


def test_checkpoint_describes_in_whole_sentences(shipped: tuple[Any, Any]):
    images = [Image.fromarray(render_scene(0, "val", index, MIXED).image) for index in range(8)]
    texts = answers(shipped, images, [CAPTION_QUESTIONS[0]] * 8, tokens=48)
    assert all(text.startswith(("A ", "An ")) and text.endswith(".") for text in texts)
