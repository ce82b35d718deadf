from __future__ import annotations

import errno
import fcntl
import os
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from data.errors import LockTimeoutError
from data.locks import exclusively, holding, is_alive
from tests.data import odd


def test_a_lock_is_held_by_one_and_waited_for_in_bounded_time(tmp_path: Path):
    lock = tmp_path / "there" / "lock"
    waited = pytest.raises(LockTimeoutError, match="another process has been testing for 0 s")
    with exclusively(lock, 1, "testing"), waited, exclusively(lock, 0.3, "testing"):
        raise AssertionError("two hold the lock")
    with exclusively(lock, 0.3, "testing"):
        pass


def test_who_waits_says_what_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lock = tmp_path / "lock"
    with (
        exclusively(lock, 1, "testing"),
        pytest.raises(LockTimeoutError),
        exclusively(lock, 0.3, "reading"),
    ):
        raise AssertionError("two hold the lock")
    said = " ".join(capsys.readouterr().out.split())
    assert said == f"waiting: another process is reading ({lock} is locked), for 0 s at most"
    with exclusively(lock, 1, "testing"), pytest.raises(LockTimeoutError), exclusively(lock, 0, "not waiting"):
        raise AssertionError("two hold the lock")
    assert capsys.readouterr().out == ""


def test_a_file_system_without_locks_locks_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    for _ in range(2):
        with exclusively(tmp_path / "lock", 1, "testing"), holding(tmp_path, 1, "testing", alone=True):
            pass
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("cannot be locked (No locks available): start one process at a time") == 2


@pytest.mark.parametrize("kind", odd.KINDS)
def test_whatever_lies_in_place_of_a_lock_does_not_stop_the_work(tmp_path: Path, kind: str):
    odd.put(tmp_path / "lock", kind)
    done = []
    with exclusively(tmp_path / "lock", 1, "testing"):
        done.append(1)
    with exclusively(tmp_path / "lock" / "below", 1, "testing"), holding(tmp_path / "nowhere", 1, "x", alone=True):
        done.append(2)
    assert done == [1, 2]


def test_a_folder_is_held_by_many_or_by_one(tmp_path: Path):
    def hold(alone: bool) -> AbstractContextManager[None]:
        return holding(tmp_path, 0, "working", alone=alone)

    with hold(False), hold(False), pytest.raises(LockTimeoutError), hold(True):
        raise AssertionError("others hold it")
    with hold(True), pytest.raises(LockTimeoutError), hold(False):
        raise AssertionError("one holds it alone")


def test_processes_are_alive_or_not():
    assert is_alive(os.getpid()) and is_alive(1)
    assert not is_alive(2**22 + 1) and not is_alive(10**30)
