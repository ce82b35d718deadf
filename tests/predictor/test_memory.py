from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from predictor.memory import keep_freed_memory


def run(queue: Any) -> None:
    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    before = resident()
    for keep in (True, False):
        keep_freed_memory(keep)
        torch.ones(50_000_000)  # 200 MB, freed at once
        queue.put(resident() - before)


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_freed_memory_is_kept_during_a_fit_and_handed_back_after_it() -> None:
    """In a process of its own: what other tests have freed comes back at any moment."""
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    process = spawn.Process(target=run, args=(queue,))
    process.start()
    kept, handed_back = queue.get(timeout=120), queue.get(timeout=120)
    process.join(60)
    assert 150 < kept < 400
    assert -100 < handed_back < 100
