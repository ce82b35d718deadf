"""Checks of values on a device, read at once where that is free and else once the device has passed them.

Reading a value from an accelerator makes the host wait for all queued work. A check copies the value beside that
work instead, and its error is raised by a later call that finds the copy done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scr_runtime.errors import SCRError


@dataclass(frozen=True)
class _Check:
    """One value to read.

    Attributes:
        values: On the host, or being copied there.
        copied: Reached when the copy is done; ``None`` if there is nothing to wait for.
        holds: ``values.tolist()`` -> whether all is well.
        error: Makes the error if not.
    """

    values: Tensor
    copied: torch.cuda.Event | None
    holds: Callable[[Any], bool]
    error: Callable[[], SCRError]


class DeferredChecks:
    """Checks in the order in which they were required. Not for several threads at once."""

    def __init__(self) -> None:
        self._waiting: deque[_Check] = deque()

    def require(self, values: Tensor, holds: Callable[[Any], bool], error: Callable[[], SCRError]) -> None:
        """Raises ``error()`` unless ``holds(values.tolist())``: at once where reading is free, else when it is.

        Args:
            values: Small, on any device.
            holds: The condition.
            error: Makes the error.
        """
        if reading_is_free(values.device):
            self._waiting.append(_Check(values, None, holds, error))
            self.raise_failed(wait=True)
            return
        copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.device.type == "cuda")
        copy.copy_(values, non_blocking=True)
        copied = torch.cuda.Event() if values.device.type == "cuda" else None
        if copied is not None:
            copied.record()
        self._waiting.append(_Check(copy, copied, holds, error))

    def raise_failed(self, *, wait: bool) -> None:
        """Reads the checks whose values have arrived, in order.

        Args:
            wait: Whether to wait for those that have not.

        Raises:
            SCRError: The first failed check's error; the checks behind it are dropped.
        """
        while self._waiting:
            check = self._waiting[0]
            if check.copied is not None and not check.copied.query():
                if not wait:
                    return
                check.copied.synchronize()
            self._waiting.popleft()
            if not check.holds(check.values.tolist()):
                self._waiting.clear()
                raise check.error()

    def drop(self) -> None:
        """Forgets all checks that have not been read."""
        self._waiting.clear()


def reading_is_free(device: torch.device) -> bool:
    """Whether the host can read a tensor there without waiting for it. On accelerators it can't."""
    return device.type == "cpu"
