"""Harvests that are killed, that run out of disk, whose shards are damaged: nothing is lost or doubled."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data import inspect
from data.errors import DataError, DiskTooSmallError, UnfinishedHarvestError
from data.folder import HarvestSummary
from data.images import CocoImages, split_ids
from data.index import SPLITS, damaged_shards, write_index
from data.shards import ShardReader, ShardWriter
from tests.data import tiny, victim
from tests.data.tiny import contents

Run = Callable[..., HarvestSummary]
PROJECT = Path(__file__).parents[2]


def drive(mode: str, coco: CocoImages, target: Path, *more: str) -> dict[str, Any]:
    run = subprocess.run(
        [sys.executable, "-m", "tests.data.victim", mode, str(coco.images_dir.parent), str(target), *more],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> CocoImages:
    return tiny.write_coco(tmp_path_factory.mktemp("coco") / "many", 90)


def assert_exactly_what_was_planned(target: Path, images: CocoImages) -> None:
    keys = [int(key) for split in SPLITS for key in ShardReader(target, split).keys]
    planned = split_ids(images.ids, victim.SETTINGS.splits, 0)
    assert keys == [image_id for ids in planned.values() for image_id in ids] and len(set(keys)) == len(keys)
    assert json.loads((target / "manifest.json").read_text())["splits"] == planned
    assert contents(target) == contents(target.with_name("undisturbed"))
    assert inspect.main(["verify", str(target)]) == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_at_a_hundred_random_moments(tmp_path: Path, many: CocoImages):
    result = drive("random", many, tmp_path / "killed", "100")
    assert result["kills"] == 100, result
    assert result["leftovers"] > 0 and len(result["shards seen"]) > 5, result  # killed while writing, and everywhere
    assert_exactly_what_was_planned(tmp_path / "killed", many)


@pytest.mark.slow
def test_two_processes_in_one_folder(tmp_path: Path, many: CocoImages):
    assert drive("together", many, tmp_path / "shared") == {"kills": 2, "refused": 8, "same": 4}


@pytest.mark.slow
def test_killed_while_renaming(tmp_path: Path, many: CocoImages):
    assert drive("renaming", many, tmp_path / "killed") == {"kills": 10}
    assert_exactly_what_was_planned(tmp_path / "killed", many)


@pytest.mark.slow
def test_killed_together_with_the_disk(tmp_path: Path, many: CocoImages):
    result = drive("vanishing", many, tmp_path / "last")
    assert result["kills"] >= 6 and result["progress"] == sorted(result["progress"]), result
    assert result["progress"][-1] > 0 and len(set(result["progress"])) > 3, result  # each resumes the one before
    assert_exactly_what_was_planned(tmp_path / "last", many)
    assert contents(tmp_path / "bucket") == contents(tmp_path / "last")


# ---- a small disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """400 KB of memory, as a file system."""
    folder = tmp_path / "small"
    folder.mkdir()
    try:
        mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
        tried = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if tried.returncode:
        pytest.skip(f"this process may not mount a file system: {tried.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_on_the_way(tmp_path: Path, small_disk: Path, coco: CocoImages, run_harvest: Run):
    target, filler = small_disk / "shards", small_disk / "filler"
    calls = 0

    def filling(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 8:  # another program takes the room, in the third shard
            with pytest.raises(OSError, match="No space left"), filler.open("wb", buffering=0) as stream:
                while True:
                    stream.write(bytes(4096))
        return tiny.fake_capture(*arguments)

    with pytest.raises(OSError) as caught:
        run_harvest(target, coco, capture=filling)
    assert caught.value.errno == errno.ENOSPC
    assert sorted(contents(target)) == [
        "harvest.json", "train-00000.json", "train-00000.tar", "train-00001.json", "train-00001.tar",
    ]  # fmt: skip
    with pytest.raises(DiskTooSmallError, match=r"0\.0 MB are free"):
        run_harvest(target, coco)
    filler.unlink()
    assert run_harvest(target, coco).shards_reused == 2
    run_harvest(tmp_path / "undisturbed", coco)
    assert contents(target) == contents(tmp_path / "undisturbed")


def test_a_disk_that_is_too_small_from_the_start(small_disk: Path, coco: CocoImages, run_harvest: Run):
    (small_disk / "ballast").write_bytes(bytes(250_000))
    with pytest.raises(DiskTooSmallError, match="are free"):
        run_harvest(small_disk / "shards", coco)
    assert sorted(os.listdir(small_disk / "shards")) == ["harvest.json"]


# ---- damage


def test_any_flipped_or_cut_byte_is_found_and_repaired(tmp_path: Path, coco: CocoImages, run_harvest: Run):
    target = tmp_path / "shards"
    run_harvest(target, coco)
    intact = contents(target)
    moments = random.Random(0)
    for number in range(40):
        name = moments.choice(sorted(intact.keys() - {"harvest.json"}))
        file, content = target / name, bytearray(intact[name])
        position = moments.randrange(len(content))
        if number % 2:
            content[position] ^= 1 << moments.randrange(8)
        else:
            del content[position:]
        file.write_bytes(content)
        assert inspect.main(["verify", str(target)]) != 0, (name, position)
        if name == "index.json":
            with pytest.raises(DataError):
                ShardReader(target, "train")
        run_harvest(target, coco)
        assert contents(target) == intact, (name, position)


def test_readers_name_the_missing_shards(tmp_path: Path, coco: CocoImages, run_harvest: Run):
    run_harvest(tmp_path, coco)
    for name in ("index.json", "train-00001.tar", "test-00000.json"):
        (tmp_path / name).unlink()
    with pytest.raises(UnfinishedHarvestError, match=r"2 of 7 shards are missing: train-00001, test-00000\. Run"):
        ShardReader(tmp_path, "train")
    run_harvest(tmp_path, coco)
    (tmp_path / "index.json").unlink()
    with pytest.raises(UnfinishedHarvestError, match="All 7 shards are there, but the index is not written yet"):
        ShardReader(tmp_path, "train")


def test_a_key_in_two_shards_is_found(tmp_path: Path, coco: CocoImages, run_harvest: Run):
    run_harvest(tmp_path, coco)
    with ShardWriter(tmp_path, "train-00003", "whatever") as writer:
        for sample in list(ShardReader(tmp_path, "train"))[:5]:
            writer.write(sample)
    index = json.loads((tmp_path / "index.json").read_text())
    splits: dict[str, list[str]] = {}
    for shard in index["shards"]:
        splits.setdefault(shard["split"], []).append(shard["name"])
    write_index(tmp_path, splits, index["settings"], {})
    (problem,) = damaged_shards(tmp_path)
    assert problem.name == "train-00003" and "is in train-00000 already" in str(problem)


def test_the_index_says_where_the_samples_come_from(tmp_path: Path, coco: CocoImages, run_harvest: Run):
    run_harvest(tmp_path, coco)
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["settings"].keys() == {
        "version", "model", "attention_layers", "annotations_sha256", "splits", "prompts_per_image", "prompt_mix",
        "shard_size", "states_dtype", "tuning", "seed",
    }  # fmt: skip
    assert index["settings"]["model"].keys() >= {"hub_id", "revision", "config_sha256", "weights_sha256", "dtype"}
    made = index["provenance"]
    assert made["scr"]["num_sources"] == tiny.CONFIG.num_sources and made["scr"]["attention_layers"] == [1, 2]
    assert made["image_backend"] in ("pil", "torchvision") and made["device"] == "cpu"
    assert made["libraries"].keys() >= {"python", "torch", "transformers", "pillow"}
    # a shard of another batch size, or of another release: both values are listed
    (tmp_path / "train-00001.tar").unlink()
    run_harvest(tmp_path, coco, batch_size=3)
    assert json.loads((tmp_path / "index.json").read_text())["provenance"]["batch_size"] == {"mixed": [3, 4]}
