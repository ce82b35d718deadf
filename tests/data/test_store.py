"""Harvests with a copy at a URL: machines that share nothing else, and what interruptions leave there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest

from data.errors import DataError, DiskTooSmallError, HarvestMismatchError, StoreError
from data.folder import HarvestSummary
from data.images import CocoImages
from data.index import damaged_shards
from data.ranks import Rank
from data.shards import ShardReader
from data.store import Store
from tests.data import odd, tiny
from tests.data.tiny import contents

Run = Callable[..., HarvestSummary]


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "file":
        yield f"file://{tmp_path}/bucket/shards"
        return
    memory: Any = fsspec.filesystem("memory")
    yield "memory://bucket/shards"
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


def remote(url: str) -> dict[str, bytes]:
    store = Store(url)
    return store.read(list(store.sizes()))


def never(*_: Any) -> Any:
    raise AssertionError("nothing is left to run")


class Counted:
    """A fake diagnostic run that counts its batches; of each shard, these images are in one."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        return tiny.fake_capture(*arguments)


@pytest.fixture
def alone(tmp_path: Path, coco: CocoImages, run_harvest: Run) -> dict[str, bytes]:
    run_harvest(tmp_path / "alone", coco)
    return contents(tmp_path / "alone")


def test_the_copy_is_the_folder_and_another_machine_needs_no_model(
    tmp_path: Path, coco: CocoImages, run_harvest: Run, url: str, alone: dict[str, bytes]
):
    first = run_harvest(tmp_path / "one", coco, output=url)
    assert contents(tmp_path / "one") == remote(url) == alone
    second = run_harvest(tmp_path / "two", coco, output=url, capture=never)
    assert (second.shards_reused, second.fingerprint) == (7, first.fingerprint)
    assert contents(tmp_path / "two") == alone
    assert damaged_shards(tmp_path / "two") == []
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "two").iterdir()}
    run_harvest(tmp_path / "two", coco, output=url, capture=never)
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "two").iterdir()} == before


def test_a_local_harvest_is_published_when_a_url_is_given_later(
    tmp_path: Path, coco: CocoImages, run_harvest: Run, url: str, alone: dict[str, bytes]
):
    run_harvest(tmp_path / "alone", coco, output=url, capture=never)
    assert remote(url) == alone


def test_ranks_that_share_the_url_alone(
    tmp_path: Path, coco: CocoImages, run_harvest: Run, url: str, alone: dict[str, bytes], capsys: Any
):
    for number in range(3):
        result = run_harvest(tmp_path / f"machine{number}", coco, output=url, rank=Rank(number, 3))
        assert result.finished == (number == 2)
        assert len(list((tmp_path / f"machine{number}").glob("*.tar"))) == len(range(number, 7, 3))
        assert not (tmp_path / f"machine{number}" / "index.json").exists()  # it would name shards that are elsewhere
    assert "all 7 shards are there: the harvest is finished" in capsys.readouterr().out
    assert remote(url) == alone
    assert result.fingerprint == json.loads(alone["index.json"])["fingerprint"]
    run_harvest(tmp_path / "training", coco, output=url, capture=never)
    assert contents(tmp_path / "training") == alone


@pytest.mark.parametrize("lost", ["while uploading", "between tar and sidecar", "before the index"])
def test_a_machine_that_is_lost_leaves_whole_shards(
    tmp_path: Path,
    coco: CocoImages,
    run_harvest: Run,
    url: str,
    alone: dict[str, bytes],
    lost: str,
    monkeypatch: pytest.MonkeyPatch,
):
    """Its disk is gone; what stood at the URL at that moment is all there is."""
    plain_upload, plain_write = Store.upload_shard, Store.write

    class LostError(Exception):
        pass

    def upload(store: Store, directory: Path, name: str) -> None:
        if lost == "while uploading" and name == "train-00002":
            cut = (directory / f"{name}.tar").read_bytes()[:2000]
            plain_write(store, f"{name}.tar", cut)
            raise LostError
        plain_upload(store, directory, name)

    def write(store: Store, name: str, content: bytes) -> None:
        if (lost, name) in (("between tar and sidecar", "train-00002.json"), ("before the index", "index.json")):
            raise LostError
        plain_write(store, name, content)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "upload_shard", upload)
        patch.setattr(Store, "write", write)
        with pytest.raises(LostError):
            run_harvest(tmp_path / "lost", coco, output=url)
    there = remote(url)
    assert "index.json" not in there and "train-00001.json" in there
    assert ("train-00002.tar" in there, "train-00002.json" in there) == (True, lost == "before the index")
    whole = sum(name.endswith(".json") and name.startswith(("train", "val", "test")) for name in there)
    counted = Counted()
    result = run_harvest(tmp_path / "next", coco, output=url, capture=counted)
    assert result.shards_reused == whole and (counted.calls == 0) == (whole == 7)
    assert contents(tmp_path / "next") == remote(url) == alone


@pytest.mark.parametrize(
    "damage", ["flipped", "cut", "sidecar cut", "sidecar flipped", "tar missing", "index missing"]
)
def test_a_damaged_copy_is_redone_and_replaced(
    tmp_path: Path, coco: CocoImages, run_harvest: Run, url: str, damage: str, capsys: Any
):
    run_harvest(tmp_path / "one", coco, output=url)
    intact = contents(tmp_path / "one")
    store = Store(url)
    tar, sidecar = intact["train-00002.tar"], intact["train-00002.json"]
    if damage in ("flipped", "cut"):
        store.write("train-00002.tar", tar[:2000] + (b"\xff" + tar[2001:] if damage == "flipped" else b""))
    elif damage.startswith("sidecar"):
        store.write("train-00002.json", sidecar[:300] + (b"0" + sidecar[301:] if damage == "sidecar flipped" else b""))
    else:
        store.remove(["train-00002.tar" if damage == "tar missing" else "index.json"])
    capsys.readouterr()
    counted = Counted()
    result = run_harvest(tmp_path / "two", coco, output=url, capture=counted)
    redone = damage != "index missing"
    assert result.shards_reused == 7 - redone and counted.calls == 3 * redone  # 5 images x 2 prompts in batches of 4
    assert contents(tmp_path / "two") == remote(url) == intact
    if damage == "flipped":
        logged = f"shard train-00002 at {url}: the checksum of train-00002.tar is wrong; it is redone"
        assert logged in " ".join(capsys.readouterr().out.split())


def test_what_is_whole_here_repairs_the_copy(tmp_path: Path, coco: CocoImages, run_harvest: Run, url: str):
    run_harvest(tmp_path / "one", coco, output=url)
    store = Store(url)
    store.write("train-00002.tar", b"cut")
    run_harvest(tmp_path / "one", coco, output=url, capture=never)
    assert remote(url) == contents(tmp_path / "one")
    # and the other way round: what is damaged here is fetched
    intact = contents(tmp_path / "one")
    (tmp_path / "one" / "train-00000.tar").write_bytes(intact["train-00000.tar"][:-700] + b"x" * 700)
    (tmp_path / "one" / "test-00000.json").unlink()
    assert run_harvest(tmp_path / "one", coco, output=url, capture=never).shards_reused == 7
    assert contents(tmp_path / "one") == intact


def test_other_settings_are_rejected_with_their_difference_and_leave_nothing(
    tmp_path: Path, coco: CocoImages, run_harvest: Run, url: str
):
    run_harvest(tmp_path / "one", coco, output=url)
    before = remote(url)
    with pytest.raises(HarvestMismatchError, match=r"(?s)seed: 0 -> 1.*\(harvest\.output=\.\.\.\)") as caught:
        run_harvest(tmp_path / "two", coco, output=url, seed=1)
    assert url in str(caught.value)
    assert not (tmp_path / "two").exists() and remote(url) == before
    run_harvest(tmp_path / "two", coco, seed=1)
    here = contents(tmp_path / "two")
    with pytest.raises(HarvestMismatchError, match="seed: 0 -> 1"):  # others may use it: never removed from here
        run_harvest(tmp_path / "two", coco, output=url, seed=1, overwrite=True)
    assert remote(url) == before and contents(tmp_path / "two") == here
    run_harvest(tmp_path / "two", coco, output=url, overwrite=True, capture=never)  # but the folder is replaced
    assert contents(tmp_path / "two") == before


def test_where_both_have_a_shard_the_urls_counts(tmp_path: Path, coco: CocoImages, run_harvest: Run, url: str):
    """Two machines made the same shard with other rounding: one of the two replaces the other, everywhere."""

    def rounded(*arguments: Any) -> Any:
        return [replace(capture, attention=capture.attention * 1.001) for capture in tiny.fake_capture(*arguments)]

    run_harvest(tmp_path / "one", coco, output=url)
    there = remote(url)
    run_harvest(tmp_path / "two", coco, capture=rounded)
    assert contents(tmp_path / "two")["train-00000.tar"] != there["train-00000.tar"]
    run_harvest(tmp_path / "two", coco, output=url, capture=never)
    assert contents(tmp_path / "two") == remote(url) == there


def test_a_failing_store_is_reported_and_costs_no_shard(
    tmp_path: Path, coco: CocoImages, run_harvest: Run, url: str, monkeypatch: pytest.MonkeyPatch, alone: Any
):
    fs = type(Store(url)._fs)
    plain = fs.put_file

    def put_file(self: Any, path: str, *arguments: Any, **settings: Any) -> Any:
        if "train-00001" in path:
            raise PermissionError("no credentials")
        return plain(self, path, *arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(fs, "put_file", put_file)
        with pytest.raises(
            StoreError, match=r"harvest\.output: .* cannot be written: PermissionError: no credentials"
        ):
            run_harvest(tmp_path / "one", coco, output=url)
    made = len(list((tmp_path / "one").glob("*.tar")))
    assert made >= 2
    assert run_harvest(tmp_path / "one", coco, output=url).shards_reused == made
    assert remote(url) == contents(tmp_path / "one") == alone


def test_urls_that_cannot_be_used(tmp_path: Path, coco: CocoImages, run_harvest: Run):
    with pytest.raises(StoreError, match=r"harvest\.output: nope://bucket cannot be opened.*Protocol not known"):
        run_harvest(tmp_path, coco, output="nope://bucket/")
    with pytest.raises(StoreError, match=r"cannot be (written|changed|listed|read)"):
        (tmp_path / "file").write_text("in the way")
        run_harvest(tmp_path / "shards", coco, output=f"file://{tmp_path}/file/folder")


def test_fetching_looks_at_the_disk_first(
    tmp_path: Path, coco: CocoImages, run_harvest: Run, url: str, monkeypatch: pytest.MonkeyPatch
):
    run_harvest(tmp_path / "one", coco, output=url)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(DiskTooSmallError, match=rf"the shards that are at {url} and not in .* are free"):
        run_harvest(tmp_path / "two", coco, output=url)


@pytest.mark.parametrize(
    "name", ["harvest.json", "index.json", "manifest.json", "train-00002.json", "train-00002.tar"]
)
@pytest.mark.parametrize("kind", [*odd.KINDS, "nothing", "noise", "null", "deep lists", "wrong types"])
def test_odd_things_at_the_url_are_repaired_or_an_error_of_ours(
    tmp_path: Path, coco: CocoImages, run_harvest: Run, name: str, kind: str
):
    url = f"file://{tmp_path}/bucket"
    run_harvest(tmp_path / "one", coco, output=url)
    intact = contents(tmp_path / "one")
    odd.put(tmp_path / "bucket" / name, kind)
    if kind == "a terabyte":
        (tmp_path / "bucket" / name).unlink()
        (tmp_path / "bucket" / name).touch()
        os.truncate(tmp_path / "bucket" / name, 1 << 30)
    try:
        run_harvest(tmp_path / "two", coco, output=url)
    except DataError as error:
        assert "bucket" in str(error)
    else:
        assert contents(tmp_path / "two") == intact


def test_readers_read_what_was_fetched(tmp_path: Path, coco: CocoImages, run_harvest: Run, url: str):
    run_harvest(tmp_path / "one", coco, output=url)
    run_harvest(tmp_path / "two", coco, output=url, capture=never)
    one, two = (list(ShardReader(tmp_path / name, "train")) for name in ("one", "two"))
    assert len(one) == len(two) == 20
    assert all((a.states == b.states).all() and a.image_id == b.image_id for a, b in zip(one, two, strict=True))
