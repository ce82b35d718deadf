"""Whatever lies where a file of a harvest is expected: only errors of ours, nothing hangs, nothing is lost.

A file of a harvest that is odd is refused by its readers, or harmless; and the next harvest puts it right, or says in
one error what stands in its way and touches nothing.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data import inspect
from data.claims import difference
from data.errors import DataError
from data.folder import HarvestSummary
from data.images import CocoImages
from data.index import SPLITS
from data.sample import Sample
from data.settings import ReadingSettings
from data.shards import ShardReader
from data.stream import StreamedBatches
from tests.data import odd, tiny
from tests.data.tiny import contents

Run = Callable[..., HarvestSummary]
FILES = ("harvest.json", "index.json", "manifest.json", "train-00001.json", "train-00001.tar")
SMALL: dict[str, Any] = {"samples": 4, "validation": 1, "test": 1, "shard_size": 2}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, llava: tuple[Any, Any], coco: CocoImages) -> Path:
    """A finished harvest of four shards; not to be changed."""
    from data.harvest import harvest
    from data.harvester import prepare

    model, processor = llava
    directory = tmp_path_factory.mktemp("whole") / "shards"
    settings = tiny.changed(**SMALL)
    made = prepare(directory, model=model, processor=processor, scr=tiny.CONFIG, images=coco, settings=settings,
                   capture=tiny.fake_capture)  # fmt: skip
    harvest(*made)
    return directory


def samples_of(directory: Path) -> dict[str, Sample]:
    return {sample.key: sample for split in SPLITS for sample in ShardReader(directory, split)}


def streamed_keys(directory: Path) -> list[str]:
    batches = StreamedBatches(directory, ReadingSettings(batch_size=2, cache="stream"))
    return sorted({key for batch in batches for key in batch["key"]})


def assert_refused_or_harmless(directory: Path, expected: dict[str, Sample]) -> None:
    """Every reader raises an error of ours, or gives what was written."""
    try:
        found = samples_of(directory)
    except DataError as error:
        assert str(error)
    else:
        assert found.keys() == expected.keys()
        for key, sample in found.items():
            tiny.assert_same(sample, expected[key])
    try:
        assert streamed_keys(directory) == sorted(key for key in expected if key in streamed_keys(directory))
    except DataError as error:
        assert str(error)


def assert_repaired_or_untouched(directory: Path, images: CocoImages, run: Run, intact: dict[str, bytes]) -> bool:
    before = {file.name: file.lstat().st_ino for file in directory.iterdir()}
    try:
        run(directory, images, **SMALL)
    except DataError as error:
        assert str(directory) in str(error)
        assert {file.name: file.lstat().st_ino for file in directory.iterdir()} == before
        return False
    assert contents(directory) == intact
    return True


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", [*odd.KINDS, *odd.CONTENTS])
def test_odd_files_are_refused_by_readers_and_repaired_by_the_next_harvest(
    tmp_path: Path, whole: Path, coco: CocoImages, run_harvest: Run, name: str, kind: str
):
    expected, intact = samples_of(whole), contents(whole)
    directory = tmp_path / "shards"
    shutil.copytree(whole, directory)
    odd.put(directory / name, kind)
    assert_refused_or_harmless(directory, expected)
    verified = inspect.main(["verify", str(directory)])
    assert verified == (0 if name == "harvest.json" else 2 if name == "index.json" else 1)  # it plays no part there
    assert inspect.main(["show", str(directory), "--output", str(tmp_path / "sheet.png")]) in (0, 2)
    repaired = assert_repaired_or_untouched(directory, coco, run_harvest, intact)
    assert repaired == (kind != "a folder")  # whose content might be somebody's


@pytest.mark.parametrize("kind", [*odd.KINDS, "nothing", "deep lists", "impossible numbers"])
def test_an_unfinished_harvest_with_odd_settings_is_reported(tmp_path: Path, kind: str):
    odd.put(tmp_path / "harvest.json", kind)
    with pytest.raises(DataError, match="holds no finished harvest"):
        ShardReader(tmp_path, "train")


def test_a_harvest_that_is_no_folder(tmp_path: Path, coco: CocoImages, run_harvest: Run):
    for kind in (*odd.KINDS, "noise"):
        place = tmp_path / kind.replace(" ", "-")
        odd.put(place, kind)
        if kind == "a folder":
            continue
        assert inspect.main(["verify", str(place)]) == 2
        assert inspect.main(["show", str(place)]) == 2
        with pytest.raises(DataError, match=r"cannot be used for a harvest .*runs_dir"):
            run_harvest(place, coco, **SMALL)
        with pytest.raises(DataError, match="cannot be used for a harvest"):
            run_harvest(place / "below", coco, **SMALL)
        assert place.is_symlink() or (place.exists() and not place.is_dir())


# ---- flips


def test_any_flipped_bit_is_refused_or_harmless_and_repaired(
    tmp_path: Path, whole: Path, coco: CocoImages, run_harvest: Run
):
    expected, intact = samples_of(whole), contents(whole)
    directory = tmp_path / "shards"
    shutil.copytree(whole, directory)
    moments = random.Random(int(os.environ.get("FLIPS_SEED", "0")))
    for number in range(200):
        name = FILES[1 + number % (len(FILES) - 1)]  # the settings have a test of their own
        content = bytearray(intact[name])
        position = moments.randrange(len(content))
        content[position] ^= 1 << moments.randrange(8)
        (directory / name).write_bytes(content)
        assert_refused_or_harmless(directory, expected)
        if number % 5 == 0:
            run_harvest(directory, coco, **SMALL)
            assert contents(directory) == intact, (name, position)
        else:
            (directory / name).write_bytes(intact[name])


def test_a_flip_in_the_settings_is_no_other_harvest(
    tmp_path: Path, whole: Path, coco: CocoImages, run_harvest: Run, capsys: pytest.CaptureFixture[str]
):
    """Every single bit of them, most of which leave legal JSON with another value."""
    intact = contents(whole)
    directory = tmp_path / "shards"
    shutil.copytree(whole, directory)
    settings = intact["harvest.json"]
    for place in range(0, 8 * len(settings), 61):
        content = bytearray(settings)
        content[place // 8] ^= 1 << place % 8
        (directory / "harvest.json").write_bytes(content)
        run_harvest(directory, coco, capture=_never, **SMALL)
        found = contents(directory)
        if found.pop("harvest.json") != settings:  # "revision": null under another name means the same
            assert not difference(json.loads(content), json.loads(settings))
        assert found == {name: bytes_ for name, bytes_ in intact.items() if name != "harvest.json"}
    assert "it is re-created" in " ".join(capsys.readouterr().out.split())


def _never(*_: Any) -> Any:
    raise AssertionError("nothing is left to run")
