"""Run folders: every run of the chain has one, and none is ever replaced.

    runs/fits/<model>/20261121-140531/    config.yaml run.json checkpoints/ predictor/ reports/
    runs/fits/<model>/latest              link to the newest complete run (a trial's, or other data's, moves no link)
    runs/predictors/<model>               link to its predictor: what a deployment names
    runs/reports/<model>                  link to its reports

`run.json` says how far a run came. An interrupted run is resumed in its folder by a command of the same settings; the
links move when a run is complete, and not before. A process locks the folder that it works in.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs import TrainConfig, digest, save_config
from data.errors import LockTimeoutError
from data.locks import exclusively
from evaluation.tables import paragraph
from export.package import keep_former
from pipeline.errors import RunError
from scr_runtime.errors import PredictorError
from scr_runtime.files import sync_folder, write_file

_RECORD = "run.json"


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run.

    Attributes:
        path: Where it lies.
    """

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Lightning checkpoints."""
        return self.path / "checkpoints"

    @property
    def predictor(self) -> Path:
        """The exported predictor."""
        return self.path / "predictor"

    @property
    def reports(self) -> Path:
        """Tables and figures."""
        return self.path / "reports"

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def record(self) -> dict[str, Any]:
        """What `run.json` says; empty if it can't be read."""
        try:
            record = json.loads((self.path / _RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return record if isinstance(record, dict) else {}

    @property
    def complete(self) -> bool:
        """Whether the run came to its end."""
        return self.record.get("complete") is True

    def note(self, **facts: Any) -> None:
        """Adds facts to `run.json`."""
        write_file(self.path / _RECORD, json.dumps({**self.record, **facts}, indent=1).encode())


@contextlib.contextmanager
def open_run(config: TrainConfig) -> Iterator[RunFolder]:
    """Locks the folder of an interrupted run of the same settings, or a new one, and writes the configuration into it.

    Raises:
        RunError: The variant's folder holds a complete run of other settings, or another process works in it.
    """
    identity = digest(*config.run_settings)
    with contextlib.ExitStack() as stack:
        folder = _variant(config, identity, stack) if config.variant else _unfinished(config, identity, stack)
        if folder is None:
            folder = RunFolder(new_folder(config.paths.fits))
            _locked(folder, stack)
        if folder.record.get("identity") != identity or not config.trainer.resume:
            write_file(folder.path / _RECORD, json.dumps({"identity": identity, "complete": False}).encode())
        folder.reports.mkdir(exist_ok=True)
        save_config(config, folder.config)
        yield folder


def finish_run(folder: RunFolder, config: TrainConfig) -> list[str]:
    """Marks a run as complete and moves the links of its model to it; a variant has none.

    Returns:
        What a user should know: whose predictor the link named before, that a trial or a run on other data left the
        links alone, and links that could not be moved, because something else lies there.
    """
    folder.note(complete=True, trial=config.trainer.trial, data=config.data.name)
    if config.variant:
        return []
    paths = config.paths
    runs = paths.fits.parents[1]
    former = paths.latest.resolve() if paths.latest.exists() else None
    kept = None if former is None else _keeps_links(RunFolder(former).record, config)
    if kept is not None:
        take = f"ln -sfn {folder.path.name} {paths.latest} gives it the link"
        return [f"{kept}: {paths.predictor} stays at {former}/predictor; this run's is {folder.predictor} ({take})"]
    _link(paths.latest, Path(folder.path.name))
    notes = []
    if former not in (None, folder.path.resolve()):
        back = f"ln -sfn {former.name} {paths.latest} gives it the link again"
        notes.append(
            f"{paths.predictor} is this run's now; that of the run before stays at {former / 'predictor'} ({back})"
        )
    for link, part in ((paths.predictor, "predictor"), (runs / "reports" / config.model.name, "reports")):
        if link.exists() and not link.is_symlink():
            notes.append(f"{link} was made by an earlier version and stays; this run's is {folder.path / part}")
        else:
            _link(link, Path(os.path.relpath(paths.latest / part, link.parent)))
    return notes


def latest_run(config: TrainConfig) -> RunFolder:
    """The newest complete run of a model, or the variant's folder.

    Raises:
        RunError: There is none.
    """
    folder = config.paths.latest
    if not folder.exists():
        raise RunError(f"no complete run at {folder}: run train.py first")
    return RunFolder(folder.resolve())


def named_folders(places: Sequence[str], taken: Sequence[str]) -> dict[str, Path]:
    """Predictor folders by the names of their rows in a comparison.

    Args:
        places: The folders.
        taken: Names that other predictors have; if there are none, the first folder's is "".

    Raises:
        PredictorError: One is no folder.
    """
    found: dict[str, Path] = {}
    for text in places:
        folder = Path(text).expanduser()
        if not folder.is_dir():
            raise PredictorError(f"evaluation.predictors: {folder} is no folder; name folders that train.py exported")
        name = folder.resolve().name
        name = folder.resolve().parent.name if name == "predictor" else name
        if not (found or taken):
            name = ""
        while name in found or name in taken:
            name += "+"
        found[name] = folder
    return found


def _keeps_links(former: Mapping[str, Any], config: TrainConfig) -> str | None:
    """Why the run that a model's links name keeps them; ``None`` if it doesn't."""
    if former.get("trial"):
        return None
    if config.trainer.trial:
        return "a trial"
    data = former.get("data", config.data.name)
    return None if data == config.data.name else f"data={config.data.name}, and the run before data={data}"


def _variant(config: TrainConfig, identity: str, stack: contextlib.ExitStack) -> RunFolder:
    folder = RunFolder(config.paths.latest)
    folder.path.mkdir(parents=True, exist_ok=True)
    if not _locked(folder, stack):
        raise RunError(f"another process works in {folder.path}: wait for it, or choose another variant")
    record = folder.record
    if record.get("complete") and record.get("identity") != identity:
        if not config.overwrite:
            raise RunError(
                f"{folder.path} holds a complete run of other settings (see its config.yaml): choose another variant, "
                "or add overwrite=true"
            )
        former = keep_former(folder.predictor)
        print(paragraph(f"overwrite=true: the former predictor is kept in {former}" if former else "overwrite=true"))
    return folder


def _unfinished(config: TrainConfig, identity: str, stack: contextlib.ExitStack) -> RunFolder | None:
    """The newest interrupted run of the same settings that no process works in."""
    if not config.trainer.resume or not config.paths.fits.is_dir():
        return None
    names = sorted((path for path in config.paths.fits.iterdir() if not path.is_symlink()), reverse=True)
    for folder in map(RunFolder, names):
        record = folder.record
        if record.get("identity") == identity and record.get("complete") is False and _locked(folder, stack):
            print(paragraph(f"resumes the interrupted run in {folder.path}"))
            return folder
    return None


def new_folder(parent: Path) -> Path:
    """Makes a folder that is named after the time, and after a number where that name is taken."""
    parent.mkdir(parents=True, exist_ok=True)
    start = time.strftime("%Y%m%d-%H%M%S")
    for number in itertools.count(1):
        folder = parent / (start if number == 1 else f"{start}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError


def _locked(folder: RunFolder, stack: contextlib.ExitStack) -> bool:
    """Locks a folder for as long as the stack lives; False if another process has it."""
    try:
        stack.enter_context(exclusively(folder.path / "run.lock", 0.0, "working in this run folder"))
    except LockTimeoutError as error:
        return isinstance(error.__cause__, OSError)  # a file system without locks
    return True


def _link(link: Path, target: Path) -> None:
    """Points a symbolic link at another place, in one step."""
    link.parent.mkdir(parents=True, exist_ok=True)
    beside = link.with_name(f".{link.name}.{os.getpid()}")
    beside.unlink(missing_ok=True)
    beside.symlink_to(target)
    os.replace(beside, link)
    sync_folder(link.parent)
