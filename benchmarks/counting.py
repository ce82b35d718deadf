"""Counts what a forward pass asks of a device, on a machine that has none.

A TorchDispatchMode sees every aten operator below autograd. Each is sorted into one of three kinds:

    free      views, allocations and metadata: an operator whose schema returns an alias that it does not write, or
              that is in FREE. No kernel on a GPU.
    sync      what makes the host wait for a device: reading a value (_local_scalar_dense, which is ``item``,
              ``bool(tensor)``, ``float(tensor)``; ``tolist`` and ``numpy``, seen one level above), or a shape that
              depends on values (nonzero, masked_select, unique, index with a boolean mask). Reading the target of
              a non-blocking copy is no sync: such code asks first whether the copy has arrived. A blocking copy to
              the host (``cpu()``, ``to("cpu")``) is a no-operation on a CPU: it is counted where it is asked for by
              ``cpu()``, and can't be seen where it is a ``to``.
    kernel    everything else, and the syncs too: one operator is one kernel here. On a GPU some are more (a sort is
              about four, a copy is a transfer), so that this compares passes and is no profile.

scr_runtime reads a prefill's scores at once on a CPU and asynchronously elsewhere. ``accelerator_branches`` makes it
take the latter way here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

FREE = {
    "aten::empty.memory_format",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::lift_fresh",
    "aten::_reshape_alias",
    "aten::_unsafe_view",
    "aten::sym_size.int",
    "aten::is_pinned",
    "aten::_efficientzerotensor",
}
SYNCS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero"}
_VALUE_SHAPED = ("aten::_unique", "aten::unique", "aten::bincount", "aten::repeat_interleave.Tensor")


@dataclass
class Count:
    """What one pass did.

    Attributes:
        kernels: Operators that launch a kernel, by name.
        syncs: Operators that make the host wait, by name.
        largest: Bytes of the largest tensor that an operator returned.
        shapes: Every shape returned by a kernel.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    syncs: Counter[str] = field(default_factory=Counter)
    largest: int = 0
    shapes: set[tuple[int, ...]] = field(default_factory=set)

    def __sub__(self, other: Count) -> Count:
        """What this pass did more often than another; shapes that the other did not have."""
        return Count(self.kernels - other.kernels, self.syncs - other.syncs, self.largest, self.shapes - other.shapes)

    def net(self, other: Count) -> int:
        """Kernels more than another pass, operators that it has less of taken off."""
        return self.kernels.total() - other.kernels.total()


class CountingMode(TorchDispatchMode):
    """Fills ``count`` while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.count = Count()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs an operator and notes what it is."""
        result = func(*args, **(kwargs or {}))
        name = func.name()
        if name == "aten::copy_" and (args[2:] == (True,) or (kwargs or {}).get("non_blocking")):
            args[0].arrives_by_itself = True
        if _is_sync(name, args):
            self.count.syncs[name] += 1
        elif name in FREE or _is_view(func):
            return result
        self.count.kernels[name] += 1
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.count.largest = max(self.count.largest, tensor.numel() * tensor.element_size())
                self.count.shapes.add(tuple(tensor.shape))
        return result


class _ReadingMode(TorchFunctionMode):
    """Sees the reads that no operator shows."""

    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count = count

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("tolist", "numpy", "cpu") and not hasattr(args[0], "arrives_by_itself"):
            self.count.syncs[name] += 1
        return func(*args, **(kwargs or {}))


def _is_view(func: Any) -> bool:
    returned = [value.alias_info for value in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in returned)


def _is_sync(name: str, args: tuple[Any, ...]) -> bool:
    if name in SYNCS or name.startswith(_VALUE_SHAPED):
        return True
    if name in ("aten::index.Tensor", "aten::index_put_", "aten::index_put"):
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return False


def counted(call: Callable[[], object]) -> Count:
    """Counts one call, run once before so that what is cached per shape and device does not count."""
    for _ in range(2):
        with CountingMode() as mode, _ReadingMode(mode.count):
            call()
    return mode.count


@contextmanager
def accelerator_branches() -> Iterator[None]:
    """Makes scr_runtime on a CPU take the branches that it takes where reading a tensor means waiting."""
    with mock.patch("scr_runtime.deferred.reading_is_free", lambda device: False):
        yield
