"""Text fits the terminal; what has no spaces stays whole."""

from __future__ import annotations

import pytest

from scr_runtime.serve.settings import help_text
from scr_runtime.terminal import columns, filled

LINK = "http://127.0.0.1:5000/#/experiments/1/runs?workflowType=machine_learning&viewStateShareKey=scr"


@pytest.mark.parametrize("width", [80, 100, 140])
def test_a_long_word_stays_whole(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert columns() == width
    lines = filled(f"compare runs: {'make ui, ' * 12}then {LINK} ({'parameters, ' * 12}end)", rest="  ").splitlines()
    assert sum(LINK in line for line in lines) == 1
    assert all(len(line) <= min(width, 110) or line.strip() == LINK for line in lines)
    assert all(line.startswith("  ") for line in lines[1:])


def test_a_narrow_terminal_has_forty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "12")
    assert columns() == 40


def test_the_servers_help_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, help_text().splitlines()[2:])) <= 80  # behind a command that can be copied
