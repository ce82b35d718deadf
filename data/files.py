"""Reads files that may hold anything: regular files of bounded size, and JSON that says one thing only.

Nothing here waits for a FIFO or a device, follows a loop of links, or allocates more than a limit. `scr_runtime.files`
is the counterpart that writes.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeGuard

from data.errors import UnreadableFileError

SETTINGS_BYTES = 1 << 20
"""Most bytes of a small record: `harvest.json`, `world.json`."""
RECORD_BYTES = 1 << 26
"""Most bytes of a sidecar, a manifest or an index: those of 200,000 samples or shards."""
_DEPTH = 64  # of nested JSON; ours has 5 levels
_DIGITS = 19  # of an integer: 64 bits
_KINDS = {
    stat.S_IFDIR: "is a folder",
    stat.S_IFIFO: "is a FIFO",
    stat.S_IFSOCK: "is a socket",
    stat.S_IFCHR: "is a device",
    stat.S_IFBLK: "is a device",
}


def open_regular(file: str | Path) -> BufferedReader:
    """Opens a regular file, or a link to one, for reading.

    Raises:
        UnreadableFileError: it is something else, or missing, or must not be read.
    """
    try:
        _check_regular(file, os.stat(file))
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # waits for no writer of a FIFO
        stream = os.fdopen(descriptor, "rb")
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise _unreadable(file, error) from error
    try:
        _check_regular(file, os.fstat(descriptor))  # the name may have been given to another file meanwhile
    except BaseException:
        stream.close()
        raise
    return stream


def read_bytes(file: str | Path, limit: int) -> bytes:
    """All bytes of a regular file.

    Args:
        file: the file.
        limit: most bytes that it may have; a larger one is not read.

    Raises:
        UnreadableFileError: it is no regular file, is missing, too large, or cannot be read.
    """
    with open_regular(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > limit:
            raise UnreadableFileError(file, f"has {size:,} bytes, and at most {limit:,} are expected")
        try:
            return stream.read(size)
        except OSError as error:
            raise _unreadable(file, error) from error


def read_json(file: str | Path, limit: int) -> Any:
    """The value in a JSON file, as `parse_json` reads it.

    Raises:
        UnreadableFileError: as `read_bytes`; or it is no such JSON.
    """
    content = read_bytes(file, limit)
    try:
        return parse_json(content)
    except ValueError as error:
        raise UnreadableFileError(file, f"is not readable JSON ({error})") from error


def parse_json(content: bytes, *, constants: bool = False) -> Any:
    """Reads JSON strictly: what two readers could understand differently is an error.

    A byte order mark is accepted. NaN and infinity, keys that come twice, integers beyond 64 bits, halves of surrogate
    pairs and more than 64 levels are not.

    Args:
        content: UTF-8.
        constants: accept NaN and infinity, as Python writes them.

    Raises:
        ValueError: says what is wrong.
    """
    hooks: dict[str, Any] = {} if constants else {"parse_constant": _no_constant, "parse_float": _finite}
    try:
        value = json.loads(content.decode("utf-8-sig"), object_pairs_hook=unique_keys, parse_int=_integer, **hooks)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_levels(value)
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` of `json`: an object whose keys come once each.

    Raises:
        ValueError: a key comes twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice!r} comes twice in one object")
    return found


def is_text(value: object) -> TypeGuard[str]:
    """Whether a value is a string that can be written as UTF-8: not half of a surrogate pair."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_count(value: object, least: int = 0) -> TypeGuard[int]:
    """Whether a value is an integer, not a boolean, of at least `least` and at most 64 bits."""
    return type(value) is int and least <= value < 1 << 63


def is_relative(name: object) -> TypeGuard[str]:
    """Whether a value is the name of a file below a folder: neither absolute, nor with `..` or a null byte."""
    if not isinstance(name, str) or not is_text(name) or "\0" in name:
        return False
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def shown(value: object, most: int = 80) -> str:
    """A value in a message, cut where it is long."""
    text = ascii(value) if isinstance(value, str) and not is_text(value) else repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def _check_regular(file: str | Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "is something else")
        raise UnreadableFileError(file, f"{kind}, where a file is expected")


def _unreadable(file: str | Path, error: OSError | ValueError) -> UnreadableFileError:
    if isinstance(error, FileNotFoundError) and os.path.islink(file):
        return UnreadableFileError(file, "is a link to nothing")
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return UnreadableFileError(file, "does not exist", missing=True)
    if isinstance(error, ValueError) or error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
        return UnreadableFileError(file, f"cannot be opened ({getattr(error, 'strerror', error)})")
    return UnreadableFileError(file, f"cannot be read ({error.strerror or error})", failed=True)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is too large a number")
    return number


def _integer(text: str) -> int:
    if len(text.lstrip("-")) > _DIGITS:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def _check_levels(value: Any) -> None:
    level = [value]
    for _ in range(_DEPTH):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, Mapping):
                inner += [*item, *item.values()]
            elif isinstance(item, list):
                inner += item
            elif isinstance(item, str) and not is_text(item):
                raise ValueError(f"{shown(item)} holds half of a surrogate pair")
        if not inner:
            return
        level = inner
    raise ValueError(f"it has more than {_DEPTH} levels")
