"""Scenes of every look: what is drawn, and that the square ones stay what they were."""

import hashlib

import numpy as np
import pytest

from scenes.drawing import LOOKS, MIXED, SIZE, STREAMS, Sizes, caption, render_scene

# Of the renderer before it learned sizes: the shipped scene-llava and every square world hang on these bytes.
SQUARE_SCENES = "e92462f2fe2c8d36505095a245ac0c9f004975d55b925dd3a5e74cdab5b5770c"


def test_square_scenes_keep_their_bytes():
    digest = hashlib.sha256()
    for stream in STREAMS:
        for index in range(5):
            scene = render_scene(0, stream, index)
            digest.update(scene.image.tobytes())
            digest.update(scene.labels.tobytes())
    assert digest.hexdigest() == SQUARE_SCENES


def test_mixed_scenes_have_every_size():
    scenes = [render_scene(0, "val", index, MIXED) for index in range(40)]
    sizes = {(scene.image.shape[1], scene.image.shape[0]) for scene in scenes}
    assert sizes == set(MIXED.sizes)
    assert all(SIZE <= side <= 3 * SIZE for size in sizes for side in size)
    ratios = {round(width / height, 2) for width, height in sizes}
    assert min(ratios) < 0.7 and max(ratios) == 3.0


@pytest.mark.parametrize("sizes", LOOKS)
def test_ground_truth_is_what_is_visible(sizes: Sizes):
    look = LOOKS[sizes]
    for index in range(20):
        scene = render_scene(5, "val", index, look)
        assert scene.image.shape == (*scene.labels.shape, 3)
        for thing in scene.objects:
            x, y, width, height = thing.box
            assert 0 <= x < x + width <= scene.labels.shape[1]
            assert 0 <= y < y + height <= scene.labels.shape[0]
            assert (scene.labels[y : y + height, x : x + width] == thing.category + 1).sum() >= thing.area
            assert look.min_visible <= thing.visible <= 1
        assert set(np.unique(scene.labels)) - {0} == {i + 1 for i in scene.present}
        assert caption(scene).endswith(f" on {scene.ground}.")


def test_a_size_can_be_asked_for():
    scene = render_scene(0, "fit", 3, MIXED, (288, 96))
    assert scene.image.shape == (96, 288, 3)
    assert np.array_equal(scene.image, render_scene(0, "fit", 3, MIXED, (288, 96)).image)


def test_objects_of_mixed_scenes_are_larger_than_those_of_square_ones():
    def share(sizes: Sizes) -> float:
        scenes = [render_scene(0, "val", index, LOOKS[sizes]) for index in range(40)]
        return float(np.median([thing.area / scene.labels.size for scene in scenes for thing in scene.objects]))

    assert share("mixed") > 1.5 * share("square")
