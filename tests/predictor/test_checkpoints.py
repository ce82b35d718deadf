"""The record of a fit: when it can be resumed, and what a damaged or foreign file does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from predictor import checkpoints
from predictor.checkpoints import FitRecord, interrupted_run
from predictor.errors import FitError


class Logger:
    version = "run-7"


def begin(folder: Path, resume: bool = True, **identity: Any) -> Path | None:
    return FitRecord(folder, {"rank": 4, "loss": "kl"} | identity).begin(resume, Logger())


def write_last(folder: Path, score: float = float("-inf")) -> None:
    torch.save({"callbacks": {"_Keeper": {"score": score, "epochs": 1}}}, folder / "last.ckpt")


def test_an_unfinished_fit_is_resumed_and_its_run_is_known(tmp_path: Path) -> None:
    assert begin(tmp_path / "fit") is None  # makes the folder
    folder = tmp_path / "fit"
    assert interrupted_run(folder) is None  # no step was taken
    write_last(folder)
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
    assert "loss was 'kl', is 'bce'; patience was None, is 3" in " ".join(capsys.readouterr().out.split())
    assert {path.name for path in tmp_path.iterdir()} == {"fit.json", "notes.txt"}


@pytest.mark.parametrize("name", ["last.ckpt", "best.ckpt"])
@pytest.mark.parametrize("damage", ["noise", "cut", "empty", "gone"])
def test_a_damaged_checkpoint_starts_from_the_beginning(
    tmp_path: Path, name: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(tmp_path)
    write_last(tmp_path, score=0.5)
    torch.save({"state_dict": {"weight": torch.ones(3)}}, tmp_path / "best.ckpt")
    assert FitRecord(tmp_path, {"rank": 4, "loss": "kl"}).begin(True, Logger()) == tmp_path / "last.ckpt"
    content = (tmp_path / name).read_bytes()
    changed = {"noise": b"\x80\x02weights", "cut": content[:-30], "empty": b""}
    if damage == "gone":
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(changed[damage])
    capsys.readouterr()
    assert begin(tmp_path) is None
    said = " ".join(capsys.readouterr().out.split())
    assert (f"{name} can't be read" in said) == (damage != "gone" or name == "best.ckpt")
    assert {path.name for path in tmp_path.iterdir()} == {"fit.json"}


def test_a_folder_in_the_way_of_a_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "best.ckpt").mkdir()
    with pytest.raises(FitError, match=r"best\.ckpt is in the way"):
        begin(tmp_path)


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
