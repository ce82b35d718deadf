"""Things that may lie where a file of ours is expected."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path


def _sparse(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(1 << 40)


def _link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as opened:
        here = os.getcwd()
        os.chdir(path.parent)  # the name of a socket is short
        try:
            opened.bind(path.name)
        finally:
            os.chdir(here)


KINDS: dict[str, Callable[[Path], None]] = {
    "a folder": Path.mkdir,
    "a FIFO": os.mkfifo,
    "a socket": _socket,
    "a device": _link_to("/dev/zero"),
    "a dangling link": _link_to("nowhere"),
    "a loop of links": _loop,
    "a terabyte": _sparse,
}
"""What is no regular file of a reasonable size."""

CONTENTS: dict[str, bytes] = {
    "nothing": b"",
    "noise": bytes(range(256)),
    "half an object": b'{"splits": {"tra',
    "a list": b"[]",
    "null": b"null",
    "a number": b"17",
    "not a number": b"NaN",
    "infinity": b'{"version": 1e999}',
    "a string": b'"index"',
    "an empty object": b"{}",
    "deep lists": b"[" * 100_000 + b"]" * 100_000,
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "deep enough": b'{"a":' * 500 + b"1" + b"}" * 500,
    "5,000 digits": b'{"format_version": ' + b"9" * 5000 + b"}",
    "40 digits": b'{"format_version": ' + b"9" * 40 + b"}",
    "half a surrogate pair": b'{"settings": "\\ud800"}',
    "keys that come twice": b'{"format_version": 1, "format_version": 1}',
    "UTF-16": '{"format_version": 1}'.encode("utf-16"),
    "another encoding": '{"name": "caf\u00e9"}'.encode("latin-1"),
    "a list of wrong things": b'[null, 1, "x", {}]',
    "wrong types": b'{"format_version": 1, "checksum": [], "shards": 3, "splits": "train", "shard_size": 0}',
    "impossible numbers": b'{"splits": {"train": 1000000000000000000}, "shard_size": 1, "seed": -1}',
}
"""Bytes that are no record of ours."""


LEGAL = ("a list", "null", "a number", "a string", "an empty object", "a list of wrong things", "wrong types",
         "impossible numbers")  # fmt: skip
"""Of these, the ones that are JSON all the same."""


def put(path: Path, kind: str) -> None:
    """Puts something odd where a file may be."""
    if path.is_symlink() or path.exists():
        path.unlink()
    if kind in KINDS:
        KINDS[kind](path)
    else:
        path.write_bytes(CONTENTS[kind])
