"""Which world a folder holds: `world.json` says it, and is written last.

The bytes of a world are a function of its settings. So one that lost files can be repaired, and a folder that holds
anything else is never touched.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.errors import DataError, UnreadableFileError
from data.files import SETTINGS_BYTES, read_json
from data.locks import is_alive
from data.log import log
from scr_runtime.files import write_file

MARKER = "world.json"
WAY_OUT = (
    "Nothing was changed: choose another folder (data.name=NAME, or data.root=FOLDER), or remove this one by hand if "
    "it is not needed."
)


class NoWorldError(DataError, FileExistsError):
    """A folder cannot take a world: something else is in it, or it cannot be written."""


class WorldMismatchError(DataError):
    """A folder holds a world of other settings, which is not replaced: `difference` has (there, asked) values."""

    def __init__(self, root: Path, values: Mapping[str, tuple[object, object]]) -> None:
        self.difference = {key: both for key, both in values.items() if both[0] != both[1]}
        lines = "".join(f"\n  {key}: {old!r} -> {new!r}" for key, (old, new) in self.difference.items())
        differs = ", ".join(self.difference)
        super().__init__(f"{root} holds a world that differs in {differs} (there -> asked now):{lines}\n{WAY_OUT}")


def with_fingerprint(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a world, and a checksum over them."""
    plain = {key: value for key, value in settings.items() if key != "fingerprint"}
    checksum = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]
    return {**plain, "fingerprint": checksum}


def write_marker(root: Path, settings: Mapping[str, Any]) -> None:
    """Declares a world finished."""
    write_file(root / MARKER, (json.dumps(settings, indent=1) + "\n").encode())


def holds_world(root: Path, settings: Mapping[str, Any]) -> bool:
    """Whether a folder is a finished world of these settings, and not free for one.

    Raises:
        WorldMismatchError: it is one of other settings.
        NoWorldError: it is something else.
    """
    if not os.path.lexists(root) or (root.is_dir() and not any(root.iterdir())):
        return False
    file = root / MARKER
    try:
        found = read_json(file, SETTINGS_BYTES)
        problem = "" if isinstance(found, dict) and "fingerprint" in found else f"{MARKER} is not that of a world"
    except UnreadableFileError as error:
        found, problem = {}, f"{MARKER} {error.reason}"
    if problem:
        raise NoWorldError(f"{root} holds files but no finished world ({problem}). {WAY_OUT}")
    if found == settings:
        return True
    plain = {key: value for key, value in settings.items() if key != "fingerprint"}
    if found["fingerprint"] == settings["fingerprint"] or plain.items() <= found.items():
        log("scenes", f"{file} was changed; it is re-created")  # one of its values, and not all of them
        write_marker(root, settings)
        return True
    if found != with_fingerprint(found):
        raise NoWorldError(f"{file} was changed after it was written: nobody knows which world this is. {WAY_OUT}")
    raise WorldMismatchError(root, {key: (found.get(key), value) for key, value in plain.items()})


def remove_dead(root: Path) -> None:
    """Removes what processes that were killed have left of a world beside its place."""
    for leftover in root.parent.glob(f".{glob.escape(root.name)}.tmp.*"):
        machine, _, process = leftover.name.partition(".tmp.")[2].rpartition(".")
        if machine == socket.gethostname() and process.isdecimal() and not is_alive(int(process)):
            shutil.rmtree(leftover, ignore_errors=True)
