from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from evaluation.latency import interleaved, prefill_costs


class Busy(torch.nn.Module):
    """A model whose work is set by the method in force."""

    def __init__(self) -> None:
        super().__init__()
        self.work = 1
        self.calls: list[int] = []
        self.weight = torch.nn.Parameter(torch.randn(256, 256))

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def forward(self, x: torch.Tensor, logits_to_keep: int) -> torch.Tensor:
        self.calls.append(self.work)
        for _ in range(self.work):
            x = torch.tanh(x @ self.weight)
        return x


def test_ratios_follow_the_work_and_rounds_are_interleaved() -> None:
    model = Busy()

    @contextmanager
    def applied(name: str) -> Iterator[None]:
        model.work = {"vanilla": 20, "double": 40}[name]
        yield

    inputs: dict[str, Any] = {"x": torch.randn(256, 256)}
    costs = prefill_costs(model, inputs, ["vanilla", "double"], applied, repeats=15, warm_up=1)
    assert model.calls == [20, 40] * 16
    assert costs["vanilla"].ratio == 1.0
    assert 1.5 < costs["double"].ratio < 2.7  # twice the work, on a noisy machine
    assert costs["double"].low <= costs["double"].ratio <= costs["double"].high


def test_rounds_are_interleaved_and_the_first_ones_not_kept() -> None:
    calls: list[str] = []
    clock = iter(range(100))

    def timed(call: Callable[[], object]) -> float:
        call()
        return next(clock)

    times = interleaved({name: partial(calls.append, name) for name in "ab"}, timed, repeats=2, warm_up=1)
    assert calls == ["a", "b"] * 3
    assert times == {"a": [2, 4], "b": [3, 5]}
