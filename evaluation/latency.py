"""What a prefill costs under each method, as a ratio to vanilla, interleaved in one process."""

from __future__ import annotations

import operator
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Cost:
    """One method's prefill.

    Attributes:
        milliseconds: Median time: CPU time of one thread on a CPU, device time on CUDA.
        ratio: Median over rounds of this method's time to the first method's in the same round.
        low: Lower quartile of that ratio.
        high: Upper quartile.
    """

    milliseconds: float
    ratio: float
    low: float
    high: float


def interleaved(
    calls: Mapping[str, Callable[[], Any]], clock: Callable[[Callable[[], Any]], T], repeats: int, warm_up: int = 2
) -> dict[str, list[T]]:
    """Times calls round after round, so that a noisy machine disturbs all alike.

    Args:
        calls: Name -> what is timed.
        clock: Runs a call and returns what it took, as ``thread_clock`` does; ``operator.call`` for calls that time
            themselves.
        repeats: Timed rounds, in each of which every call runs once, in their order.
        warm_up: Rounds before them.

    Returns:
        Name -> what the clock returned in each round.
    """
    times: dict[str, list[T]] = {name: [] for name in calls}
    for turn in range(warm_up + repeats):
        for name, call in calls.items():
            elapsed = clock(call)
            if turn >= warm_up:
                times[name].append(elapsed)
    return times


def prefill_costs(
    model: Any,
    inputs: Mapping[str, Any],
    methods: Sequence[str],
    applied: Callable[[str], AbstractContextManager[Any]],
    *,
    repeats: int,
    warm_up: int = 2,
) -> dict[str, Cost]:
    """Times one prefill under each method, interleaved.

    Args:
        model: The model.
        inputs: Its inputs, on its device.
        methods: Their names; ratios refer to the first.
        applied: Name -> a context in which the method is attached.
        repeats: Timed rounds.
        warm_up: Rounds before them.

    Returns:
        Method -> its cost.
    """
    clock = device_clock if model.device.type == "cuda" else thread_clock

    def prefill(name: str) -> float:
        with applied(name):  # to attach a method is not part of the prefill
            return clock(lambda: model(**inputs, logits_to_keep=1))

    with _one_thread(), torch.no_grad():
        times = interleaved({name: partial(prefill, name) for name in methods}, operator.call, repeats, warm_up)
    base = times[methods[0]]
    costs: dict[str, Cost] = {}
    for name, mine in times.items():
        ratios = sorted(a / b for a, b in zip(mine, base, strict=True))
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
        costs[name] = Cost(statistics.median(mine), statistics.median(ratios), quartiles[0], quartiles[2])
    return costs


def thread_clock(call: Callable[[], Any]) -> float:
    """Milliseconds of CPU time of this thread: other processes on shared cores don't count."""
    start = time.thread_time_ns()
    call()
    return (time.thread_time_ns() - start) / 1e6


def device_clock(call: Callable[[], Any]) -> float:
    """Milliseconds between two events on the current CUDA device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
