"""Text for a terminal, wrapped between words: keys, paths and addresses stay whole."""

from __future__ import annotations

import shutil
import textwrap

_PROSE = 110  # columns; longer lines are hard to read
_UNKNOWN = 140  # columns of a file or a pipe


def columns() -> int:
    """Columns of the terminal, or of what the environment variable COLUMNS says; at least 40."""
    return max(shutil.get_terminal_size((_UNKNOWN, 24)).columns, 40)


def filled(text: str, first: str = "", rest: str = "") -> str:
    """Wraps a paragraph.

    Args:
        text: The words; a word that is longer than a line gets a line of its own.
        first: What the first line begins with.
        rest: What the others begin with.
    """
    wrapper = textwrap.TextWrapper(min(columns(), _PROSE), initial_indent=first, subsequent_indent=rest)
    wrapper.break_long_words = wrapper.break_on_hyphens = False
    return wrapper.fill(text)
