"""A short run of the fuzz; `python -m tests.scr_runtime.fuzz` runs thousands."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tests.scr_runtime.fuzz import Fuzz


def test_damaged_folders_are_refused_or_exact(tmp_path: Path) -> None:
    fuzz = Fuzz(tmp_path, seed=7)
    counts = Counter(fuzz.case() for _ in range(250))
    assert {kind for kind, _ in counts} == set(fuzz.damages)
    assert sum(count for (_, found), count in counts.items() if found == "refused") > 150
    assert counts["flip", "exact"] == 0 and counts["tensor", "exact"] == 0
