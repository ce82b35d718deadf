"""Held-out questions as an evaluation answered them, sorted by what is worth a look."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ORDERS = {
    "disagreement": "least overlap of the two choices of sources",
    "entropy": "highest credit entropy",
    "changed": "changed answers first, then the largest shift of the yes margin",
}


@dataclass(frozen=True)
class Entry:
    """One question about one held-out image.

    Attributes:
        image_id: The image.
        question: What was asked.
        label: The annotated answer.
        overlap: Share of two-pass's sources that one-pass chose too.
        entropy: Credit entropy over ln N; means over the image's grids.
        changed: Whether two-pass or one-pass answered otherwise than vanilla.
        shift: How far two-pass moved the yes margin, absolute.
    """

    image_id: int
    question: str
    label: str
    overlap: float
    entropy: float
    changed: bool
    shift: float

    @property
    def plain(self) -> dict[str, Any]:
        """For the page."""
        return asdict(self)


def read_gallery(file: Path) -> list[Entry]:
    """The entries in an evaluation's `answers.jsonl`; none if it is not there or was written in another form."""
    found: dict[tuple[int, str], dict[str, Any]] = {}
    try:
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["benchmark"] == "pope" and row["seed"] is None and row["image_id"] is not None:
                found.setdefault((row["image_id"], row["text"]), {}).setdefault(row["method"], row)
        complete = [rows for rows in found.values() if {"vanilla", "two-pass", "one-pass"} <= set(rows)]
        return [_entry(rows) for rows in complete]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _entry(rows: dict[str, Any]) -> Entry:
    vanilla, two, one = (rows[name] for name in ("vanilla", "two-pass", "one-pass"))
    pairs = list(zip(two["images"], one["images"], strict=True))
    overlap = [len(set(a["sources"]) & set(b["sources"])) / max(len(a["sources"]), 1) for a, b in pairs]
    entropy = [a["entropy"] / math.log(max(math.prod(a["grid"]), 2)) for a, _ in pairs]
    return Entry(
        image_id=vanilla["image_id"],
        question=vanilla["text"],
        label=vanilla["label"],
        overlap=sum(overlap) / len(overlap),
        entropy=sum(entropy) / len(entropy),
        changed=len({row["parsed"] for row in (vanilla, two, one)}) > 1,
        shift=abs((two["margin"] or 0.0) - (vanilla["margin"] or 0.0)),
    )


def ordered(entries: Sequence[Entry], by: str) -> list[Entry]:
    """One entry for each image, those most worth a look first."""
    keys: dict[str, Any] = {
        "disagreement": lambda entry: (entry.overlap, -entry.shift),
        "entropy": lambda entry: -entry.entropy,
        "changed": lambda entry: (not entry.changed, -entry.shift),
    }
    first: dict[int, Entry] = {}
    for entry in sorted(entries, key=keys[by]):
        first.setdefault(entry.image_id, entry)
    return list(first.values())
