"""Whether the bytes of a shard are those that its sidecar and the index name. No torch."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator
from io import BufferedReader
from typing import TYPE_CHECKING

from data.errors import DamagedShardError, DataError, HarvestFolderError, UnreadableFileError
from data.grids import grids_record
from data.records import Entry, ListedShard, Sidecar

if TYPE_CHECKING:
    from data.sample import Sample

_SETTLED_SECONDS = 2.0  # a file that changed within the clock's tick may change again and keep its time
_compared: set[tuple[object, ...]] = set()  # files that this process has compared with their checksums


def check_tar(stream: BufferedReader, sidecar: Sidecar, *, full: bool = True) -> None:
    """Checks an opened tar against its sidecar.

    Args:
        stream: the tar.
        sidecar: its sidecar.
        full: compare every byte; otherwise its size alone.

    Raises:
        DamagedShardError: its size differs, or its bytes.
        HarvestFolderError: the system cannot read it.
    """
    name, status = sidecar["shard"], os.fstat(stream.fileno())
    if status.st_size != sidecar["bytes"]:
        expected = f"{sidecar['bytes']:,}"
        raise DamagedShardError(
            name, f"{name}.tar has {status.st_size:,} bytes instead of {expected}: it was cut or overwritten"
        )
    if not full:
        return
    try:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise HarvestFolderError(f"shard {name} cannot be read ({error}). It is kept: start again.") from error
    if digest != sidecar["sha256"]:
        raise DamagedShardError(name, f"the checksum of {name}.tar is wrong: bytes changed after it was written")
    if time.time() - max(status.st_mtime, status.st_ctime) > _SETTLED_SECONDS:
        _compared.add(_identity(status, sidecar))


def check_once(stream: BufferedReader, sidecar: Sidecar) -> None:
    """`check_tar`, unless this process has compared this very file before, and nothing was written to it since."""
    if _identity(os.fstat(stream.fileno()), sidecar) not in _compared:
        check_tar(stream, sidecar)


def _identity(status: os.stat_result, sidecar: Sidecar) -> tuple[object, ...]:
    times = status.st_mtime_ns, status.st_ctime_ns
    return status.st_dev, status.st_ino, status.st_size, *times, sidecar["sha256"]


def check_listed(sidecar: Sidecar, listed: ListedShard) -> None:
    """Checks that a shard is the one that the index lists.

    Raises:
        DamagedShardError: it is another one.
    """
    found = {"samples": len(sidecar["samples"]), **{key: sidecar[key] for key in ("rows", "bytes", "sha256")}}
    if any(found[key] != listed[key] for key in found):
        raise DamagedShardError(sidecar["shard"], "it is not the shard that index.json lists")


def check_entry(sample: Sample, entry: Entry) -> None:
    """Checks that a sample is the one that its shard's sidecar lists.

    Raises:
        ValueError: it is another one.
    """
    found = (sample.key, grids_record(sample.grids), len(sample.prompts))
    if found != (entry["key"], entry["grid"], entry["prompts"]):
        raise ValueError(f"it has key, grid and prompts {found}")


@contextlib.contextmanager
def unreadable_as_damage(name: str, key: str) -> Iterator[None]:
    """Turns what parsing a sample raises into a DamagedShardError of its shard."""
    try:
        yield
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise DamagedShardError(name, f"sample {key} is unreadable ({error})") from error


def damaged(name: str, error: UnreadableFileError, what: str) -> DataError:
    """What an unreadable file of a shard means: damage, unless it is the system that failed."""
    if error.failed:
        return HarvestFolderError(f"shard {name}: {error}. Once it can be read, start again: the shard is kept.")
    return DamagedShardError(name, f"{what} is missing" if error.missing else f"{what} {error.reason}")
