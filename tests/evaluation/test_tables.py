from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from evaluation.tables import bullets, markdown, table

ROWS = [["method", "HR"], ["vanilla", "12.5"], ["auto", "9.0"]]


def test_columns_are_aligned_under_their_header() -> None:
    assert table(ROWS).splitlines() == ["method     HR", "-" * 13, "vanilla  12.5", "auto      9.0"]


def test_markdown_has_the_same_cells() -> None:
    assert markdown(ROWS).splitlines() == ["| method | HR |", "|---|---|", "| vanilla | 12.5 |", "| auto | 9.0 |"]


def test_long_sentences_are_wrapped_under_their_bullet() -> None:
    assert bullets(["one two three", "four"], width=10) == "- one two\n  three\n- four"


def test_a_table_costs_no_heavy_import() -> None:
    code = "import sys, evaluation.tables; print({'mlflow', 'matplotlib', 'torch'} & set(sys.modules))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
