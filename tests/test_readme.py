"""The README's Python runs as it stands there, block after block, in a clone."""

import re
from pathlib import Path
from typing import Any

import pytest

from scr_runtime import SCR

ROOT = Path(__file__).parents[1]


def test_the_python_of_the_readme_runs_as_pasted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "Is there a dog in the image?" in printed and "two-pass [" in printed
    scr = names["scr"]
    assert isinstance(scr, SCR) and scr.stats.prefills == 1


def test_files_that_the_readme_names_are_there() -> None:
    readme = (ROOT / "README.md").read_text()
    links = {link for link in re.findall(r"\]\(([^)#]+)\)", readme) if not link.startswith("http")}
    assert len(links) > 10
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing
