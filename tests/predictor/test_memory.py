from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from predictor.memory import keep_freed_memory


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_freed_memory_is_kept_during_a_fit_and_handed_back_after_it() -> None:
    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    before = resident()
    for keep, most, least in ((True, 400, 150), (False, 100, -100)):
        keep_freed_memory(keep)
        torch.ones(50_000_000)  # 200 MB, freed at once
        assert least < resident() - before < most
