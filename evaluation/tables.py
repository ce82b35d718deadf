"""Rows of text as an aligned table, as Markdown, and sentences as bullets; what a terminal shows fits its width."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Sequence

from scr_runtime.terminal import columns as terminal_columns
from scr_runtime.terminal import filled


def table(
    rows: Sequence[Sequence[str]], width: int | None = None, marked: Collection[str | None] = (), lead: int = 1
) -> str:
    """Aligns rows of text under their header: the first column left, the others right.

    Columns that do not fit follow in a second table below, which begins with the leading columns again.

    Args:
        rows: Header, and rows of the same length.
        width: Columns of text at most; None takes the terminal's.
        marked: First cells of the rows to print bold, where that can be seen.
        lead: Columns that name a row.
    """
    width = width or terminal_columns()
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    named = list(range(min(lead, len(widths))))
    parts = [named]
    for column in range(len(named), len(widths)):
        needed = sum(widths[place] + 2 for place in [*parts[-1], column]) - 2
        if needed > width and parts[-1] != named:
            parts.append(named)
        parts[-1] = [*parts[-1], column]
    return "\n\n".join(_aligned(rows, part, widths, marked) for part in parts)


def _aligned(
    rows: Sequence[Sequence[str]], columns: Sequence[int], widths: Sequence[int], marked: Collection[str | None]
) -> str:
    lines = [
        "  ".join(row[c].rjust(widths[c]) if c else row[c].ljust(widths[c]) for c in columns).rstrip() for row in rows
    ]
    body = [_strong(line) if row[0] in marked else line for row, line in zip(rows[1:], lines[1:], strict=True)]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *body])


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The same rows as a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def bullets(lines: Sequence[str]) -> str:
    """Wraps sentences for the terminal, one bullet each."""
    return "\n".join(filled(line, "- ", "  ") for line in lines)


def paragraph(text: str, strong: bool = False) -> str:
    """Wraps a text for the terminal; with `strong`, bold where that can be seen."""
    return _strong(filled(text)) if strong else filled(text)


def _strong(text: str) -> str:
    return f"\033[1m{text}\033[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else text
