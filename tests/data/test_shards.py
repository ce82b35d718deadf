from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_expander

from data import checks
from data.errors import DamagedShardError, DataError, SettingsError, UnfinishedHarvestError
from data.index import canonical_json, check_shard, read_sidecar, write_index, write_sidecar
from data.sample import STATES_DTYPES
from data.settings import ReadingSettings
from data.shards import ShardReader, ShardWriter
from data.stream import StreamedBatches
from tests.data.tiny import assert_same, make_sample, write_shards

NAME = "train-00000"


@pytest.mark.parametrize("dtype", STATES_DTYPES.values())
def test_samples_come_back_as_they_were_written(tmp_path: Path, dtype: torch.dtype):
    reader = ShardReader(write_shards(tmp_path / "shards", dtype), "train")
    assert reader.keys == [f"{i:012d}" for i in (0, 1, 2, 10, 11, 12)]
    for sample in reader:
        assert_same(sample, make_sample(sample.image_id, dtype=dtype).decoded())
    assert_same(reader.stored(4), make_sample(11, dtype=dtype))


def test_tensors_are_views_that_cannot_reach_the_file(tmp_path: Path):
    directory = write_shards(tmp_path / "shards")
    reader = ShardReader(directory, "train")
    reader[0].states.zero_()
    assert reader[0].states.abs().sum() == 0  # a view of the map, not a copy
    check_shard(directory, NAME)
    assert_same(ShardReader(directory, "train")[0], make_sample(0))


def test_a_reader_travels_to_another_process(tmp_path: Path):
    reader = ShardReader(write_shards(tmp_path / "shards"), "train")
    assert_same(reader[0], pickle.loads(pickle.dumps(reader))[0])


def test_shards_are_ordinary_webdatasets(tmp_path: Path):
    directory = write_shards(tmp_path / "shards")
    with (directory / f"{NAME}.tar").open("rb") as stream:
        samples = list(group_by_keys(tar_file_expander([{"url": NAME, "stream": stream}])))
    assert [sample["__key__"] for sample in samples] == [f"{i:012d}" for i in range(3)]
    assert json.loads(samples[1]["json"])["file"] == "folder/1.v2.jpg"


def test_equal_samples_give_equal_bytes(tmp_path: Path):
    first, second = (write_shards(tmp_path / name) for name in ("a", "b"))
    names = sorted(file.name for file in first.iterdir())
    assert names == [
        "index.json", "manifest.json", "train-00000.json", "train-00000.tar", "train-00001.json", "train-00001.tar",
    ]  # fmt: skip
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_an_exception_leaves_nothing_behind(tmp_path: Path):
    with pytest.raises(ZeroDivisionError), ShardWriter(tmp_path, NAME, "settings") as writer:
        writer.write(make_sample(1))
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_harvest_is_rejected(tmp_path: Path):
    with pytest.raises(UnfinishedHarvestError, match=r"index\.json is missing.*python -m data\.harvest"):
        ShardReader(tmp_path, "train")


def test_another_format_version_is_rejected(tmp_path: Path):
    directory = write_shards(tmp_path / "shards")
    index = json.loads((directory / "index.json").read_text())
    (directory / "index.json").write_text(json.dumps({**index, "format_version": 2}))
    with pytest.raises(DataError, match="format version 2, this release reads 1"):
        ShardReader(directory, "train")


def test_unknown_split(tmp_path: Path):
    with pytest.raises(SettingsError, match="no split 'test': it has train"):
        ShardReader(write_shards(tmp_path / "shards"), "test")


# -- bytes that changed


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_a_changed_tar_gives_no_sample(tmp_path: Path):
    directory = write_shards(tmp_path / "shards")
    tar = directory / f"{NAME}.tar"
    intact = tar.read_bytes()
    for place in range(0, len(intact), 499):
        flip(tar, place)
        reader = ShardReader(directory, "train")
        with pytest.raises(DamagedShardError, match=rf"the checksum of {NAME}\.tar is wrong"):
            reader[1]
        assert_same(reader[4], make_sample(11))  # of the other shard
        tar.write_bytes(intact)
        assert_same(ShardReader(directory, "train")[1], make_sample(1))


def test_a_tar_is_compared_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    directory = write_shards(tmp_path / "shards")
    tar = directory / f"{NAME}.tar"
    compared: list[str] = []
    plain = checks.check_tar
    monkeypatch.setattr(checks, "check_tar", lambda *a, **k: (compared.append(a[1]["shard"]), plain(*a, **k)))

    def read() -> int:
        compared.clear()
        ShardReader(directory, "train")[0]
        return len(compared)

    assert read() == read() == 1  # a file that was written just now may change within the clock's tick
    monkeypatch.setattr(time, "time", lambda now=time.time: now() + 10)
    assert [read(), read(), read()] == [1, 0, 0]
    os.utime(tar)
    assert [read(), read()] == [1, 0]
    flip(tar, 1000)
    with pytest.raises(DamagedShardError):
        read()


def test_a_shard_of_another_harvest_gives_no_sample(tmp_path: Path):
    directory = write_shards(tmp_path / "shards")
    with ShardWriter(directory, NAME, "settings") as writer:
        for image_id in (3, 4, 5):
            writer.write(make_sample(image_id))
    for read in (lambda: ShardReader(directory, "train"), lambda: streamed(directory)):
        with pytest.raises(DamagedShardError, match=r"it is not the shard that index\.json lists"):
            read()


def test_a_tar_that_vanishes_after_it_was_listed(tmp_path: Path):
    directory = write_shards(tmp_path / "shards")
    reader = ShardReader(directory, "train")
    (directory / f"{NAME}.tar").unlink()
    with pytest.raises(DamagedShardError, match=rf"{NAME}\.tar is missing"):
        reader[0]


def streamed(directory: Path) -> list[Any]:
    return list(StreamedBatches(directory, ReadingSettings(batch_size=4, cache="stream")))


def forged(directory: Path, member: str, change: Callable[[bytes], bytes]) -> None:
    """Changes a member of the first sample, of the same length, under right checksums."""
    sidecar = read_sidecar(directory, NAME)
    offset, size = sidecar["samples"][0][member]  # type: ignore[literal-required]
    tar = bytearray((directory / f"{NAME}.tar").read_bytes())
    other = change(bytes(tar[offset : offset + size]))
    assert len(other) == size
    tar[offset : offset + size] = other
    (directory / f"{NAME}.tar").write_bytes(tar)
    write_sidecar(directory, {**sidecar, "sha256": hashlib.sha256(tar).hexdigest()})
    write_index(directory, {"train": [NAME, "train-00001"]}, {}, {})


@pytest.fixture(scope="module")
def forgery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("forged") / "shards")


@given(member=st.sampled_from(["json", "safetensors"]), place=st.integers(0, 400), byte=st.integers(0, 255))
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_forged_members_are_refused_or_samples(forgery: Path, member: str, place: int, byte: int):
    before = {file: file.read_bytes() for file in forgery.iterdir()}
    forged(
        forgery, member, lambda content: content[:place] + bytes([byte][: len(content) - place]) + content[place + 1 :]
    )
    for read in (lambda: ShardReader(forgery, "train")[0].check(), lambda: streamed(forgery)):
        try:
            read()
        except DamagedShardError as error:
            assert NAME in str(error)
    for file, content in before.items():
        file.write_bytes(content)


def header(**tensors: Any) -> Callable[[bytes], bytes]:
    """Another header of a safetensors member, padded with blanks to the same length."""

    def change(content: bytes) -> bytes:
        size = struct.unpack("<Q", content[:8])[0]
        plain = json.loads(content[8 : 8 + size])
        for name, facts in tensors.items():
            plain[name] = {**plain[name], **facts}
        if len(canonical_json(plain)) > size:
            del plain["question"]  # makes room
        written = canonical_json(plain)
        return content[:8] + written.ljust(size) + content[8 + size :]

    return change


@pytest.mark.parametrize(
    ("member", "change"),
    [
        ("safetensors", lambda content: struct.pack("<Q", 2**62) + content[8:]),
        ("safetensors", lambda content: struct.pack("<Q", len(content)) + content[8:]),
        ("safetensors", header(states={"shape": [10**9, 10**9]})),
        ("safetensors", header(states={"shape": [2**40]})),
        ("safetensors", header(states={"shape": [-6, -5]})),
        ("safetensors", header(states={"shape": [5, 6]})),
        ("safetensors", header(states={"shape": [30]})),
        ("safetensors", header(states={"dtype": "F64"})),
        ("safetensors", header(states={"dtype": 3})),
        ("safetensors", header(states={"data_offsets": [0, 10**9]})),
        ("safetensors", header(states={"data_offsets": [None]})),
        ("safetensors", header(attention={"shape": [3, 4]})),
        ("json", lambda content: b"[]".ljust(len(content))),
        ("json", lambda content: b"null".ljust(len(content))),
        ("json", lambda content: b"[" * len(content)),
        ("json", lambda content: content.replace(b'"grid":[2,3]', b'"grid":[6,1]')),
        ("json", lambda content: content.replace(b'"grid":[2,3]', b'"grid":[2.5]')),
        ("json", lambda content: content.replace(b'"image_id":0', b'"image_id":7')),
        ("json", lambda content: content.replace(b'"folder/0.v2.jpg"', b'"../../00.v2.jpg"')),
        ("json", lambda content: content.replace(b'"entropy":[', b'"entropx":[')),
        ("json", lambda content: content.replace(b'"label":"no"', b'"label":"\x00o"')),
    ],
)
def test_what_contradicts_the_sidecar_is_refused(tmp_path: Path, member: str, change: Callable[[bytes], bytes]):
    directory = write_shards(tmp_path / "shards")
    forged(directory, member, change)
    with pytest.raises(DamagedShardError, match=rf"shard {NAME}: sample 0{{12}} is unreadable"):
        ShardReader(directory, "train")[0]
    with pytest.raises(DamagedShardError, match=NAME):
        streamed(directory)
