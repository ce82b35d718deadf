"""Records with a right checksum and wrong content: what the readers go by has to be of its type and in its range."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.errors import DamagedShardError, DataError
from data.index import canonical_json, read_index, read_sidecar
from data.records import is_shard_name
from data.sample import Sample
from data.shards import ShardReader
from tests.data import tiny

NAME = "train-00000"
ODD: list[Any] = [
    None, True, -1, 0, 7, 2**62, 1.5, "", "x", "../x", "/etc/passwd", "train-00000", "0" * 64, 10**30,
    [], [-1, 5], [2, 3], [0], [[]], {}, {"a": 1},
]  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_shards(tmp_path_factory.mktemp("records") / "shards")


def places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a record."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*here, key)
        yield from places(item, (*here, key))


def changed(record: dict[str, Any], place: tuple[Any, ...], value: Any) -> bytes:
    """A record with another value at a place (`...`: without it), under a new checksum."""
    record = json.loads(json.dumps(record))
    inner: Any = record
    for key in place[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    record.pop("checksum", None)
    return canonical_json({**record, "checksum": hashlib.sha256(canonical_json(record)).hexdigest()})


def read_all(directory: Path) -> list[Sample]:
    return list(ShardReader(directory, "train"))


@pytest.mark.parametrize("file", [f"{NAME}.json", "index.json"])
@given(data=st.data())
@settings(deadline=None, max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_other_value_is_refused_or_harmless(shards: Path, file: str, data: st.DataObject):
    content = (shards / file).read_bytes()
    record = json.loads(content)
    place = data.draw(st.sampled_from([place for place in places(record) if place != ("checksum",)]))
    value = data.draw(st.sampled_from([*ODD, ...]))
    expected = read_all(shards)
    (shards / file).write_bytes(changed(record, place, value))
    try:
        found = read_all(shards)
    except DataError as error:
        assert file.removesuffix(".json") in str(error)
    else:
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            tiny.assert_same(one, other)
    finally:
        (shards / file).write_bytes(content)


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (("shard",), "train-00001", "it is the sidecar of 'train-00001'"),
        (("bytes",), -1, "its bytes is -1"),
        (("samples", 0, "grid"), [0, 3], "its samples is"),
        (("samples", 0, "key"), "../../000", "its samples is"),
        (("samples", 1, "json"), [512, 10**9], "overlap"),
        (("samples", 2, "safetensors"), [8192, 2**40], "reach beyond the end of the tar"),
        (("rows",), 1, "it has 1 rows, and its samples have others"),
        (("samples", 0, "key"), "000000000001", "a sample comes twice"),
        (("skipped",), [{"image_id": 1, "file": "../x", "reason": "y"}], "its skipped is"),
    ],
)
def test_a_wrong_sidecar_is_named(shards: Path, place: tuple[Any, ...], value: Any, reason: str):
    file = shards / f"{NAME}.json"
    content = file.read_bytes()
    file.write_bytes(changed(json.loads(content), place, value))
    with pytest.raises(DamagedShardError, match=rf"shard {NAME}: its sidecar {NAME}\.json is wrong: .*{reason}"):
        read_sidecar(shards, NAME)
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (("shards", 0, "name"), "../../etc/train-00000", "its shards is"),
        (("shards", 0, "name"), "train-00001", "it lists a shard twice"),
        (("shards", 0, "split"), "test", "its shards is"),
        (("shards", 0, "samples"), -3, "its shards is"),
        (("fingerprint",), "0" * 64, "its fingerprint is not that of its shards"),
        (("provenance",), [], r"its provenance is \[\]"),
        (("set_aside",), {"tuning": ["1"]}, "its set_aside is"),
        (("shards",), None, "its shards is None"),
    ],
)
def test_a_wrong_index_is_named(shards: Path, place: tuple[Any, ...], value: Any, reason: str):
    file = shards / "index.json"
    content = file.read_bytes()
    file.write_bytes(changed(json.loads(content), place, value))
    with pytest.raises(DataError, match=rf"index\.json is wrong: .*{reason}.*Remove it and run the harvest again"):
        read_index(shards)
    file.write_bytes(content)


def test_names_of_shards_lead_nowhere_else():
    assert is_shard_name("train-00000") and is_shard_name("validation-123456")
    for name in (
        "../train-00000",
        "train-00000/..",
        "train-0",
        "train-00000\n",
        "other-00000",
        "train-٠٠٠٠٠",
        None,
        3,
    ):
        assert not is_shard_name(name)


def test_two_sidecars_that_were_exchanged_are_noticed(tmp_path: Path):
    directory = tiny.write_shards(tmp_path / "shards")
    first, second = directory / "train-00000.json", directory / "train-00001.json"
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    with pytest.raises(DamagedShardError, match="it is the sidecar of 'train-00001'"):
        ShardReader(directory, "train")
