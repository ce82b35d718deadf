from __future__ import annotations

import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from data.errors import DiskTooSmallError, TooManyBadImagesError
from data.folder import HarvestSummary
from data.images import CocoImages
from data.plan import plan_shards
from tests.data import tiny
from tests.data.tiny import contents

Run = Callable[..., HarvestSummary]


def planned(images: CocoImages) -> list[int]:
    return [image_id for plan in plan_shards(images.ids, tiny.SETTINGS) for image_id in plan.image_ids]


def test_too_many_bad_images_stop_the_harvest_with_the_list_until_they_are_repaired(
    tmp_path: Path, run_harvest: Run, undisturbed: Path
):
    images = tiny.write_coco(tmp_path / "coco", 40)
    bad = [planned(images)[2], planned(images)[13]]
    intact = {image_id: images.path(image_id).read_bytes() for image_id in bad}
    for image_id in bad:
        tiny.truncate_image(images, image_id)
    for _ in range(2):
        with pytest.raises(TooManyBadImagesError, match=r"2 images cannot be decoded, at most 1") as caught:
            run_harvest(tmp_path / "shards", images)
        assert all(f"{image_id:06d}.png" in str(caught.value) for image_id in bad)
    for image_id, content in intact.items():
        images.path(image_id).write_bytes(content)
    assert run_harvest(tmp_path / "shards", images).shards_reused == 1
    expected, found = contents(undisturbed), contents(tmp_path / "shards")
    del expected["index.json"], found["index.json"]  # it names the folder of the images
    assert found == expected


def test_a_disk_that_is_too_small_is_reported(
    tmp_path: Path,
    coco: CocoImages,
    run_harvest: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(DiskTooSmallError, match=r"needs 0\.\d MB.*harvest\.samples"):
        run_harvest(tmp_path, coco)
    assert "30 images x 2 prompts, 16 visual tokens each (480 in all)" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.tar*"))
