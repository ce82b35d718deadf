from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from data import inspect
from data.errors import DamagedShardError
from data.index import check_shard, damaged_shards, remove_leftovers
from data.shards import ShardReader, ShardWriter
from tests.data.tiny import make_sample, write_shards

NAME = "train-00000"


def test_leftovers_of_dead_writers_are_removed_and_those_of_living_ones_stay(tmp_path: Path):
    machine = socket.gethostname()
    dead, alive, elsewhere, stale, of_another_shard, not_ours = (
        tmp_path / f"{name}.tmp.{writer}"
        for name, writer in [
            (f"{NAME}.tar", f"{machine}.4194303"),
            (f"{NAME}.tar", f"{machine}.1"),
            (f"{NAME}.tar", "another.machine.4194303"),
            (f"{NAME}.json", "another.machine.4194302"),
            ("train-00001.tar", f"{machine}.4194303"),
            ("notes.txt", f"{machine}.4194303"),
        ]
    )
    for file in (dead, alive, elsewhere, stale, of_another_shard, not_ours):
        file.touch()
    os.utime(stale, (0, 0))
    with ShardWriter(tmp_path, NAME, "settings") as writer:
        writer.write(make_sample(1))
    assert not dead.exists() and not stale.exists()
    assert alive.exists() and elsewhere.exists() and of_another_shard.exists() and not_ours.exists()
    remove_leftovers(tmp_path)
    assert not of_another_shard.exists() and alive.exists() and elsewhere.exists() and not_ours.exists()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "damage", "reason"),
    [
        (f"{NAME}.tar", cut, "it was cut or overwritten"),
        (f"{NAME}.tar", flip, "bytes changed after it was written"),
        (f"{NAME}.tar", Path.unlink, "train-00000.tar is missing"),
        (f"{NAME}.json", Path.unlink, "its sidecar train-00000.json is missing"),
        (f"{NAME}.json", cut, "its sidecar train-00000.json is unreadable"),
        (f"{NAME}.json", flip, "its sidecar train-00000.json (was changed|is unreadable)"),
    ],
)
def test_damage_is_found_and_the_message_names_shard_and_way_out(
    tmp_path: Path, file: str, damage: Callable[[Path], None], reason: str
):
    directory = write_shards(tmp_path / "shards")
    assert damaged_shards(directory) == []
    damage(directory / file)
    with pytest.raises(DamagedShardError, match=rf"shard train-00000: .*{reason}.*only this shard is redone"):
        check_shard(directory, NAME)
    assert [problem.name for problem in damaged_shards(directory)] == [NAME]
    assert inspect.main(["verify", str(directory)]) == 1
    if damage is not flip or file.endswith("json"):
        with pytest.raises(DamagedShardError, match=NAME):
            ShardReader(directory, "train")


def test_a_shard_of_another_harvest_is_found(tmp_path: Path):
    directory = write_shards(tmp_path / "shards")
    with ShardWriter(directory, NAME, "settings") as writer:
        writer.write(make_sample(99))
    assert "not the shard that index.json lists" in str(damaged_shards(directory)[0])
    with pytest.raises(DamagedShardError, match="other settings"):
        check_shard(directory, NAME, settings_digest="others")
