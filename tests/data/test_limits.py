from __future__ import annotations

import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from data.claims import claim
from data.errors import DiskTooSmallError, SettingsError, TooManyBadImagesError
from data.folder import HarvestSummary
from data.harvester import prepare
from data.images import CocoImages
from data.limits import check_disk
from data.plan import plan_shards
from data.sample import sample_bytes
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
        with pytest.raises(TooManyBadImagesError, match=r"2 images cannot be used, at most 1") as caught:
            run_harvest(tmp_path / "shards", images)
        assert all(f"{image_id:06d}.png" in str(caught.value) for image_id in bad)
    for image_id, content in intact.items():
        images.path(image_id).write_bytes(content)
    assert run_harvest(tmp_path / "shards", images).shards_reused == 1
    expected, found = contents(undisturbed), contents(tmp_path / "shards")
    del expected["index.json"], found["index.json"]  # it names the folder of the images
    assert found == expected


def test_the_estimate_looks_at_several_images_where_grids_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Photographs of three sizes: the mean is what is reported, the largest is what the check goes by."""
    images = tiny.write_coco(tmp_path / "coco", 40)
    for place, image_id in enumerate(images.ids):
        Image.new("RGB", [(32, 32), (64, 48), (80, 80)][place % 3]).save(images.path(image_id))
    tiny.truncate_image(images, planned(images)[0])
    model, processor = tiny.build_qwen()
    opened: list[int] = []
    plain = CocoImages.open
    monkeypatch.setattr(CocoImages, "open", lambda self, number: (opened.append(number), plain(self, number))[1])
    job, _ = prepare(tmp_path / "shards", model=model, processor=processor, scr=tiny.CONFIG, images=images,
                     settings=tiny.SETTINGS)  # fmt: skip
    fewest, mean, most = job.tokens_per_image
    assert (fewest, most) == (16, 100) and 30 < mean < 80
    assert len(opened) <= 6  # one of each size; another where that one does not decode
    assert job.bytes_per_image == sample_bytes(100, tiny.WIDTH, 2, torch.float16)
    claim(job)
    check_disk(job, job.names)
    said = " ".join(capsys.readouterr().out.split())
    assert f"30 images x 2 prompts, about {mean} visual tokens each (about {30 * mean:,} in all; 16 to 100 in" in said
    assert "at most" in said
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, 29 * job.bytes_per_image))
    with pytest.raises(DiskTooSmallError, match="needs up to"):
        check_disk(job, job.names)


def test_where_no_image_decodes_the_harvest_reports_them(tmp_path: Path, run_harvest: Run):
    images = tiny.write_coco(tmp_path / "coco", 40)
    for image_id in images.ids:
        tiny.truncate_image(images, image_id)
    with pytest.raises(TooManyBadImagesError):
        run_harvest(tmp_path / "shards", images)


def test_more_shards_than_records_can_list_are_refused():
    with pytest.raises(SettingsError, match=r"harvest\.shard_size=1 makes 300,002 shards"):
        plan_shards(range(300_010), tiny.changed(samples=300_000, validation=1, test=1, shard_size=1))
    with pytest.raises(SettingsError, match="a shard at most 200,000 images"):
        plan_shards(range(300_010), tiny.changed(samples=300_000, validation=1, test=1, shard_size=10**6))


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
