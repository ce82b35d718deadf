"""A fit learns, saves what loads again, and leaves what it can't replace alone."""

from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText

from scenes.fit import Recipe, fit


def test_recipe_scales_its_steps_and_nothing_else():
    half = Recipe().scaled(0.5)
    assert half.tower_steps == round(Recipe().tower_steps / 2)
    assert half.tower_batch == Recipe().tower_batch
    with pytest.raises(ValueError, match="steps scale 0"):
        Recipe().scaled(0)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_short_fit_learns_and_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recipe = Recipe(tower_steps=12, tower_batch=16, language_steps=6, language_batch=4)
    result = fit(tmp_path / "checkpoint", seed=1, recipe=recipe, workers=0)
    assert {stage: len(losses) for stage, losses in result.items()} == {"A": 12, "B": 6}
    for stage, losses in result.items():
        assert losses[-1] < losses[0], stage
    said = capsys.readouterr().out
    assert "A tower: 12 steps, 192 images" in said and "mAP 0." in said and "B language: 6 steps, 24 images" in said
    AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint")
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


def test_fit_refuses_a_folder_of_other_things(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("keep me")
    with pytest.raises(ValueError, match="holds other files"):
        fit(tmp_path)
