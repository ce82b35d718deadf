from __future__ import annotations

from pathlib import Path

import pytest

from data.errors import LockTimeoutError
from data.locks import exclusively


def test_a_lock_is_held_by_one_and_waited_for_in_bounded_time(tmp_path: Path):
    lock = tmp_path / "there" / "lock"
    waited = pytest.raises(LockTimeoutError, match="another process has been testing for 0 s")
    with exclusively(lock, 1, "testing"), waited, exclusively(lock, 0.3, "testing"):
        raise AssertionError("two hold the lock")
    with exclusively(lock, 0.3, "testing"):
        pass
