"""The fit: a Lightning Trainer that can be stopped at any moment and resumed with the same result, bit for bit.

`predictor.checkpoints` says what is kept in its folder, docs/fit.md is the guide.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.plugins.environments import LightningEnvironment  # pyright: ignore[reportPrivateImportUsage]
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch.multiprocessing.spawn import ProcessRaisedException

from predictor.bar import FitBar
from predictor.checkpoints import (
    BEST,
    LAST,
    MONITOR,
    CheckpointKeeper,
    FitRecord,
    in_main_thread,
    log_line,
    saved_state,
)
from predictor.errors import FitError, Preempted
from predictor.memory import freed_memory_kept
from predictor.module import SourceModule, load_module
from predictor.settings import FitSettings

_SOURCE_SETTINGS = ("num_sources", "source_fraction", "exclude_border", "connectivity", "suppress_claimed")
"""Of SCRConfig: what decides which patches are sources. The data's identity covers the rest, as far as it matters."""
_OPTIMISER_SETTINGS = ("learning_rate", "weight_decay", "warmup_fraction")
"""Of FitSettings: what the module reads; the Trainer reads the others."""
_SPEED_SETTINGS = {"accelerator", "devices", "resume"}
"""Of FitSettings: what the result does not depend on."""


@dataclass(frozen=True)
class Fitted:
    """A finished fit.

    Attributes:
        module: The best epoch's, on the CPU, in evaluation mode.
        score: Its `val/mass`.
        epochs: Epochs in all, those before an interruption included.
    """

    module: SourceModule
    score: float
    epochs: int


def fit(
    module: SourceModule,
    data: Any,
    folder: Path,
    settings: FitSettings,
    *,
    logger: Any,
    callbacks: Sequence[pl.Callback] = (),
) -> Fitted:
    """Fits a module, and returns it as it was in the epoch of largest `val/mass`.

    With several devices, this process starts one process for each (they import the main module again, so an entry
    point needs its `if __name__ == "__main__":`); module, logger and callbacks have to survive pickling. Batches are
    split among them, so that devices change the speed alone.

    Args:
        module: With its statistics (`compute_statistics`), and with the settings of its optimiser.
        data: Lightning data module with train and validation batches; its `identity` names everything that determines
            them, its `count(split)` says how many maps there are.
        folder: Where checkpoints go; made if need be. Those of a fit of other settings in it are replaced.
        settings: How to fit. With `resume`, an unfinished fit in the folder is resumed, and a finished one returned,
            if it had the same settings, data and initial weights; otherwise the differences are logged and the fit
            starts from the beginning.
        logger: Lightning's logger, or False.
        callbacks: Further Lightning callbacks.

    Raises:
        Preempted: SIGTERM came.
        KeyboardInterrupt: Ctrl-C; the last whole epoch is in `last.ckpt`.
        FitError: A split is empty, or the fit diverged in every epoch.
    """
    for split, key in (("train", "harvest.samples"), ("validation", "harvest.validation")):
        if not data.count(split):
            raise FitError(f"the {split} split has no maps: harvest more images (see {key})")
    precision = choose_precision(settings.accelerator) if settings.precision == "auto" else settings.precision
    record = FitRecord(folder, _identity(module, data, settings, precision))
    if settings.resume and record.is_finished():
        log_line(f"the finished fit in {folder} has these settings, data and initial weights: it is not fitted again")
        return _fitted(folder)
    last = record.begin(settings.resume, logger)
    stopping = EarlyStopping(MONITOR, mode="max", patience=settings.patience)
    keeper = CheckpointKeeper(folder, stopping)
    trainer = pl.Trainer(
        accelerator=settings.accelerator,
        devices=settings.devices,
        # spawned, not launched as commands: the caller's work before the fit is not done once per process
        strategy="ddp_spawn" if settings.devices > 1 else "auto",
        use_distributed_sampler=False,  # the data module divides the batches
        plugins=[LightningEnvironment()],  # under Slurm too: its signals and restarts are handled here
        default_root_dir=folder,
        max_epochs=settings.max_epochs,
        gradient_clip_val=settings.gradient_clip,
        precision=precision,
        deterministic=True,
        logger=logger,
        callbacks=[*callbacks, FitBar(), stopping, keeper],
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )
    with _sigterm_handled(keeper.ask_to_stop, trainer), freed_memory_kept(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*your dataloader is not resumable.*")  # the data module knows the place
        _run(trainer, module, data, last)
    fitted = _fitted(folder)
    record.end()
    return fitted


def _fitted(folder: Path) -> Fitted:
    kept = saved_state(folder)  # from the file: with several devices, spawned processes counted the epochs
    if kept["score"] == float("-inf"):
        raise FitError(
            "the fit diverged: scores or val/mass are inf or nan in every epoch; lower trainer.learning_rate"
        )
    return Fitted(load_module(folder / BEST), kept["score"], kept["epochs"])


def choose_precision(accelerator: str) -> Literal["bf16-mixed", "32-true"]:
    """Takes bf16-mixed where a fit would run on a processor with products of bfloat16, else 32-true; logs which."""
    if accelerator in ("auto", "gpu") and torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        abilities = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 has no such function
        native = accelerator != "mps" and any(abilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    precision = "bf16-mixed" if native else "32-true"
    log_line(
        f"trainer.precision=auto: {precision}, this processor has {'' if native else 'no '}native bfloat16 products"
    )
    return precision


def _run(trainer: pl.Trainer, module: SourceModule, data: Any, last: Path | None) -> None:
    """Runs the Trainer, and raises Preempted or KeyboardInterrupt for the ways in which Lightning reports these."""
    folder = Path(trainer.default_root_dir)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=last, weights_only=None if last is None else True)
    except SIGTERMException as exception:  # before the first step
        raise Preempted(f"SIGTERM, before a step was taken; what {folder} had is kept") from exception
    except SystemExit as exception:  # Lightning's way to end after Ctrl-C
        raise KeyboardInterrupt from exception
    except ProcessRaisedException as exception:  # of a spawned process
        if Preempted.__name__ not in str(exception):
            raise
        raise Preempted(f"SIGTERM: the fit is kept in {folder / LAST}") from exception


def _identity(module: SourceModule, data: Any, settings: FitSettings, precision: str) -> dict[str, Any]:
    """What determines the fitted weights, as JSON keeps it. The seed is in the initial weights and in the data's."""
    weights = hashlib.sha256()
    for parameter in module.parameters():
        weights.update(parameter.detach().cpu().numpy().tobytes())
    saved = module.hyper_parameters
    trainer = {key: getattr(settings, key) for key in saved["settings"].keys() - _SPEED_SETTINGS}
    identity = {
        **saved["network"],
        **{key: saved["scr"][key] for key in _SOURCE_SETTINGS},
        "loss": saved["loss"],
        **trainer,
        **{key: saved["settings"][key] for key in _OPTIMISER_SETTINGS},
        "precision": precision,
        **{f"data.{name}": value for name, value in data.identity.items()},
        "initial_weights": weights.hexdigest(),
    }
    return json.loads(json.dumps(identity, default=str, sort_keys=True))


@contextlib.contextmanager
def _sigterm_handled(ask_to_stop: Callable[[], None], trainer: pl.Trainer) -> Iterator[None]:
    """SIGTERM asks this process's fit to end, or those of the processes that were started for it."""

    def handler(*_: Any) -> None:
        ask_to_stop()
        for process in getattr(trainer.strategy.launcher, "procs", []):
            if process.is_alive() and process.pid != os.getpid():
                os.kill(process.pid, signal.SIGTERM)

    if not in_main_thread():  # only there may a handler be set; Lightning then sets none either
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
