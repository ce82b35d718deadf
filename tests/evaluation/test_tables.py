from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from evaluation.tables import bullets, markdown, table

ROWS = [["method", "HR"], ["vanilla", "12.5"], ["auto", "9.0"]]


def test_columns_are_aligned_under_their_header() -> None:
    assert table(ROWS).splitlines() == ["method     HR", "-" * 13, "vanilla  12.5", "auto      9.0"]


def test_markdown_has_the_same_cells() -> None:
    assert markdown(ROWS).splitlines() == ["| method | HR |", "|---|---|", "| vanilla | 12.5 |", "| auto | 9.0 |"]


def test_long_sentences_are_wrapped_under_their_bullet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert bullets(["one " * 9 + "model.scr.num_sources=8", "four"]) == (
        "- " + ("one " * 9).strip() + "\n  model.scr.num_sources=8\n- four"
    )


@pytest.mark.parametrize(("columns", "parts"), [(80, 3), (100, 2), (140, 2), (200, 1)])
def test_a_table_fits_the_terminal_and_loses_nothing(
    columns: int, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    rows = [
        ["model", "loss", *(f"metric {n}" for n in range(8))],
        ["a", "kl", *(f"0.{n}41 [0.839, 0.901]" for n in range(8))],
    ]
    text = table(rows, lead=2)
    assert max(map(len, text.splitlines())) <= columns
    assert text.count("model  loss") == parts and all(cell in text for row in rows for cell in row)


def test_a_row_is_marked_only_where_that_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\033" not in table(ROWS, marked=("auto",))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert "\033[1mauto      9.0\033[0m" in table(ROWS, marked=("auto",))
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in table(ROWS, marked=("auto",))


def test_a_table_costs_no_heavy_import() -> None:
    code = "import sys, evaluation.tables; print({'mlflow', 'matplotlib', 'torch'} & set(sys.modules))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
