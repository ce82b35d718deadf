"""A short fit of scene-next learns, saves what loads again, and comes out the same twice."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from data.chat import chat_inputs
from scenes.model import CAPTION_QUESTIONS
from scenes.next_fit import NextRecipe, fit_next

SHORT = NextRecipe(patch_steps=8, patch_batch=4, name_steps=3, name_batch=2, answer_steps=4, answer_batch=2)


def test_a_short_fit_learns_saves_and_is_deterministic(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    losses = fit_next(tmp_path / "first", seed=1, recipe=SHORT, workers=0)
    said = capsys.readouterr().out
    assert {stage: len(found) for stage, found in losses.items()} == {"A": 8, "B": 3, "C": 4}
    assert losses["A"][-1] < losses["A"][0]
    assert losses["C"][-1] < losses["C"][0]
    assert "A patches: 8 steps, 32 images" in said and "C answers: 4 steps, 8 images" in said
    assert json.loads((tmp_path / "first" / "fit.json").read_text())["sizes"] == "mixed"

    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "first", dtype=torch.float32)
    inputs = chat_inputs(
        AutoProcessor.from_pretrained(tmp_path / "first"), [Image.new("RGB", (128, 192))], [CAPTION_QUESTIONS[0]]
    )
    assert model(**inputs).logits.isfinite().all()

    assert fit_next(tmp_path / "second", seed=1, recipe=SHORT, workers=0) == losses
    first, second = (tmp_path / name / "model.safetensors" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


def test_recipe_scales_its_steps_and_nothing_else():
    half = NextRecipe().scaled(0.5)
    assert half.answer_steps == round(NextRecipe().answer_steps / 2)
    assert half.answer_batch == NextRecipe().answer_batch
    with pytest.raises(ValueError, match="steps scale -1"):
        NextRecipe().scaled(-1)


def test_fit_refuses_a_folder_of_other_things(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("keep me")
    with pytest.raises(ValueError, match="holds other files"):
        fit_next(tmp_path)
