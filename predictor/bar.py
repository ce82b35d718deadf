"""The progress bar of a fit: one for all epochs, with the number that chooses among them."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from tqdm.auto import tqdm

_SHOWN = ("train/loss", "val/mass")
FORMAT = "{l_bar}{bar}| [{elapsed}<{remaining}{postfix}]"
"""Without counts of steps, so that a bar is left at 80 columns."""


class FitBar(pl.Callback):
    """Counts the steps of all epochs, and shows the newest train/loss and val/mass; silent where no terminal is."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None  # none before the fit: with several devices, this object is pickled

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            total = trainer.estimated_stepping_batches
            steps = int(total) if total != float("inf") else None
            self._bar = tqdm(total=steps, initial=trainer.global_step, desc="fit", disable=None, bar_format=FORMAT)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._show(trainer, trainer.current_epoch + 1)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._bar is not None:
            self._bar.update()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._show(trainer, trainer.current_epoch + 1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._show(trainer, trainer.current_epoch)
        if self._bar is not None:
            self._bar.total = self._bar.n  # a fit that stopped early has no further steps
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def _show(self, trainer: pl.Trainer, epoch: int) -> None:
        if self._bar is not None:
            self._bar.set_description(f"epoch {epoch}/{trainer.max_epochs}", refresh=False)
            known = trainer.callback_metrics
            self._bar.set_postfix({name: f"{float(known[name]):.3f}" for name in _SHOWN if name in known})

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
