"""What goes with hallucination: where an object lies, and how much of the map lies on it."""

from __future__ import annotations

import numpy as np
import pytest

from evaluation.analysis import Box, sources_on, tertiles


def test_a_box_by_shares_of_its_image() -> None:
    box = Box((10.0, 0.0, 30.0, 50.0), (100.0, 50.0))
    assert (box.area, box.distance) == (pytest.approx(0.2), 0.0)
    assert Box((10.0, 20.0, 80.0, 30.0), (100.0, 50.0)).distance == pytest.approx(0.1)


def test_sources_on_an_object() -> None:
    """A grid of 4 x 4 over 80 x 40 pixels: patches of 20 x 10, or of 10 x 10 in the middle square."""
    left, right = Box((0.0, 0.0, 19.0, 40.0), (80.0, 40.0)), Box((61.0, 0.0, 80.0, 40.0), (80.0, 40.0))
    assert sources_on([left], [0, 4, 5, 15], (4, 4), crops=False) == 0.5
    assert sources_on([left, right], [0, 4, 5, 15], (4, 4), crops=False) == 0.75
    assert sources_on([left, right], [0, 4, 5, 15], (4, 4), crops=True) == 0  # it begins at x = 20
    middle = Box((20.0, 0.0, 30.0, 20.0), (80.0, 40.0))
    assert sources_on([middle], [0, 4, 8, 1], (4, 4), crops=True) == 0.5


@pytest.mark.parametrize(
    ("step", "names"),
    [
        (0.1, ["H / ln N up to 0.267", "between 0.267 and 0.533", "above 0.533"]),
        (0.00001, ["H / ln N up to 0.0000", "between 0.0000 and 0.0001", "above 0.0001"]),
        (0.0, ["H / ln N up to 0.000"]),
    ],
)
def test_bounds_of_tertiles_can_be_told_apart(step: float, names: list[str]) -> None:
    entropy = np.linspace(0, 8 * step, 9)
    found = tertiles(entropy, np.arange(9), {"vanilla": np.zeros(9)}, [])
    assert [part.name for part in found] == names
