"""What comes before a harvest: the embedded world, and a look at the disk."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from configs import TrainConfig, load_config
from data.errors import DiskTooSmallError
from pipeline import harvest, stages

SMALL = ["harvest.samples=4", "harvest.validation=1", "harvest.test=1", "data.world.train=6", "data.world.val=2"]


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return load_config([f"runs_dir={tmp_path / 'runs'}", *SMALL, "evaluation.images=0"])


def test_a_world_is_spoken_of_once_in_a_process(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    for images in (harvest.training_images, harvest.held_out_images, harvest.training_images):
        images(config)
    assert capsys.readouterr().out.count("scenes: ") == 1
    harvest._WORLDS.clear()  # as a second command
    for _ in range(2):
        harvest.training_images(config)
    assert capsys.readouterr().out.count("reusing the finished world") == 1


def test_a_disk_that_is_too_small_is_known_before_the_model_is_loaded(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    harvest.training_images(config)
    for place in (harvest, stages):
        monkeypatch.setattr(place, "load_vlm", lambda _: pytest.fail("the model was loaded"))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    for begin in (harvest.run, stages.Work):
        with pytest.raises(DiskTooSmallError, match=r"the harvest needs 0\.\d MB in .*harvest/scene-llava-scenes"):
            begin(config)
    assert not config.paths.harvest.exists()


def test_a_finished_harvest_needs_no_room(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config.paths.harvest.mkdir(parents=True)
    (config.paths.harvest / "index.json").write_text("{}")
    monkeypatch.setattr(harvest, "load_processor", lambda *_: pytest.fail("the disk was looked at"))
    harvest.check_space(config)
