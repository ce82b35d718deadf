"""Variants that take turns, round by round: the loop of evaluation/latency.py, clocks, and ratios to a yardstick.

Every clock runs a call and returns milliseconds. Needs torch, and of the project evaluation/latency.py alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from evaluation.latency import device_clock, interleaved, thread_clock

__all__ = ["Ratio", "device_clock", "interleaved", "thread_clock", "wall_and_process_clock", "wall_clock"]


def wall_clock(call: Callable[[], object]) -> float:
    """Wall time."""
    return wall_and_process_clock(call)[0]


def wall_and_process_clock(call: Callable[[], object]) -> tuple[float, float]:
    """Wall time, and CPU time of this process, all its threads together."""
    wall, process = time.perf_counter_ns(), time.process_time_ns()
    call()
    return (time.perf_counter_ns() - wall) / 1e6, (time.process_time_ns() - process) / 1e6


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles, over rounds, of one variant's measure to another's in the same round."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, mine: Sequence[float], base: Sequence[float]) -> Ratio:
        """The ratio of two variants of `interleaved`."""
        ratios = [a / b for a, b in zip(mine, base, strict=True)]
        return cls(*statistics.quantiles(ratios, n=4)) if len(ratios) > 1 else cls(*ratios * 3)

    @property
    def quartiles(self) -> str:
        """The lower and the upper one, for a table."""
        return f"{self.low:.3f} - {self.high:.3f}"
