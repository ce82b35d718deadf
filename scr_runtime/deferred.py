"""Checks of values on a device, read at once where that is free and else once the device has passed them.

Reading a value from an accelerator makes the host wait for all queued work. A check copies the value beside that
work instead, and its error is raised by a later call that finds the copy done.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scr_runtime.errors import SCRError
from scr_runtime.here import Turns

_TURNS = Turns()


@dataclass(frozen=True)
class _Check:
    """One value to read.

    Attributes:
        values: On the host, or being copied there.
        copied: Reached when the copy is done; ``None`` if there is nothing to wait for.
        holds: ``values.tolist()`` -> whether all is well.
        error: Makes the error if not.
        of: What the check is of: a prefill.
    """

    values: Tensor
    copied: torch.cuda.Event | None
    holds: Callable[[Any], bool]
    error: Callable[[], SCRError]
    of: object = None


class DeferredChecks:
    """Checks in the order in which they were required. A thread raises its own; ``everywhere`` raises those of all."""

    def __init__(self) -> None:
        self._here = threading.local()
        self._queues: list[deque[_Check]] = []  # of all threads; one that is empty has nothing to lose

    @property
    def _waiting(self) -> deque[_Check]:
        """This thread's checks."""
        queue: deque[_Check] | None = self._here.__dict__.get("queue")
        if queue is None:
            queue = self._here.queue = deque[_Check]()
            self._list(queue)
        return queue

    @_TURNS
    def _list(self, queue: deque[_Check]) -> None:
        self._queues = [*(other for other in self._queues if other), queue]

    def require(
        self, values: Tensor, holds: Callable[[Any], bool], error: Callable[[], SCRError], of: object = None
    ) -> None:
        """Raises ``error()`` unless ``holds(values.tolist())``: at once where reading is free, else when it is.

        Args:
            values: Small, on any device.
            holds: The condition.
            error: Makes the error.
            of: What the check is of, for ``drop``.
        """
        if reading_is_free(values.device):
            self._waiting.append(_Check(values, None, holds, error, of))
            self.raise_failed(wait=True)
            return
        copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.device.type == "cuda")
        copy.copy_(values, non_blocking=True)
        copied = torch.cuda.Event() if values.device.type == "cuda" else None
        if copied is not None:
            copied.record()
        self._waiting.append(_Check(copy, copied, holds, error, of))

    def raise_failed(self, *, wait: bool, everywhere: bool = False) -> None:
        """Reads the checks whose values have arrived, in order.

        Args:
            wait: Whether to wait for those that have not.
            everywhere: Whether to read those of all threads.

        Raises:
            SCRError: The first failed check's error; the checks behind it are dropped.
        """
        for queue in list(self._queues) if everywhere else [self._waiting]:
            while (check := _first(queue)) is not None:
                if check.copied is not None and not check.copied.query():
                    if not wait:
                        return
                    check.copied.synchronize()
                _remove(queue, check)
                if not check.holds(check.values.tolist()):
                    self.drop(everywhere=everywhere)
                    raise check.error()

    def drop(self, of: object = None, *, everywhere: bool = False) -> None:
        """Forgets all checks that have not been read, or those of one thing."""
        for queue in list(self._queues) if everywhere else [self._waiting]:
            for check in list(queue):
                if of is None or check.of is of:
                    _remove(queue, check)


def reading_is_free(device: torch.device) -> bool:
    """Whether the host can read a tensor there without waiting for it. On accelerators it can't."""
    return device.type == "cpu"


def _first(queue: deque[_Check]) -> _Check | None:
    try:
        return queue[0]
    except IndexError:
        return None


def _remove(queue: deque[_Check], check: _Check) -> None:
    """Another thread may have been first."""
    for place, other in enumerate(list(queue)):
        if other is check:
            del queue[place]
            return
