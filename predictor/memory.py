"""Keeps the memory that a step on the CPU frees for the next step (glibc alone; elsewhere nothing happens)."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Keeps freed memory inside the block, and returns it to the system at its end."""
    keep_freed_memory(True)
    try:
        yield
    finally:
        keep_freed_memory(False)


def keep_freed_memory(keep: bool) -> None:
    """Sets whether glibc's malloc keeps freed memory for the next request, however large, or returns it.

    A step on the CPU frees some hundred MB and asks for them again. If they were returned, the kernel has to make
    their pages again each time, which takes longer than the calculation in them (docs/fit.md).
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt, malloc_trim = libc.mallopt, libc.malloc_trim
    except (OSError, TypeError, AttributeError):
        return
    mallopt(_M_MMAP_MAX, 0 if keep else 65_536)
    mallopt(_M_TRIM_THRESHOLD, -1 if keep else 128 * 1024)
    if not keep:
        malloc_trim(0)
