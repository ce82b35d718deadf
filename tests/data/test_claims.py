"""Whose a folder is: a harvest is never lost to a bad settings file, and never replaced unasked."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.claims import adopted, claim, difference, working_in
from data.errors import HarvestFolderError, HarvestMismatchError
from data.folder import HarvestSummary
from data.harvest import harvest
from data.harvester import prepare
from data.images import CocoImages
from data.plan import Job, settings_digest
from data.store import Store
from tests.data import odd, tiny
from tests.data.tiny import contents

Run = Callable[..., HarvestSummary]


def never(*_: Any) -> Any:
    raise AssertionError("nothing is left to run")


def marks(directory: Path) -> dict[str, tuple[int, int]]:
    """What changes when a file is written or replaced."""
    return {file.name: (file.lstat().st_ino, file.lstat().st_mtime_ns) for file in directory.iterdir()}


def job_in(directory: Path, **settings: Any) -> Job:
    """A job without shards to make."""
    recorded = {"version": 1, "model": {"hub_id": "m", "processor_sha256": "p"}, "seed": 0, **settings}
    return Job(directory, (), recorded, {}, 1, (1, 1, 1), 1)


# -- a damaged harvest.json


@pytest.mark.parametrize(
    ("witness", "kind"),
    [
        *(("sidecars and index", kind) for kind in (*odd.KINDS, *odd.CONTENTS) if kind != "a folder"),
        *(
            (witness, kind)
            for witness in ("sidecars", "one sidecar", "index")
            for kind in ("missing", "noise", "null")
        ),
    ],
)
def test_settings_that_are_damaged_are_re_created_from_what_the_shards_say(
    coco: CocoImages, run_harvest: Run, undisturbed: Path, capsys: pytest.CaptureFixture[str], kind: str, witness: str
):
    intact = contents(undisturbed)
    if kind == "missing":
        (undisturbed / "harvest.json").unlink()
    else:
        odd.put(undisturbed / "harvest.json", kind)
    sidecars = sorted(undisturbed.glob("*-*.json"))
    gone = {"sidecars": [undisturbed / "index.json"], "index": sidecars, "sidecars and index": [],
            "one sidecar": [undisturbed / "index.json", *sidecars[1:]]}[witness]  # fmt: skip
    for file in gone:
        file.unlink()
    run_harvest(undisturbed, coco, capture=never if "sidecars" in witness else tiny.fake_capture)
    assert contents(undisturbed) == intact
    assert "its shards were made with these settings: it is re-created" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("kind", ["missing", "a FIFO", "noise", "a list"])
@pytest.mark.parametrize("witness", ["sidecars and index", "sidecars", "index"])
def test_shards_of_other_settings_are_known_by_what_they_say_themselves(
    coco: CocoImages, run_harvest: Run, undisturbed: Path, kind: str, witness: str
):
    if kind == "missing":
        (undisturbed / "harvest.json").unlink()
    else:
        odd.put(undisturbed / "harvest.json", kind)
    for file in {"sidecars": [undisturbed / "index.json"], "index": list(undisturbed.glob("*-*.json"))}.get(
        witness, []
    ):
        file.unlink()
    before = marks(undisturbed)
    with pytest.raises(HarvestMismatchError) as caught:
        run_harvest(undisturbed, coco, seed=1)
    assert caught.value.difference.keys() == ({"digest of the settings"} if witness == "sidecars" else {"seed"})
    assert marks(undisturbed) == before


@pytest.mark.parametrize("kind", ["missing", "a FIFO", "noise", "deep objects"])
def test_where_nobody_knows_the_settings_nothing_is_touched(
    coco: CocoImages, run_harvest: Run, undisturbed: Path, kind: str
):
    for file in undisturbed.glob("*.json"):
        file.unlink()
    if kind != "missing":
        odd.put(undisturbed / "harvest.json", kind)
    before = marks(undisturbed)
    with pytest.raises(
        HarvestFolderError, match=r"harvest\.json .*nobody knows what was harvested.*harvest\.name=NAME"
    ):
        run_harvest(undisturbed, coco)
    assert marks(undisturbed) == before
    assert run_harvest(undisturbed, coco, overwrite=True).reused == 0


def test_settings_alone_that_are_damaged_are_refused_too(tmp_path: Path, coco: CocoImages, run_harvest: Run):
    odd.put(tmp_path / "harvest.json", "half an object")
    with pytest.raises(HarvestFolderError, match="Nothing was removed"):
        run_harvest(tmp_path, coco)
    assert contents(tmp_path) == {"harvest.json": odd.CONTENTS["half an object"]}


@pytest.mark.parametrize("kind", ["noise", "a number", "changed"])
def test_damaged_settings_at_a_url(tmp_path: Path, coco: CocoImages, run_harvest: Run, kind: str):
    url = f"file://{tmp_path}/bucket"
    run_harvest(tmp_path / "one", coco, output=url)
    file = tmp_path / "bucket" / "harvest.json"
    intact = contents(tmp_path / "bucket")
    damaged = intact["harvest.json"].replace(b'"seed": 0', b'"seed": 2') if kind == "changed" else odd.CONTENTS[kind]
    file.write_bytes(damaged)
    with pytest.raises(HarvestMismatchError, match="never removed from here"):
        run_harvest(tmp_path / "two", coco, output=url, seed=1)
    assert not (tmp_path / "two").exists() and file.read_bytes() == damaged
    run_harvest(tmp_path / "two", coco, output=url, capture=never)
    assert contents(tmp_path / "bucket") == contents(tmp_path / "two") == intact
    for name in intact.keys() - {"harvest.json"}:
        if name.endswith(".json"):
            (tmp_path / "bucket" / name).unlink()
    file.write_bytes(b"noise")
    with pytest.raises(HarvestFolderError, match=r"harvest\.json .* nobody knows"):
        run_harvest(tmp_path / "three", coco, output=url)
    assert Store(url).sizes()["train-00000.tar"] == len(intact["train-00000.tar"])


def test_a_system_that_cannot_read_is_no_damage(
    coco: CocoImages, run_harvest: Run, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
):
    """A disk that fails for a moment costs neither settings nor shards."""
    before = marks(undisturbed)
    plain = os.open
    for failing in ("harvest.json", "train-00001.json", "train-00001.tar", "index.json"):

        def refused(path: Any, *arguments: Any, failing: str = failing, **others: Any) -> int:
            if str(path).endswith(failing):
                raise OSError(errno.EIO, "Input/output error")
            return plain(path, *arguments, **others)

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", refused)
            if failing == "index.json":
                run_harvest(undisturbed, coco, capture=never)
            else:
                with pytest.raises(HarvestFolderError, match=rf"{failing} cannot be read \(Input/output error\)"):
                    run_harvest(undisturbed, coco, capture=never)
        if failing != "index.json":
            assert marks(undisturbed) == before


# -- other settings


def test_a_mismatch_offers_three_ways_and_removes_nothing(coco: CocoImages, run_harvest: Run, undisturbed: Path):
    before = contents(undisturbed)
    with pytest.raises(HarvestMismatchError) as caught:
        run_harvest(undisturbed, coco, seed=1)
    for way in ("Ask for the old settings", "harvest.name=NAME", "overwrite=true", "Nothing was removed"):
        assert way in str(caught.value)
    assert contents(undisturbed) == before


@pytest.mark.parametrize(
    ("old", "new", "hint"),
    [
        ("CLIPImageProcessorPil", "CLIPImageProcessor", "torchvision has been installed since"),
        ("CLIPImageProcessor", "CLIPImageProcessorPil", "torchvision is not installed any more"),
        ("CLIPImageProcessor", "SiglipImageProcessor", None),
        ("CLIPImageProcessor", None, None),
    ],
)
def test_another_image_back_end_names_its_package(tmp_path: Path, old: str, new: str | None, hint: str | None):
    message = str(HarvestMismatchError(tmp_path, {"model.image_processor": (old, new)}))
    assert "Nothing was removed" in message
    assert (hint in message) if hint else ("torchvision" not in message)


def test_long_differences_are_cut(tmp_path: Path):
    message = str(HarvestMismatchError(tmp_path, {f"key{number:03d}": ("x" * 9999, 1) for number in range(500)}))
    assert len(message) < 5000 and "and 480 more" in message


def test_a_foreign_shard_among_ours_is_not_replaced(
    tmp_path: Path, coco: CocoImages, run_harvest: Run, undisturbed: Path
):
    run_harvest(tmp_path / "other", coco, seed=1)
    for name in ("train-00001.tar", "train-00001.json"):
        (undisturbed / name).write_bytes((tmp_path / "other" / name).read_bytes())
    before = contents(undisturbed)
    with pytest.raises(HarvestMismatchError, match=r"digest of the settings in train-00001\.json"):
        run_harvest(undisturbed, coco)
    assert contents(undisturbed) == before
    run_harvest(undisturbed, coco, overwrite=True)
    run_harvest(tmp_path / "fresh", coco)
    assert contents(undisturbed) == contents(tmp_path / "fresh")


def test_overwrite_keeps_what_was_made_with_these_settings(coco: CocoImages, run_harvest: Run, undisturbed: Path):
    before = contents(undisturbed)
    (undisturbed / "harvest.json").write_bytes(b"noise")
    assert run_harvest(undisturbed, coco, capture=never, overwrite=True).reused == 30
    assert contents(undisturbed) == before


def test_a_harvest_in_use_is_not_overwritten(tmp_path: Path):
    job, other = job_in(tmp_path), job_in(tmp_path, seed=1)
    claim(job)
    (tmp_path / "train-00000.json").write_bytes(b"what somebody makes")
    with working_in(job):
        with pytest.raises(HarvestFolderError, match="another process harvests into"):
            claim(other, overwrite=True)
        with working_in(job):  # but others of the same settings may work beside it
            pass
    assert (tmp_path / "train-00000.json").exists()
    claim(other, overwrite=True)
    assert not (tmp_path / "train-00000.json").exists()
    with pytest.raises(HarvestMismatchError), working_in(job):
        raise AssertionError("the folder is somebody else's now")


def test_folders_of_other_people_are_no_shards(tmp_path: Path):
    """`overwrite` removes files of ours, and no folder whatever its name."""
    claim(job_in(tmp_path))
    (tmp_path / "train-00007.tar").mkdir()
    (tmp_path / "train-00007.tar" / "photo").touch()
    (tmp_path / "train-00008.tar").touch()
    claim(job_in(tmp_path, seed=1), overwrite=True)
    assert (tmp_path / "train-00007.tar" / "photo").exists() and not (tmp_path / "train-00008.tar").exists()


# -- settings that later versions have


def test_a_key_that_older_harvests_lack_is_no_difference():
    new = {"model": {"hub_id": "m", "processor_sha256": "p"}, "seed": 0}
    assert difference({"model": {"hub_id": "m"}, "seed": 0}, new) == {}
    assert difference(new, {**new, "model": {"hub_id": "m", "processor_sha256": "q"}}) == {
        "model.processor_sha256": ("p", "q")
    }
    assert difference({"model": None, "seed": 0}, new).keys() == {"model.hub_id", "model.processor_sha256"}


@pytest.mark.parametrize("damaged", [False, True])
def test_an_older_harvest_stays_valid(
    tmp_path: Path, llava: tuple[Any, Any], coco: CocoImages, monkeypatch: pytest.MonkeyPatch, damaged: bool
):
    """Its settings know nothing of the processor's files: it is finished, and reused, without them."""
    model, processor = llava
    monkeypatch.setattr("data.harvester.model_identity", lambda *_: {"hub_id": "m"})

    def prepared(capture: Any) -> Any:
        return prepare(tmp_path, model=model, processor=processor, scr=tiny.CONFIG, images=coco,
                       settings=tiny.SETTINGS, capture=capture)  # fmt: skip

    harvest(*prepared(tiny.fake_capture))
    intact = contents(tmp_path)
    monkeypatch.setattr("data.harvester.model_identity", lambda *_: {"hub_id": "m", "processor_sha256": "p"})
    if damaged:
        (tmp_path / "harvest.json").write_bytes(b"[")
    assert harvest(*prepared(never)).reused == 30
    (tmp_path / "train-00001.tar").unlink()
    assert harvest(*prepared(tiny.fake_capture)).shards_reused == 6
    assert contents(tmp_path) == intact
    monkeypatch.setattr("data.harvester.model_identity", lambda *_: {"hub_id": "n", "processor_sha256": "p"})
    with pytest.raises(HarvestMismatchError) as caught:
        harvest(*prepared(never))
    assert caught.value.difference == {"model.hub_id": ("m", "n")}


def test_a_newer_harvest_knows_another_processor(tmp_path: Path):
    job = job_in(tmp_path)
    assert adopted(job) == job
    claim(job)
    assert adopted(job) == job
    other = job_in(tmp_path, model={"hub_id": "m", "processor_sha256": "q"})
    assert adopted(other) == other
    with pytest.raises(HarvestMismatchError, match=r"model\.processor_sha256: 'p' -> 'q'"):
        claim(other)
    (tmp_path / "harvest.json").write_text(json.dumps({**job.settings, "model": {"hub_id": "m"}}))
    assert adopted(job) == replace(job, settings={**job.settings, "model": {"hub_id": "m"}})
    claim(adopted(job))
    assert settings_digest(adopted(job).settings) == adopted(job).settings_digest
