"""Answers kept on disk while they are asked for: an interrupted comparison resumes where it was.

A file of JSON lines: what identifies the questions and the model first, then one line for each batch and method. A
line that a kill cut short is dropped. The name of the file is a digest of its first line, so that other questions,
another model or another predictor have another file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scr_runtime import ImageReport


class AnswerLog:
    """Margins and reports of finished batches.

    Args:
        folder: Where the files are; `None` keeps nothing.
        identity: Plain values: everything that the answers depend on.
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, Any]) -> None:
        first = json.dumps({"answers": 1, **identity}, sort_keys=True)
        self._file = folder and folder / f"answers-{hashlib.sha256(first.encode()).hexdigest()[:24]}.jsonl"
        self._found: dict[tuple[int, str], tuple[list[float], list[ImageReport]]] = {}
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._read(self._file, first)

    def get(self, start: int, methods: tuple[str, ...]) -> dict[str, tuple[list[float], list[ImageReport]]] | None:
        """Margins and reports of the batch that begins with question `start`; `None` unless all methods are there."""
        if any((start, method) not in self._found for method in methods):
            return None
        return {method: self._found[start, method] for method in methods}

    def add(self, start: int, method: str, margins: list[float], reports: list[ImageReport]) -> None:
        """Keeps a finished batch."""
        self._found[start, method] = margins, reports
        if self._file is None:
            return
        plain = [dataclasses.asdict(report) for report in reports]
        line = json.dumps({"start": start, "method": method, "margins": margins, "reports": plain})
        descriptor = os.open(self._file, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(descriptor, f"{line}\n".encode())  # one call: lines of two processes don't mix
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _read(self, file: Path, first: str) -> None:
        content = file.read_bytes() if file.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]  # a kill may have cut the last line
        lines = whole.decode("utf-8", "replace").splitlines()
        try:
            for line in lines[1:]:
                record = json.loads(line)
                reports = [_report(plain) for plain in record["reports"]]
                self._found[record["start"], record["method"]] = record["margins"], reports
            usable = bool(lines) and lines[0] == first
        except (ValueError, KeyError, TypeError, RecursionError):
            usable = False
        if not usable:
            self._found = {}
            whole = f"{first}\n".encode()
        if whole != content:
            file.write_bytes(whole)


def _report(plain: Mapping[str, Any]) -> ImageReport:
    grid, layers = tuple(plain["grid"]), tuple(plain["layers_edited"])
    return ImageReport(**{**plain, "grid": grid, "layers_edited": layers})
