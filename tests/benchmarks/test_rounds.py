"""Ratios are taken round by round, and clocks count what they say."""

from __future__ import annotations

import time

import pytest

from benchmarks.rounds import Ratio, interleaved, thread_clock, wall_and_process_clock, wall_clock


def test_variants_take_turns_and_the_warm_up_is_dropped() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = interleaved(calls, wall_and_process_clock, 2, warm_up=1)
    assert order == list("ababab")
    assert [len(values) for values in times.values()] == [2, 2]


def test_ratios_are_taken_round_by_round() -> None:
    ratio = Ratio.of([2.0, 30.0, 8.0], [1.0, 10.0, 2.0])
    assert ratio.median == 3.0
    assert ratio.low <= 3.0 <= ratio.high
    assert Ratio.of([3.0], [2.0]) == Ratio(1.5, 1.5, 1.5)
    assert Ratio(0.9, 1.0, 1.1).quartiles == "0.900 - 1.100"


def test_a_thread_that_sleeps_takes_wall_time_alone() -> None:
    assert wall_clock(lambda: time.sleep(0.05)) >= 50
    assert thread_clock(lambda: time.sleep(0.05)) < 40
    wall, process = wall_and_process_clock(lambda: sum(range(100_000)))
    assert wall > 0 and process == pytest.approx(wall, abs=1000)
