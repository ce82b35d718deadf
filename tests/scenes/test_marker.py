"""Which world a folder holds, whatever lies at the place of `world.json`."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from scenes.marker import MARKER, NoWorldError, WorldMismatchError, holds_world, remove_dead, with_fingerprint
from tests.data import odd

SETTINGS = with_fingerprint({"version": 1, "train": 3, "val": 2, "seed": 0})


def world(root: Path, **changes: object) -> Path:
    root.mkdir()
    (root / MARKER).write_text(json.dumps({**SETTINGS, **changes}))
    return root


def test_free_places_hold_no_world(tmp_path: Path):
    assert not holds_world(tmp_path / "nothing", SETTINGS)
    (tmp_path / "empty").mkdir()
    assert not holds_world(tmp_path / "empty", SETTINGS)


def test_a_world_is_known_by_its_settings(tmp_path: Path):
    assert holds_world(world(tmp_path / "same"), SETTINGS)
    other = with_fingerprint({**SETTINGS, "seed": 1})
    with pytest.raises(WorldMismatchError) as caught:
        holds_world(world(tmp_path / "other", **other), SETTINGS)
    assert caught.value.difference == {"seed": (1, 0)}


def test_one_changed_value_is_put_right_and_several_are_not_guessed(tmp_path: Path):
    for number, change in enumerate(({"fingerprint": "0" * 16}, {"seed": 7})):
        root = world(tmp_path / str(number), **change)
        assert holds_world(root, SETTINGS)
        assert json.loads((root / MARKER).read_text()) == SETTINGS
    with pytest.raises(NoWorldError, match="nobody knows which world"):
        holds_world(world(tmp_path / "both", seed=7, fingerprint="0" * 16), SETTINGS)


@pytest.mark.parametrize("kind", [*odd.KINDS, *odd.CONTENTS])
def test_a_folder_with_an_odd_marker_is_left_alone(tmp_path: Path, kind: str):
    root = world(tmp_path / "world")
    (root / "precious").write_bytes(b"mine")
    odd.put(root / MARKER, kind)
    with pytest.raises(NoWorldError, match=r"data\.name=NAME"):
        holds_world(root, SETTINGS)
    assert (root / "precious").read_bytes() == b"mine"


def test_leftovers_of_dead_processes_are_removed_and_those_of_living_ones_kept(tmp_path: Path):
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        pass
    names = {
        "dead": f".world.tmp.{socket.gethostname()}.{dead.pid}",
        "mine": f".world.tmp.{socket.gethostname()}.{os.getpid()}",
        "elsewhere": f".world.tmp.another-machine.{dead.pid}",
    }
    for name in names.values():
        (tmp_path / name).mkdir()
    remove_dead(tmp_path / "world")
    assert {path.name for path in tmp_path.iterdir()} == {names["mine"], names["elsewhere"]}
