"""What is wrong with a configuration, in words: one `Problem` a mistake, all of them in one `ConfigError`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from scr_runtime.terminal import filled

COMMAND_LINE = "command line"
_LONGEST = 400  # letters of a value that are repeated


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a configuration, and the way out of it."""

    key: str
    """Dotted key."""
    value: Any
    """What was given."""
    reason: str
    """Why it can't be used."""
    legal: str = ""
    """The values that can be."""
    hint: str = ""
    """What to do next."""
    where: str = ""
    """The file that gave the value, or "command line"."""

    def __str__(self) -> str:
        """Write it as a user reads it: what is wrong, the legal values, the way out."""
        value = value_text(self.value)
        value = value if len(value) <= _LONGEST else f"{value[:_LONGEST]}..."
        given = self.key if value == "" else f"{self.key}={value}"
        where = f" ({self.where})" if self.where else ""
        lines = [wrap(f"{given}{where}: {self.reason}", 2)]
        if self.legal:
            lines.append(wrap(f"legal: {self.legal}", 6))
        if self.hint:
            lines.append(wrap(self.hint, 6))
        return "\n".join(lines)


class ConfigError(ValueError):
    """A configuration that can't be used; `problems` holds everything that is wrong with it."""

    def __init__(self, problems: Sequence[Problem]):
        self.problems = tuple(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__("\n".join([f"{count} in the configuration", *map(str, self.problems)]))


def wrap(text: str, indent: int, rest: int | None = None) -> str:
    """Wrap a paragraph to the terminal, never inside a word: keys and paths stay whole."""
    return filled(text, " " * indent, " " * (indent if rest is None else rest))


def closest(word: str, candidates: Iterable[str]) -> str:
    """Name the candidate that `word` probably stands for, or nothing."""
    return next(iter(difflib.get_close_matches(word, list(candidates), n=1)), "")


def value_text(value: Any) -> str:
    """Write a value as the command line takes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(value_text(item) for item in value) + "]"
    return str(value)
