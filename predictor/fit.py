"""The fit itself: a Lightning Trainer that can be stopped at any moment and goes on as if it never had been.

    folder/best.ckpt    the epoch of largest val/mass so far
    folder/last.ckpt    where to go on: weights, optimiser, schedule, patience, and the place in the epoch
    folder/fit.json     what is fitted to what, and whether it has come to its end

Checkpoints are written beside their name, synced and renamed: a kill at any moment leaves the old one or the new one.
docs/fit.md is the guide.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint, EarlyStopping
from pytorch_lightning.plugins.environments import LightningEnvironment  # pyright: ignore[reportPrivateImportUsage]
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch.multiprocessing.spawn import ProcessRaisedException
from tqdm.auto import tqdm

from predictor.module import SourceModule

MONITOR = "val/mass"
PRECISIONS = ("auto", "32-true", "bf16-mixed")
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_LOG = logging.getLogger("pytorch_lightning")


class Preempted(Exception):  # noqa: N818 - like KeyboardInterrupt, it is no error
    """SIGTERM came; `last.ckpt` is on the disk, and `fit(..., resume=True)` goes on from it."""


@dataclass(frozen=True)
class Fitted:
    """A fit that came to its end.

    Attributes:
        module: the best epoch's, on the CPU, in evaluation mode.
        best: its checkpoint.
        score: its `val/mass`.
        epochs: epochs in all, those before an interruption included.
        seconds: wall time of this call.
    """

    module: SourceModule
    best: Path
    score: float
    epochs: int
    seconds: float


def fit(
    module: SourceModule,
    data: pl.LightningDataModule,
    folder: Path,
    *,
    logger: Any,
    max_epochs: int,
    patience: int,
    gradient_clip: float | None,
    accelerator: str = "auto",
    devices: int = 1,
    precision: str = "32-true",
    resume: bool = False,
    callbacks: Sequence[pl.Callback] = (),
) -> Fitted:
    """Fits a module, and returns it as it was in the epoch of largest `val/mass`.

    With several devices, this process starts one process for each (they import the main module anew, so an entry
    point needs its `if __name__ == "__main__":`); module, logger and callbacks have to survive pickling.

    Args:
        module: with its statistics (`compute_statistics`).
        data: train and validation batches; its `identity` names everything that determines them.
        folder: where checkpoints go; made if need be. Those of an earlier fit in it are replaced.
        logger: Lightning's logger, or False.
        max_epochs: epochs at most; the learning rate ends there.
        patience: epochs without a better score before the fit stops.
        gradient_clip: largest norm of the gradient; None never clips.
        accelerator: in Lightning's words: auto, cpu, gpu or mps.
        devices: processes, each with a device of its own. Batches are split among them, so that they change the speed
            alone.
        precision: "32-true"; "bf16-mixed": bfloat16 where torch's autocast allows it; "auto": the latter where the
            processor multiplies bfloat16 by itself.
        resume: go on from `last.ckpt`, if an earlier fit in the folder did not come to its end and had the same
            settings, data and initial weights; otherwise say why not, and start anew.
        callbacks: further Lightning callbacks.

    Raises:
        Preempted: SIGTERM came.
        KeyboardInterrupt: Ctrl-C; the last whole epoch is in `last.ckpt`.
        ValueError: unknown precision, or `val/mass` was never a number.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"trainer.precision={precision!r}: use {' or '.join(PRECISIONS)}")
    started = time.perf_counter()
    precision = choose_precision(accelerator) if precision == "auto" else precision
    record = _Record(folder, _identity(module, data, max_epochs, patience, gradient_clip, precision))
    last = record.begin(resume, logger)
    stopping = EarlyStopping(MONITOR, mode="max", patience=patience)
    keeper = _Keeper(folder, stopping)
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=devices,
        # spawned, not launched as commands: the caller's work before the fit is not done once per process
        strategy="ddp_spawn" if devices > 1 else "auto",
        use_distributed_sampler=False,  # batches are divided by the data module
        plugins=[LightningEnvironment()],  # under Slurm too: its signals and restarts are handled here
        default_root_dir=folder,
        max_epochs=max_epochs,
        gradient_clip_val=gradient_clip,
        precision=precision,  # type: ignore[arg-type]
        deterministic=True,
        logger=logger,
        callbacks=[*callbacks, stopping, keeper],
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )
    with _sigterm(keeper.ask, trainer), _memory_kept(), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", ".*your dataloader is not resumable.*"
        )  # the data module says where to go on
        try:
            trainer.fit(module, datamodule=data, ckpt_path=last, weights_only=None if last is None else True)
        except SIGTERMException as exception:  # before the first step
            raise Preempted(f"SIGTERM, before a step was taken; what {folder} had is kept") from exception
        except SystemExit as exception:  # Lightning's way to end after Ctrl-C
            raise KeyboardInterrupt from exception
        except ProcessRaisedException as exception:  # of a spawned process
            if Preempted.__name__ not in str(exception):
                raise
            raise Preempted(f"SIGTERM: the fit is kept in {folder / 'last.ckpt'}") from exception
    best = folder / "best.ckpt"
    if not best.exists():
        raise ValueError(f"{MONITOR} was not a number in any epoch: lower trainer.learning_rate")
    kept = torch.load(folder / "last.ckpt", map_location="cpu", weights_only=True)["callbacks"][keeper.state_key]
    record.end()
    fitted = type(module).load_from_checkpoint(best, map_location="cpu", weights_only=True).eval()
    return Fitted(fitted, best, kept["score"], kept["epochs"], time.perf_counter() - started)


def interrupted_run(folder: Path) -> str | None:
    """The logger's version (MLflow's run id) of the fit in a folder that did not come to its end, if it can go on."""
    record = _read_record(folder / "fit.json")
    return record["run"] if record and not record["finished"] and (folder / "last.ckpt").exists() else None


def choose_precision(accelerator: str) -> str:
    """Takes bf16-mixed where a fit would run on a processor with products of bfloat16, else 32-true; says which."""
    if accelerator in ("auto", "gpu") and torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        abilities = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 does not tell
        native = accelerator != "mps" and any(abilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    precision = "bf16-mixed" if native else "32-true"
    _say(f"trainer.precision=auto: {precision}, products of bfloat16 are {'native' if native else 'not known'} here")
    return precision


class _Keeper(Checkpoint):
    """Writes `best.ckpt` and `last.ckpt` at the end of each epoch, and `last.ckpt` when SIGTERM has come.

    Lightning runs checkpoint callbacks after all others, so that what they save holds the others' state of the epoch.
    """

    def __init__(self, folder: Path, stopping: EarlyStopping) -> None:
        self.score = float("-inf")
        self.epochs = 0
        self._folder = folder
        self._stopping = stopping
        self._asked = False
        self._quiet = _LOG.getEffectiveLevel(), list(warnings.filters)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.world_size > 1:  # a spawned process, which is to be as quiet as the one that started it
            level, warnings.filters = self._quiet
            _LOG.setLevel(level)
            keep_freed_memory(True)

    def ask(self) -> None:
        """Lets the fit end after the step (or the validation) that is running."""
        self._asked = True

    def state_dict(self) -> dict[str, Any]:
        return {"score": self.score, "epochs": self.epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.score, self.epochs = state_dict["score"], state_dict["epochs"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if _in_main_thread():  # Lightning's own handler talks to other processes out of turn
            signal.signal(signal.SIGTERM, lambda *_: self.ask())
        if self._stopping.wait_count >= self._stopping.patience:
            trainer.should_stop = True  # killed after its last epoch

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx + 1 < trainer.num_training_batches and self._is_asked(trainer):
            self._leave(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        score = float(trainer.callback_metrics[MONITOR])
        self.epochs = trainer.current_epoch + 1
        if score > self.score:
            self.score = score
            self._save(trainer, "best.ckpt")
        if self._is_asked(trainer):
            self._leave(trainer)
        self._save(trainer, "last.ckpt")

    def _is_asked(self, trainer: pl.Trainer) -> bool:
        return self._asked if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(self._asked, False)

    def _leave(self, trainer: pl.Trainer) -> None:
        self._save(trainer, "last.ckpt")
        raise Preempted(f"SIGTERM in epoch {trainer.current_epoch}: the fit is kept in {self._folder / 'last.ckpt'}")

    def _save(self, trainer: pl.Trainer, name: str) -> None:
        beside = self._folder / f"{name}.tmp"
        trainer.save_checkpoint(beside)  # on every process, and written by the first
        if trainer.is_global_zero:
            _rename_synced(beside, self._folder / name)
        trainer.strategy.barrier()


class _Record:
    """`fit.json`: what a folder's checkpoints belong to, and whether the fit came to its end."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self._folder = folder
        self._file = folder / "fit.json"
        self._now = dict(identity)

    def begin(self, resume: bool, logger: Any) -> Path | None:
        """Clears the folder, or returns the checkpoint to go on from."""
        earlier = _read_record(self._file)
        last = self._folder / "last.ckpt"
        if earlier and not earlier["finished"] and resume and last.exists():
            then = earlier["fit"]
            changed = sorted(key for key in {*then, *self._now} if then.get(key) != self._now.get(key))
            if not changed:
                _say(f"goes on from {last}")
                return last
            differences = "; ".join(f"{key} was {then.get(key)!r}, is {self._now.get(key)!r}" for key in changed)
            _say(f"the interrupted fit in {self._folder} had other settings, and this one starts anew: {differences}")
        self._folder.mkdir(parents=True, exist_ok=True)
        for name in ("best.ckpt", "last.ckpt", "best.ckpt.tmp", "last.ckpt.tmp"):
            (self._folder / name).unlink(missing_ok=True)
        self._write(finished=False, run=getattr(logger, "version", None))
        return None

    def end(self) -> None:
        """Marks the fit as finished."""
        self._write(finished=True, run=(_read_record(self._file) or {}).get("run"))

    def _write(self, finished: bool, run: Any) -> None:
        beside = self._file.with_name("fit.json.tmp")
        beside.write_text(json.dumps({"finished": finished, "run": run, "fit": self._now}, indent=1, default=str))
        _rename_synced(beside, self._file)


def _read_record(file: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(file.read_text())
        return record if {"fit", "finished", "run"} <= set(record) else None
    except (FileNotFoundError, ValueError):
        return None


def _identity(
    module: SourceModule,
    data: Any,
    max_epochs: int,
    patience: int,
    gradient_clip: float | None,
    precision: str,
) -> dict[str, Any]:
    """What determines the fitted weights, as JSON keeps it. The seed is in the initial weights and in the data's."""
    weights = hashlib.sha256()
    for parameter in module.parameters():
        weights.update(parameter.detach().cpu().numpy().tobytes())
    settings = {
        **module.hparams,
        **{f"data.{name}": value for name, value in data.identity.items()},
        "max_epochs": max_epochs,
        "patience": patience,
        "gradient_clip": gradient_clip,
        "precision": precision,
        "initial_weights": weights.hexdigest(),
    }
    return json.loads(json.dumps(settings, default=str))


@contextlib.contextmanager
def _sigterm(ask: Callable[[], None], trainer: pl.Trainer) -> Iterator[None]:
    """SIGTERM asks this process's fit to end, or those of the processes that were started for it."""

    def handler(*_: Any) -> None:
        ask()
        for process in getattr(trainer.strategy.launcher, "procs", []):
            if process.is_alive() and process.pid != os.getpid():
                os.kill(process.pid, signal.SIGTERM)

    if not _in_main_thread():  # only there may a handler be set; Lightning then sets none either
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def keep_freed_memory(keep: bool) -> None:
    """Says whether glibc's malloc keeps what is freed for the next request, however large, or hands it back.

    A step on the CPU frees some hundred MB and asks for them again. Handed back, their pages have to be made anew each
    time, which takes longer than what is calculated in them (docs/fit.md). Nothing happens with another malloc.
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt, malloc_trim = libc.mallopt, libc.malloc_trim
    except (OSError, TypeError, AttributeError):
        return
    mallopt(_M_MMAP_MAX, 0 if keep else 65_536)
    mallopt(_M_TRIM_THRESHOLD, -1 if keep else 128 * 1024)
    if not keep:
        malloc_trim(0)


@contextlib.contextmanager
def _memory_kept() -> Iterator[None]:
    keep_freed_memory(True)
    try:
        yield
    finally:
        keep_freed_memory(False)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _rename_synced(beside: Path, target: Path) -> None:
    with beside.open("rb") as stream:
        os.fsync(stream.fileno())
    os.replace(beside, target)


def _say(message: str) -> None:
    tqdm.write(f"fit: {message}")
