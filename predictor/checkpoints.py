"""The folder of a fit: its checkpoints, and the record that says whose they are.

    folder/best.ckpt    the epoch of largest val/mass so far
    folder/last.ckpt    where to resume: weights, optimiser, schedule, patience, and the place in the epoch
    folder/fit.json     the settings and data of the fit, and whether it is finished

Each is written under another name, synced and renamed: after a kill at any moment the old one or the new one is there.
"""

from __future__ import annotations

import json
import logging
import math
import signal
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint, EarlyStopping
from tqdm.auto import tqdm

from predictor.errors import FitError, Preempted
from predictor.memory import keep_freed_memory
from scr_runtime.files import replace_file, write_file
from scr_runtime.terminal import filled

MONITOR = "val/mass"
BEST, LAST, RECORD = "best.ckpt", "last.ckpt", "fit.json"
_STATE_KEY = "_Keeper"
_LIGHTNING = logging.getLogger("pytorch_lightning")


class CheckpointKeeper(Checkpoint):
    """Writes `best.ckpt` and `last.ckpt` at the end of each epoch, and `last.ckpt` when SIGTERM has come.

    Lightning runs checkpoint callbacks after all others, so that what they save holds the others' state of the epoch.

    Args:
        folder: Where the checkpoints go.
        stopping: The fit's early stopping.
    """

    def __init__(self, folder: Path, stopping: EarlyStopping) -> None:
        self.score = float("-inf")
        self.epochs = 0
        self._folder = folder
        self._stopping = stopping
        self._asked_to_stop = False
        self._quiet = _LIGHTNING.getEffectiveLevel(), list(warnings.filters)

    @property
    def state_key(self) -> str:
        """Where checkpoints hold this object's state: the name of its class in former versions."""
        return _STATE_KEY

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.world_size > 1:  # a spawned process, which should be as quiet as the one that started it
            level, warnings.filters = self._quiet
            _LIGHTNING.setLevel(level)
            keep_freed_memory(True)

    def ask_to_stop(self) -> None:
        """Ends the fit after the step (or the validation) that is running."""
        self._asked_to_stop = True

    def state_dict(self) -> dict[str, Any]:
        return {"score": self.score, "epochs": self.epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.score, self.epochs = state_dict["score"], state_dict["epochs"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if in_main_thread():  # Lightning's own handler talks to other processes out of turn
            signal.signal(signal.SIGTERM, lambda *_: self.ask_to_stop())
        if self._stopping.wait_count >= self._stopping.patience:
            trainer.should_stop = True  # killed after its last epoch

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx + 1 < trainer.num_training_batches and self._should_stop(trainer):
            self._stop(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        score = float(trainer.callback_metrics[MONITOR])
        self.epochs = trainer.current_epoch + 1
        diverged = not math.isfinite(trainer.callback_metrics["val/loss"])  # scores of nan have some mass, by chance
        if score > self.score and not diverged:
            self.score = score
            self._save(trainer, BEST)
        if self._should_stop(trainer):
            self._stop(trainer)
        self._save(trainer, LAST)

    def _should_stop(self, trainer: pl.Trainer) -> bool:
        asked = self._asked_to_stop
        return asked if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(asked, False)

    def _stop(self, trainer: pl.Trainer) -> None:
        self._save(trainer, LAST)
        raise Preempted(f"SIGTERM in epoch {trainer.current_epoch}: the fit is kept in {self._folder / LAST}")

    def _save(self, trainer: pl.Trainer, name: str) -> None:
        written = self._folder / f"{name}.tmp"  # one name for all processes; the next save replaces what a kill left
        trainer.save_checkpoint(written)  # called by every process, written by the first
        if trainer.is_global_zero:
            replace_file(written, self._folder / name)
        trainer.strategy.barrier()


class FitRecord:
    """`fit.json`: what a folder's checkpoints were fitted with, and whether that fit is finished.

    Args:
        folder: Of the checkpoints.
        identity: Everything that determines the fitted weights, as JSON holds it.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self._folder = folder
        self._identity = dict(identity)

    def is_finished(self) -> bool:
        """Whether the folder holds a finished fit of this very identity, with readable checkpoints."""
        earlier = _read_record(self._folder)
        finished = bool(earlier and earlier["finished"] and earlier["fit"] == self._identity)
        return finished and _can_resume(self._folder)

    def begin(self, resume: bool, logger: Any) -> Path | None:
        """Clears the folder, or returns the checkpoint to resume from."""
        earlier = _read_record(self._folder)
        last = self._folder / LAST
        if earlier and not earlier["finished"] and resume and last.is_file():
            differences = self._differences(earlier["fit"])
            if differences:
                log_line(
                    f"the interrupted fit in {self._folder} had other settings, so this one starts from the "
                    f"beginning: {'; '.join(differences)}"
                )
            elif _can_resume(self._folder):
                log_line(f"resumes from {last}")
                return last
        self._folder.mkdir(parents=True, exist_ok=True)
        for file in (self._folder / BEST, last, *self._folder.glob("*.tmp*")):
            try:
                file.unlink(missing_ok=True)
            except OSError as error:
                raise FitError(f"{file} is in the way of a checkpoint ({error.strerror}): remove it") from error
        self._write(finished=False, run=getattr(logger, "version", None))
        return None

    def end(self) -> None:
        """Marks the fit as finished."""
        self._write(finished=True, run=(_read_record(self._folder) or {}).get("run"))

    def _differences(self, earlier: Mapping[str, Any]) -> list[str]:
        now, earlier = self._identity, earlier if isinstance(earlier, dict) else {}
        keys = sorted(key for key in {*earlier, *now} if earlier.get(key) != now.get(key))
        return [f"{key} was {earlier.get(key)!r}, is {now.get(key)!r}" for key in keys]

    def _write(self, finished: bool, run: Any) -> None:
        record = {"finished": finished, "run": run, "fit": self._identity}
        write_file(self._folder / RECORD, json.dumps(record, indent=1, default=str).encode())


def interrupted_run(folder: Path) -> str | None:
    """The logger's version (MLflow's run id) of the fit in a folder, if that is unfinished and can be resumed."""
    record = _read_record(folder)
    return record["run"] if record and not record["finished"] and (folder / LAST).is_file() else None


def saved_state(folder: Path) -> dict[str, Any]:
    """The keeper's part of `last.ckpt`: score of the best epoch, number of epochs."""
    return torch.load(folder / LAST, map_location="cpu", weights_only=True)["callbacks"][_STATE_KEY]


def _can_resume(folder: Path) -> bool:
    """Whether `last.ckpt` is readable, and `best.ckpt` too if an epoch has ended; logs why not."""
    file = folder / LAST
    if not file.is_file():
        return False
    try:
        state = saved_state(folder)
        if state["score"] > float("-inf"):
            file = folder / BEST
            if not file.is_file():
                raise FileNotFoundError
            torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle and zipfile each raise errors of their own for damaged bytes
        log_line(f"{file} can't be read ({type(error).__name__}), so the fit starts from the beginning")
        return False
    return True


def in_main_thread() -> bool:
    """Whether signal handlers can be set here."""
    return threading.current_thread() is threading.main_thread()


def log_line(message: str) -> None:
    """Prints a line about the fit, above a progress bar."""
    tqdm.write(filled(f"fit: {message}", rest="  "))


def _read_record(folder: Path) -> dict[str, Any] | None:
    file = folder / RECORD
    try:
        record = json.loads(file.read_text()) if file.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and {"fit", "finished", "run"} <= set(record) else None
