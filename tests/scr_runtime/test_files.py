"""Files that are whole or not there."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from scr_runtime import files
from scr_runtime.files import create_file, replace_file, temporary_path, whole_file, write_file


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_its_block_ends_and_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    for content in (b"old", b"new and longer"):
        with whole_file(path) as stream:
            stream.write(content)
            stream.flush()
            assert (path.read_bytes() if path.exists() else b"") != content
        assert path.read_bytes() == content
    assert names(tmp_path) == ["a.bin"]


def test_a_block_that_raises_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_file(path, b"old")
    for name in ("a.bin", "b.bin"):
        with pytest.raises(KeyError, match="inside"), whole_file(tmp_path / name) as stream:
            stream.write(b"half")
            raise KeyError("inside")
    assert (names(tmp_path), path.read_bytes()) == (["a.bin"], b"old")


def test_temporary_names_differ_between_machines_and_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.bin"
    found = {temporary_path(path)}
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    found.add(temporary_path(path))
    monkeypatch.setattr("os.getpid", lambda: 1)
    found.add(temporary_path(path))
    assert len(found) == 3
    assert all(one.parent == tmp_path and one.name.startswith("a.bin.tmp.") for one in found)


def test_bytes_reach_the_disk_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    sync, replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        steps.append("sync folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "sync file")
        sync(descriptor)

    def rename(source: Any, target: Any) -> None:
        steps.append("rename")
        replace(source, target)

    monkeypatch.setattr(files.os, "fsync", fsync)
    monkeypatch.setattr(files.os, "replace", rename)
    write_file(tmp_path / "a.bin", b"content")
    assert steps == ["sync file", "rename", "sync folder"]
    steps.clear()
    assert create_file(tmp_path / "b.bin", b"content")
    assert steps == ["sync file", "sync folder"]  # by a link, which fails where something is
    steps.clear()
    written = tmp_path / "c.partial"
    written.write_bytes(b"content")
    replace_file(written, tmp_path / "c.bin")
    assert steps == ["sync file", "rename", "sync folder"]
    assert names(tmp_path) == ["a.bin", "b.bin", "c.bin"]


def test_of_several_that_create_a_file_one_succeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, barrier, made = tmp_path / "a.bin", threading.Barrier(8), []
    monkeypatch.setattr(files, "temporary_path", lambda path: path.with_name(f"{threading.get_ident()}.tmp"))

    def create(number: int) -> None:
        barrier.wait()
        if create_file(path, b"%d" % number):
            made.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert path.read_bytes() == b"%d" % made[0]
    assert not create_file(path, b"later")
    assert names(tmp_path) == ["a.bin"]


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: Any) -> None:
        raise OSError("not supported")

    monkeypatch.setattr(files.os, "link", link)
    assert create_file(tmp_path / "a.bin", b"content")
    assert (tmp_path / "a.bin").read_bytes() == b"content"
    assert not create_file(tmp_path / "a.bin", b"later")
    assert names(tmp_path) == ["a.bin"]
