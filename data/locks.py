"""Locks between processes, on one machine or on a file system that several share.

The operating system opens a lock when its holder dies. A file system without locks locks nobody out: what is written
there stays whole, file by file, but two processes may do the same work twice.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import time
from collections.abc import Iterator
from pathlib import Path

from data.errors import LockTimeoutError
from data.log import log

_POLL_SECONDS = 0.2


@contextlib.contextmanager
def exclusively(lock: Path, seconds: float, what: str) -> Iterator[None]:
    """Lets one process at a time into the block; the others wait, and report what for.

    Args:
        lock: file that stands for the lock; created if missing, and left there.
        seconds: longest wait.
        what: what the holder does, for the message.

    Raises:
        LockTimeoutError: another process held it all the time.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a read-only or full disk: what needs the lock will report it
            lock.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
            stack.callback(os.close, descriptor)
            _acquire(descriptor, fcntl.LOCK_EX, lock, seconds, what)
        yield


@contextlib.contextmanager
def holding(place: Path, seconds: float, what: str, *, alone: bool) -> Iterator[None]:
    """Locks a folder or a file that is there: shared with other holders, or alone.

    Args:
        place: the folder or file; nothing is locked where there is none.
        seconds: longest wait.
        what: what the holder does, for the message.
        alone: nobody else may hold it meanwhile.

    Raises:
        LockTimeoutError: another process held it all the time.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            descriptor = os.open(place, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            stack.callback(os.close, descriptor)
            _acquire(descriptor, fcntl.LOCK_EX if alone else fcntl.LOCK_SH, place, seconds, what)
        yield


def _acquire(descriptor: int, kind: int, lock: Path, seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    waiting = False
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= end:
                raise LockTimeoutError(
                    f"another process has been {what} for {seconds:.0f} s ({lock} is locked). Wait for it, or end "
                    "it, and start again."
                ) from None
            if not waiting:
                log("waiting", f"another process is {what} ({lock} is locked), for {seconds:.0f} s at most")
                waiting = True
            time.sleep(_POLL_SECONDS)
        except OSError as error:
            _report_no_locks(lock.parent, error.strerror or str(error))
            return


@functools.lru_cache(maxsize=64)
def _report_no_locks(folder: Path, reason: str) -> None:
    """Once for a folder: a harvest locks often."""
    log("locks", f"files in {folder} cannot be locked ({reason}): start one process at a time there")


def is_alive(process: int) -> bool:
    """Whether a process of this machine is running."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
