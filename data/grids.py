"""Patch grids of an image, and how records hold them. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from data.files import is_count

Grid = tuple[int, int]  # rows and columns of patches


def grids_record(grids: Sequence[Grid]) -> list[Any]:
    """The grids of an image as JSON: [rows, columns], or a list of these for an image that has several."""
    return list(grids[0]) if len(grids) == 1 else [list(grid) for grid in grids]


def grids_of(record: Sequence[Any]) -> tuple[Grid, ...]:
    """The grids that a record holds."""
    several = record if isinstance(record[0], list) else [record]
    return tuple((rows, columns) for rows, columns in several)


def is_grids_record(value: object) -> bool:
    """Whether a value is what `grids_record` gives: each image has one form alone."""
    if not isinstance(value, list) or not value:
        return False
    return _is_grid(value) or (len(value) > 1 and all(map(_is_grid, value)))


def _is_grid(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(is_count(side, 1) for side in value)


def patches(grids: Sequence[Grid]) -> int:
    """Patches of all grids of an image."""
    return sum(rows * columns for rows, columns in grids)
