from __future__ import annotations

from pathlib import Path

import pytest

from playground.server import Place
from tests.playground.test_engine import ask


def test_the_python_of_a_screen_gives_the_same_answers(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(Path(__file__).parents[2])
    screen = place.look(ask(num_sources=8, strength=1.25, threshold=0.0))
    with pytest.warns(RuntimeWarning, match=r"with other settings: strength is 1\.25, was 1\.1"):
        exec(compile(screen["code"], "screen.py", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    said = [line.split(" ", 1)[1] for line in printed if not line.startswith(" ")]
    assert said == [answer["text"] for answer in screen["answers"]]
    assert str(screen["grids"][0]["sources"]["one-pass"]) in next(line for line in printed if "one-pass None" in line)
