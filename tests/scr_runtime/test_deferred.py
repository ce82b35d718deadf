"""Checks that are read at once on a CPU, and later where reading would wait."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from scr_runtime import errors
from scr_runtime.deferred import DeferredChecks, reading_is_free


def small(values: list[float]) -> bool:
    return all(value < 1 for value in values)


def too_large() -> errors.SCRError:
    return errors.NonFiniteScoresError("too large")


def later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scr_runtime.deferred.reading_is_free", lambda device: False)


class Copied:
    """An event on a device that is still busy."""

    def __init__(self) -> None:
        self.done = False

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.done = True


def test_on_a_cpu_a_check_raises_where_it_stands() -> None:
    assert reading_is_free(torch.device("cpu"))
    assert not reading_is_free(torch.device("cuda"))
    checks = DeferredChecks()
    checks.require(torch.tensor([0.5]), small, too_large)
    with pytest.raises(errors.NonFiniteScoresError, match="too large"):
        checks.require(torch.tensor([0.5, 2.0]), small, too_large)
    checks.raise_failed(wait=True)  # it was raised, and is gone


def test_elsewhere_it_raises_at_a_later_call(monkeypatch: pytest.MonkeyPatch) -> None:
    later(monkeypatch)
    checks = DeferredChecks()
    values = torch.tensor([2.0])
    checks.require(values, small, too_large)
    values.fill_(0.0)  # the check has its copy
    with pytest.raises(errors.NonFiniteScoresError):
        checks.raise_failed(wait=False)
    checks.raise_failed(wait=True)


def test_the_first_failed_check_is_raised_and_the_others_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    later(monkeypatch)
    checks = DeferredChecks()
    checks.require(torch.tensor([0.0]), small, too_large)
    checks.require(torch.tensor([3.0]), small, lambda: errors.PrefillError("first"))
    checks.require(torch.tensor([3.0]), small, too_large)
    with pytest.raises(errors.PrefillError, match="first"):
        checks.raise_failed(wait=True)
    checks.raise_failed(wait=True)
    checks.require(torch.tensor([3.0]), small, too_large)
    checks.drop()
    checks.raise_failed(wait=True)


def test_nothing_waits_for_a_copy_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    later(monkeypatch)
    checks, read = DeferredChecks(), []
    busy: Any = Copied()

    def holds(values: list[float]) -> bool:
        read.append(values)
        return small(values)

    checks.require(torch.tensor([0.0]), holds, too_large)
    checks._waiting[0] = dataclasses.replace(checks._waiting[0], copied=busy)
    checks.require(torch.tensor([3.0]), holds, too_large)
    checks.raise_failed(wait=False)
    assert read == [] and not busy.done  # in order: the second does not overtake
    with pytest.raises(errors.NonFiniteScoresError):
        checks.raise_failed(wait=True)
    assert read == [[0.0], [3.0]] and busy.done
