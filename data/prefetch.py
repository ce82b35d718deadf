"""Draws items ahead in a thread: decoding, the forward and writing overlap."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

_T = TypeVar("_T")


@dataclass(frozen=True)
class _Failure:
    error: BaseException


def prefetch(items: Iterator[_T], depth: int) -> Generator[_T]:
    """Draws items in a thread, at most `depth` ahead; closing the iterator ends the thread."""
    done = object()
    ready: queue.Queue[Any] = queue.Queue(depth)
    closed = threading.Event()

    def put(item: object) -> bool:
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return True
        return False

    def fill() -> None:
        try:
            for item in items:
                if not put(item):
                    return
            put(done)
        except BaseException as error:  # it is raised where the items are used
            put(_Failure(error))

    thread = threading.Thread(target=fill, name="harvest-prefetch", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not done:
            if isinstance(item, _Failure):
                raise item.error
            yield item
    finally:
        closed.set()
        thread.join()
