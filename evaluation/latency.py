"""What a prefill costs under each method, as a ratio to vanilla, interleaved in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch


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


def prefill_costs(
    model: Any,
    inputs: Mapping[str, Any],
    methods: Sequence[str],
    applied: Callable[[str], AbstractContextManager[Any]],
    *,
    repeats: int,
    warm_up: int = 2,
) -> dict[str, Cost]:
    """Times one prefill under each method, round after round, so that a noisy machine hits all alike.

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
    clock = _device_clock if model.device.type == "cuda" else _thread_clock
    times: dict[str, list[float]] = {name: [] for name in methods}
    with _one_thread(), torch.no_grad():
        for turn in range(warm_up + repeats):
            for name in methods:
                with applied(name):
                    elapsed = clock(lambda: model(**inputs, logits_to_keep=1))
                if turn >= warm_up:
                    times[name].append(elapsed)
    base = times[methods[0]]
    costs: dict[str, Cost] = {}
    for name, mine in times.items():
        ratios = sorted(a / b for a, b in zip(mine, base, strict=True))
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
        costs[name] = Cost(statistics.median(mine), statistics.median(ratios), quartiles[0], quartiles[2])
    return costs


def _thread_clock(call: Callable[[], object]) -> float:
    """Milliseconds of CPU time of this thread: other processes on shared cores don't count."""
    start = time.thread_time_ns()
    call()
    return (time.thread_time_ns() - start) / 1e6


def _device_clock(call: Callable[[], object]) -> float:
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
