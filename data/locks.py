"""A lock between processes, on one machine or on a file system that several share."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path

from data.errors import LockTimeoutError

_POLL_SECONDS = 0.2


@contextlib.contextmanager
def exclusively(lock: Path, seconds: float, what: str) -> Iterator[None]:
    """Lets one process at a time into the block; the operating system opens the lock when its holder dies.

    Args:
        lock: file that stands for the lock; created if missing, and left there.
        seconds: longest wait.
        what: what the holder does, for the message.

    Raises:
        LockTimeoutError: another process held it all the time, or the file system has no locks.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    with lock.open("a+b") as stream:
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise LockTimeoutError(
                        f"another process has been {what} for {seconds:.0f} s ({lock} is locked). Wait for it, or end "
                        "it, and start again."
                    ) from None
                time.sleep(_POLL_SECONDS)
            except OSError as error:
                raise LockTimeoutError(
                    f"{lock} cannot be locked ({error}): start one process alone first, for {what}."
                ) from error
        yield
