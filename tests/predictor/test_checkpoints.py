"""The record of a fit: when it can be resumed, and what a damaged or foreign file does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from predictor import checkpoints
from predictor.checkpoints import FitRecord, interrupted_run


class Logger:
    version = "run-7"


def begin(folder: Path, resume: bool = True, **identity: Any) -> Path | None:
    return FitRecord(folder, {"rank": 4, "loss": "kl"} | identity).begin(resume, Logger())


def test_an_unfinished_fit_is_resumed_and_its_run_is_known(tmp_path: Path) -> None:
    assert begin(tmp_path / "fit") is None  # makes the folder
    folder = tmp_path / "fit"
    assert interrupted_run(folder) is None  # no step was taken
    (folder / "last.ckpt").write_bytes(b"weights")
    assert interrupted_run(folder) == "run-7"
    assert begin(folder) == folder / "last.ckpt"
    FitRecord(folder, {"rank": 4, "loss": "kl"}).end()
    record = json.loads((folder / "fit.json").read_text())
    assert record == {"finished": True, "run": "run-7", "fit": {"rank": 4, "loss": "kl"}}
    assert interrupted_run(folder) is None and begin(folder) is None


def test_other_settings_clear_the_folder_and_are_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(tmp_path)
    names = ("best.ckpt", "last.ckpt", "last.ckpt.tmp", "fit.json.tmp.host.1")
    for name in names:
        (tmp_path / name).write_bytes(b"old")
    (tmp_path / "notes.txt").write_text("mine")
    assert begin(tmp_path, loss="bce", patience=3) is None
    assert "loss was 'kl', is 'bce'; patience was None, is 3" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"fit.json", "notes.txt"}


@pytest.mark.parametrize("content", ["", "null", "[]", "3", '{"fit": {}}', "{" * 9])
def test_a_damaged_record_starts_from_the_beginning(tmp_path: Path, content: str) -> None:
    begin(tmp_path)
    (tmp_path / "last.ckpt").write_bytes(b"weights")
    (tmp_path / "fit.json").write_text(content)
    assert interrupted_run(tmp_path) is None
    assert begin(tmp_path) is None


def test_files_are_replaced_durably(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced: list[str] = []
    monkeypatch.setattr(checkpoints, "replace_file", lambda written, path: replaced.append(path.name))

    class Trainer:
        is_global_zero = True

        class strategy:  # noqa: N801
            barrier = staticmethod(lambda: None)

        def save_checkpoint(self, path: Path) -> None:
            replaced.append(path.name)

    keeper = checkpoints.CheckpointKeeper(tmp_path, checkpoints.EarlyStopping("val/mass"))
    keeper._save(Trainer(), "best.ckpt")  # type: ignore[arg-type]
    assert replaced == ["best.ckpt.tmp", "best.ckpt"]
