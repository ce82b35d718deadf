"""Files that are whole or not there: written under another name, synced, renamed, and their folder synced.

Shards, checkpoints, predictor folders and reports are all written through these functions.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def temporary_path(path: Path) -> Path:
    """Where a file grows until it is whole: ``<name>.tmp.<machine>.<process>``.

    Machine and process are in the name because process numbers repeat on a file system that machines share.
    """
    return path.with_name(f"{path.name}.tmp.{socket.gethostname()}.{os.getpid()}")


@contextmanager
def whole_file(path: Path) -> Generator[BinaryIO]:
    """Opens a file for writing that appears under its name when the block ends, and not at all if it raises."""
    temporary = temporary_path(path)
    try:
        with temporary.open("wb") as stream:
            yield stream
        replace_file(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> None:
    """Writes a file so that at any moment either the old or the whole new content is there."""
    with whole_file(path) as stream:
        stream.write(content)


def create_file(path: Path, content: bytes) -> bool:
    """Writes a file unless there is one; of several processes that try at once, one succeeds.

    Returns:
        Whether it was this call that made the file.
    """
    if path.exists():  # also where there is no room for a temporary file
        return False
    temporary = temporary_path(path)
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        try:
            os.link(temporary, path)  # fails where something is, unlike a rename
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    return True


def replace_file(written: Path, path: Path) -> None:
    """Moves a closed file to its place, after its bytes are on the disk; the rename itself is synced too."""
    with written.open("rb") as stream:
        os.fsync(stream.fileno())
    os.replace(written, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk: a rename is durable only then."""
    if os.name == "nt":  # folders can't be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
