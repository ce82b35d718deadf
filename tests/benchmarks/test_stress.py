"""The stress programs find nothing in the project as it is, and find what is wrong on purpose."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks import kills, stress


@pytest.mark.slow
@pytest.mark.parametrize("part", ["calls", "files", "grids"])
def test_nothing_is_wrong(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert stress.main(["--minutes", "0.05", "--only", part, "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    assert "nothing wrong, nothing left over" in printed
    assert int(printed.split(part)[1].split()[0].replace(",", "")) > 0  # right answers


def test_wrong_answers_and_leftovers_are_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(stress, "same", lambda *_: False)
        assert stress.main(["--minutes", "0.002", "--only", "calls"]) == 1
    assert "another answer than alone" in capsys.readouterr().err
    monkeypatch.setattr(stress, "snapshot", lambda _: None)
    assert stress.main(["--minutes", "0.002", "--only", "calls"]) == 1
    assert "left over: the model is not what it was" in capsys.readouterr().err


def test_damage_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = stress.FilesPart(random.Random(0), tmp_path)

    def fails(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(stress, "load_predictor", fails)
    monkeypatch.setattr(stress, "samples_of", fails)
    part.round()
    assert part.tally.counts == {"wrong": 1}


def test_half_a_run_that_says_it_is_complete_is_found(tmp_path: Path) -> None:
    folder = kills.Folder(tmp_path)
    run = folder.fits / "20261121-140531"
    run.mkdir(parents=True)
    (run / "run.json").write_text('{"complete": false}')
    (folder.fits / "latest").symlink_to(run.name)
    folder.check()
    assert "which is not complete" in folder.problems[0]
    (run / "run.json").write_text('{"complete": true}')
    folder.problems.clear()
    folder.check()
    assert "model.safetensors" in " ".join(folder.problems) or "predictors" in " ".join(folder.problems)
