"""Answers kept on disk while they are asked for: an interrupted comparison resumes where it was.

Each method has a folder, named by a digest of everything that its answers depend on; so vanilla's and two-pass's are
asked once for all predictors. In it every rank has a file of JSON lines: what identifies the answers first, then one
line for each answer. A line that a kill cut short is dropped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.ranks import Rank
from scr_runtime import ImageReport


@dataclass(frozen=True)
class ImageFacts:
    """What was done to one image (tile, thumbnail) of a prompt.

    Attributes:
        provider: Who chose the sources; `vanilla` where none were.
        sources: Best first.
        grid: Rows and columns of patches.
        dose: Neighbours that were written to.
        confidence: The predictor's; 0 where its drift guard trips, `None` if it was not asked.
        entropy: Credit entropy before the edit, in nats; `None` if it was not measured.
    """

    provider: str
    sources: list[int]
    grid: tuple[int, int]
    dose: int
    confidence: float | None = None
    entropy: float | None = None

    @classmethod
    def of_report(cls, report: ImageReport, dose: int, drift_limit: float | None) -> ImageFacts:
        """The facts in a report of the runtime."""
        drifted = drift_limit is not None and report.drift is not None and report.drift > drift_limit
        confidence = 0.0 if drifted else report.confidence
        return cls(report.provider, report.sources, report.grid, dose, confidence, report.entropy)


@dataclass(frozen=True)
class Answer:
    """One prompt's answer under one method.

    Attributes:
        item: Place of the prompt among the items.
        seed: Of a sampled answer; `None` for greedy ones, and for margins.
        tokens: The generated tokens, without what comes behind the end; none where only the margin was read.
        text: The same as text.
        margin: Logit of "yes" minus that of "no" at the first token; `None` where it was not asked for.
        images: What was done to the prompt's images.
        milliseconds: Wall time of the batch, over its rows.
    """

    item: int
    seed: int | None
    tokens: list[int]
    text: str
    margin: float | None
    images: list[ImageFacts]
    milliseconds: float = 0.0

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Answer:
        """Reads a line."""
        images = [ImageFacts(**{**image, "grid": tuple(image["grid"])}) for image in plain["images"]]
        return cls(**{**plain, "images": images})


ALONE = Rank()
Key = tuple[int, int | None]
"""(item, seed)"""


class AnswerStore:
    """Answers of one method.

    Args:
        folder: Where the files are; `None` keeps them in memory alone.
        identity: Plain values: everything that the answers depend on.
        rank: This process among several that answer together: each writes a file of its own, and reads all.
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, Any], rank: Rank = ALONE) -> None:
        self._first = json.dumps({"answers": 2, **identity}, sort_keys=True)
        self.digest = hashlib.sha256(self._first.encode()).hexdigest()[:24]
        self._found: dict[Key, Answer] = {}
        self._by_item: dict[int, list[Answer]] | None = None
        self._folder = folder and folder / f"answers-{self.digest}"
        self._file = self._folder and self._folder / f"rank-{rank.number}-of-{rank.size}.jsonl"
        self.refresh()
        if self._file is not None and self._file.exists():
            _drop_cut_line(self._file, self._first)

    def refresh(self) -> None:
        """Reads what other processes have answered."""
        if self._folder is None or not self._folder.is_dir():
            return
        self._by_item = None
        for file in sorted(self._folder.glob("rank-*.jsonl")):
            for answer in _read(file, self._first):
                self._found.setdefault((answer.item, answer.seed), answer)

    def __contains__(self, key: Key) -> bool:
        return key in self._found

    def __getitem__(self, key: Key) -> Answer:
        return self._found[key]

    def of(self, item: int) -> list[Answer]:
        """The answers to one prompt, by seed."""
        if self._by_item is None:
            self._by_item = {}
            for answer in self._found.values():
                self._by_item.setdefault(answer.item, []).append(answer)
        return sorted(self._by_item.get(item, []), key=lambda answer: -1 if answer.seed is None else answer.seed)

    def add(self, answers: Sequence[Answer]) -> None:
        """Keeps the answers of a batch, in one durable write."""
        fresh = [answer for answer in answers if (answer.item, answer.seed) not in self._found]
        self._by_item = None
        self._found |= {(answer.item, answer.seed): answer for answer in fresh}
        if self._folder is None or self._file is None or not fresh:
            return
        new = not self._file.exists()
        self._folder.mkdir(parents=True, exist_ok=True)
        lines = [self._first] * new + [json.dumps(dataclasses.asdict(answer)) for answer in fresh]
        descriptor = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            content = memoryview("".join(f"{line}\n" for line in lines).encode())
            while content:
                content = content[os.write(descriptor, content) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _read(file: Path, first: str) -> Iterable[Answer]:
    """The whole lines of a file; nothing of a file about something else, and no line that cannot be read."""
    content = file.read_bytes()
    lines = content[: content.rfind(b"\n") + 1].decode("utf-8", "replace").splitlines()
    if not lines or lines[0] != first:
        return
    for line in lines[1:]:
        try:
            yield Answer.from_json(json.loads(line))
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # asked again


def _drop_cut_line(file: Path, first: str) -> None:
    """Cuts a file behind its last whole line; empties one that is about something else."""
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1
    usable = content.startswith(f"{first}\n".encode())
    if not usable:
        file.unlink()
    elif whole < len(content):
        os.truncate(file, whole)
