"""The shipped checkpoint, measured: it answers well, and hallucinates what belongs to the context."""

from pathlib import Path

import pytest
import torch

from scenes import CATEGORIES, CHECKPOINT
from scenes.drawing import caption, render_scene
from scenes.measure import STREAM, Measured, as_text, held_out_images, measure, repeating


@pytest.fixture(scope="module")
def measured() -> Measured:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("scenes.measure._MOVED", 10)  # each is asked three times
            return measure(CHECKPOINT, seed=0, count=60)
    finally:
        torch.set_num_threads(threads)


def test_held_out_images_are_the_scenes_of_their_stream(tmp_path: Path):
    images = held_out_images(tmp_path, seed=3, count=5)
    assert images.categories == tuple(c.name for c in sorted(CATEGORIES, key=lambda c: c.coco_id))
    for index, image_id in enumerate(images.ids):
        scene = render_scene(3, STREAM, index)
        assert (scene.image == images.open(image_id)).all()
        assert images.present(image_id) == {CATEGORIES[i].name for i in scene.present}
    assert caption(render_scene(3, STREAM, 0)) in (tmp_path / f"annotations/captions_{STREAM}.json").read_text()


def test_checkpoint_hallucinates_what_belongs_to_the_context(measured: Measured):
    adversarial, random = measured.scores["adversarial"], measured.scores["random"]
    assert adversarial.accuracy > 0.65
    assert random.accuracy > 0.8
    assert adversarial.hr.mean > random.hr.mean + 0.05


def test_captions_name_what_is_there(measured: Measured):
    assert measured.captioned == 60
    assert measured.captions.chair_i < 0.3
    assert measured.captions.recall > 0.4


def test_the_edit_moves_answers_a_little(measured: Measured):
    moved = measured.moved
    assert (moved.scr.edit_layers, moved.scr.attention_layers) == ((0, 2), (2, 4))
    assert 0 < moved.share("two-pass") < 0.05
    assert moved.questions > 60


def test_a_caption_that_names_a_category_twice_repeats():
    texts = ["A car, a bus and a car on sand.", "A car and a bus on sand.", "A cup and two cups."]
    assert repeating(texts, ["car", "cup"]) == pytest.approx(2 / 3)


def test_figures_are_shown(measured: Measured):
    text = as_text(measured)
    assert [line.split()[0] for line in text.splitlines()[5:8]] == ["random", "popular", "adversarial"]
    assert f"{measured.questions['random']:,}" in text
    assert "CHAIR-s" in text
    assert "Sensitivity" in text and "blocks 0 to 2" in text
    assert 6 * 50 < measured.questions["random"] <= 6 * 60
