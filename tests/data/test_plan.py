from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from data.errors import NotEnoughImagesError
from data.folder import HarvestSummary
from data.images import CocoImages
from data.plan import plan_shards
from tests.data import tiny

Run = Callable[..., HarvestSummary]


def test_the_plan_uses_every_image_once(coco: CocoImages):
    plans = plan_shards(coco.ids, tiny.SETTINGS)
    assert [plan.name for plan in plans] == [
        *(f"train-{n:05d}" for n in range(4)), "validation-00000", "validation-00001", "test-00000",
    ]  # fmt: skip
    used = [i for plan in plans for i in (*plan.image_ids, *plan.reserve)]
    assert sorted(used) == list(coco.ids)
    assert [len(plan.image_ids) for plan in plans] == [5, 5, 5, 5, 5, 1, 4]


def test_images_for_tuning_are_listed_and_in_no_shard(tmp_path: Path, coco: CocoImages, run_harvest: Run):
    run_harvest(tmp_path, coco, tuning=7)
    index = json.loads((tmp_path / "index.json").read_text())
    tuning = index["set_aside"]["tuning"]
    plans = plan_shards(coco.ids, tiny.changed(tuning=7))
    used = [i for plan in plans for i in (*plan.image_ids, *plan.reserve)]
    assert len(tuning) == 7 and sorted([*used, *tuning]) == list(coco.ids)
    assert index["settings"]["tuning"] == 7
    assert [plan.image_ids for plan in plans] == [p.image_ids for p in plan_shards(coco.ids, tiny.SETTINGS)]
    with pytest.raises(NotEnoughImagesError, match=r"4 test \+ 11 tuning.*harvest\.tuning"):
        run_harvest(tmp_path / "b", coco, tuning=11)


def test_more_samples_than_images(tmp_path: Path, coco: CocoImages, run_harvest: Run):
    with pytest.raises(NotEnoughImagesError, match=r"41 images.*only 40.*harvest\.samples"):
        run_harvest(tmp_path / "none", coco, samples=39, validation=1, test=1)
    assert not (tmp_path / "none").exists()
