"""What scene-next learns from: one label for each visual token, in the model's own order."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from scenes.drawing import MIXED, render_scene
from scenes.next_lessons import BRANCHES, NO_PATCH, NextScenes, token_labels
from scenes.next_model import GRID, TILE, build_image_processor, build_next_model


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return build_next_model().eval()


@pytest.mark.parametrize("size", MIXED.sizes)
def test_every_visual_token_has_a_label(model: Any, size: tuple[int, int]):
    scene = render_scene(0, "val", 1, MIXED, size)
    tiles = build_image_processor()(images=Image.fromarray(scene.image), return_tensors="pt")
    with torch.no_grad():
        (features,) = model.model.get_image_features(tiles["pixel_values"], tiles["image_sizes"]).pooler_output
    labels = token_labels(scene.labels)
    assert len(labels) == len(features)
    newline = torch.isclose(features, model.model.image_newline).all(1)
    assert torch.equal(labels == NO_PATCH, newline)
    assert set(labels.tolist()) - {0, NO_PATCH} <= {i + 1 for i in scene.present}


def test_labels_stand_where_the_object_is():
    labels = np.zeros((192, 192), np.uint8)
    labels[:32, 160:] = 9  # the upper right corner
    found = token_labels(labels)
    thumbnail, joined = found[: GRID * GRID].view(GRID, GRID), found[GRID * GRID :].view(12, 13)
    assert thumbnail.nonzero().tolist() == [[0, 5]]
    assert (joined[:, :12] == 9).nonzero().tolist() == [[0, 10], [0, 11], [1, 10], [1, 11]]
    assert (joined[:, 12] == NO_PATCH).all()


def test_scenes_of_a_batch_have_one_size_and_batches_differ():
    batches = list(NextScenes(seed=0, start=7, batches=3, size=2, lessons="answers").read(workers=0))
    assert [tuple(batch["size"][0].tolist()) for batch in batches] == [(h, w) for w, h in MIXED.sizes[:3]]
    for batch in batches:
        assert (batch["size"] == batch["size"][0]).all()
        assert batch["pixels"].shape[-3:] == (3, TILE, TILE)
        assert batch["text"].shape == batch["targets"].shape == (2, sum(BRANCHES))
        assert "labels" not in batch
    (patches,) = NextScenes(seed=0, start=7, batches=1, size=2, lessons="patches").read(workers=0)
    assert torch.equal(patches["pixels"], batches[0]["pixels"])
    assert patches["labels"].shape[0] == 2 and "text" not in patches
