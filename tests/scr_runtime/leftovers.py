"""What an SCR may leave behind, and interrupts at any line of its code."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import scr_runtime

PACKAGE = str(Path(scr_runtime.__file__).parent)
ENDS: list[type[BaseException]] = [
    KeyboardInterrupt, SystemExit, asyncio.CancelledError, GeneratorExit, RuntimeError,
]  # fmt: skip


def snapshot(model: nn.Module) -> list[Any]:
    """Hooks, instance attributes, attention implementations with their types, and transformers' tables.

    In those, the names of SCR's wrappers stay: a model in another thread may be about to look one up.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    found: list[Any] = []
    for module in model.modules():
        hooks = [
            (name, [(key, id(hook)) for key, hook in table.items()])
            for name, table in vars(module).items()
            if "hook" in name and isinstance(table, dict)
        ]
        plain = {
            name: id(value)
            for name, value in vars(module).items()
            if name not in ("_parameters", "_buffers", "_modules") and callable(value)
        }
        found.append((hooks, sorted(vars(module)), plain))
        raw = getattr(getattr(module, "config", None), "_attn_implementation", None)
        found.append((type(raw), raw))
    for table in (AttentionInterface, AttentionMaskInterface):
        found.append(sorted(name for name in table._global_mapping if not name.startswith("scr_")))
    return found


class Bomb:
    """A hook, processor, streamer or criterion that raises one exception at its n-th call."""

    def __init__(self, error: BaseException, at: int = 1) -> None:
        self.error = error
        self.left = at
        self.armed = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.armed and self.left == 0:
            raise self.error
        return self.unharmed(*args)

    def unharmed(self, *args: Any) -> Any:
        return None

    def put(self, value: Any) -> None:
        self()

    def end(self) -> None:
        pass


class ProcessorBomb(Bomb):
    def unharmed(self, *args: Any) -> Any:
        return args[1]


class CriterionBomb(Bomb):
    def unharmed(self, *args: Any) -> Any:
        return torch.zeros(len(args[0]), dtype=torch.bool)


def lines_of(call: Callable[[], object], stop_at: int | None = None, error: BaseException | None = None) -> int:
    """Runs a call; counts the lines of scr_runtime that it runs in this thread, and raises before one of them."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            count += 1
            if count == stop_at:
                assert error is not None
                raise error
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count
