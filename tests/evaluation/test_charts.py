"""Charts show every line and every interval, and their legends fit."""

from __future__ import annotations

import re

import numpy as np
import pytest

from evaluation.charts import curves, scatter
from predictor.metrics import Interval

LINE = np.stack([np.linspace(0, 1, 50), np.linspace(0, 1, 50) ** 0.5], axis=1)


def dashed(svg: str) -> list[str]:
    return re.findall(r'class="(c\d) line thin butt" style="stroke-dasharray', svg)


def test_a_line_that_would_hide_another_is_dashed() -> None:
    same = curves({"vanilla": LINE, "two-pass": LINE + 0.001, "one-pass": LINE * [1, 0.5]}, "x", "y", unit=True)
    assert dashed(same) == ["c1"] and "dashed: equal lines" in same  # two-pass over vanilla
    apart = curves({"vanilla": LINE, "one-pass": LINE * [1, 0.5]}, "x", "y", unit=True)
    assert dashed(apart) == [] and "coincide" not in apart


def test_markers_of_lines_that_coincide_lie_beside_each_other() -> None:
    svg = curves({"vanilla": LINE[:8], "two-pass": LINE[:8]}, "x", "y", unit=False)
    circles = set(re.findall(r'cx="([\d.]+)" cy="[\d.]+" r="3.5"', svg))
    squares = {float(x) + 3.5 for x in re.findall(r'<polygon class="c1 full" points="([\d.]+),', svg)}
    assert len(circles) == 4 and not any(abs(float(x) - square) < 1 for x in circles for square in squares)


@pytest.mark.parametrize("name", ["auto", "two-pass:elsewhere", "a-predictor-with-a-long-name:elsewhere"])
def test_the_legend_is_as_wide_as_its_names(name: str) -> None:
    svg = curves({name: LINE}, "x", "y", unit=False)
    width = int(re.findall(r'viewBox="0 0 (\d+)', svg)[0])
    start = int(re.findall(rf'class="note" x="(\d+)" y="\d+">{name}', svg)[0])
    assert width - start >= 7.3 * len(name)  # pixels of a letter, on average, in 12.5 px


def test_a_point_has_its_interval() -> None:
    svg = scatter({"vanilla": (23.0, Interval(16.4, 10.0, 20.0)), "two-pass": (34.0, Interval(16.2, 11.0, 19.0))},
                  "ms", "%")  # fmt: skip
    spans = re.findall(r'line thin" d="M[\d.]+ ([\d.]+)V([\d.]+)"', svg)
    assert len(spans) == 2 and all(float(low) - float(high) > 150 for low, high in spans)  # y grows downwards
    assert ">10<" in svg and ">20<" in svg  # the axis spans the intervals
    end = max(float(x) for x in re.findall(r"M([\d.]+) 14V290", svg))
    names = re.findall(r'class="note" x="([\d.]+)" y="([\d.]+)">(vanilla|two-pass)<', svg)
    assert len({y for _, y, _ in names}) == 2 and all(float(x) > end for x, _, _ in names)  # a legend beside the grid
