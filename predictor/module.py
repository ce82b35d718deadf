"""The LightningModule that fits a `SourcePredictor` to two-pass attention maps, and its checkpoints."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from predictor.batch import Batch, progress, rule_of
from predictor.errors import CheckpointMissingError, FitError
from predictor.losses import LOSSES
from predictor.metrics import METRICS, SourceMetrics
from predictor.settings import FitSettings, LossName
from scr_runtime.config import PredictorConfig, SCRConfig
from scr_runtime.network import SourcePredictor
from scr_runtime.redistribute import Grid
from scr_runtime.rule import SourceRule


class SourceModule(pl.LightningModule):
    """Trains and validates one predictor, on batches as `predictor.batch.Batch` describes them.

    Logged, once an epoch: `train/loss`; `val/loss` and `val/<metric>`, for every name in `predictor.metrics.METRICS`.
    Choose checkpoints by the largest `val/mass`.

    Call `compute_statistics` once before `Trainer.fit`.

    Args:
        network: Sizes and features of the predictor.
        scr: How sources are chosen.
        settings: Of the optimiser: learning rate, warm-up and weight decay (on matrices only: no biases, no gains).
        loss: One of `predictor.losses.LOSSES`.

    Raises:
        ValueError: Unknown loss.
    """

    has_statistics: Tensor

    def __init__(
        self,
        network: PredictorConfig,
        scr: SCRConfig = SCRConfig(),
        settings: FitSettings = FitSettings(),
        loss: LossName = "kl",
    ) -> None:
        super().__init__()
        if loss not in LOSSES:
            close = get_close_matches(str(loss), LOSSES, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"loss is {loss!r}; legal: {', '.join(LOSSES)}.{hint}")
        self.predictor = SourcePredictor(network)
        self.register_buffer("has_statistics", torch.tensor(False))
        self.scr = scr
        self.settings = settings
        self.loss: LossName = loss
        self.val_metrics = SourceMetrics()
        self._train_loss = torch.zeros(2)  # of the epoch: sum over rows, rows

    @property
    def hyper_parameters(self) -> dict[str, Any]:
        """What `load_module` makes this module from again, as plain nested dicts."""
        return {
            "network": self.predictor.config.to_dict(),
            "scr": self.scr.to_dict(),
            "settings": {name: getattr(self.settings, name) for name in FitSettings.model_fields},
            "loss": self.loss,
        }

    def forward(self, states: Tensor, grid: Grid, question: Tensor | None = None) -> Tensor:
        """Scores patches: states [B, N, d] -> [B, N] float32."""
        return self.predictor(states, grid, question)

    @torch.inference_mode()
    def score(self, batch: Batch) -> Tensor:
        """Scores a batch outside a Trainer, [B, N]; the scores lie where the batch does."""
        home, device = batch["states"].device, self.device
        scores = self(batch["states"].to(device), batch["grid"], batch["question"].to(device))
        return scores.to(home)

    @torch.inference_mode()
    def spread(self, batch: Batch) -> Tensor:
        """Measures how far each row's features reach, [B]: what the drift guard is fitted on."""
        states, question = batch["states"].to(self.device), batch["question"].to(self.device)
        return self.predictor.score_and_spread(states, batch["grid"], question)[1].to(batch["states"].device)

    def compute_statistics(self, dataloader: Iterable[Batch]) -> None:
        """Measures each feature's mean and standard deviation over the training set and stores them.

        States (over all patches) and questions have their own. They become buffers of the predictor: part of
        every checkpoint and of the exported folder.

        Args:
            dataloader: The training set, read once. Prompts of one image each count its states.

        Raises:
            FitError: The set is empty, or a value is not finite.
        """
        size = self.predictor.config.hidden_size
        states, questions = Moments(size), Moments(size)
        for batch in progress(dataloader, "feature statistics"):
            for part in batch["states"].split(16):  # [16, N, d]: bounds the float32 copy
                states.add(part.flatten(0, 1))
            questions.add(batch["question"])
        if not states.count:
            raise FitError("compute_statistics got an empty training set: harvest more images (see harvest.samples)")
        self.predictor.set_statistics(*states.mean_and_std(), *questions.mean_and_std())
        self.has_statistics.fill_(True)

    def on_fit_start(self) -> None:
        """Rejects a fit to raw features."""
        if not self.has_statistics:
            raise RuntimeError("call module.compute_statistics(train_dataloader) once before Trainer.fit.")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the loss of a batch."""
        loss, scores, _ = self._loss_and_scores(batch)
        weight = batch.get("weight", 1.0)
        rows = len(scores) * (weight > 0)
        self._train_loss = self._train_loss.to(loss.device) + torch.stack(
            [loss.detach() * rows, loss.new_tensor(rows)]
        )
        return loss * weight

    def on_train_epoch_end(self) -> None:
        """Logs the mean loss over the epoch's rows, of all processes, and from before an interruption."""
        total, rows = self._over_processes(self._train_loss)
        self.log("train/loss", total / rows, sync_dist=True)  # the same number in every process
        self._train_loss = torch.zeros(2)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the hyper-parameters, and the loss of the epoch that is running."""
        checkpoint["hyper_parameters"] = self.hyper_parameters
        checkpoint["train_loss"] = self._over_processes(self._train_loss)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the loss of the epoch that was running."""
        if "train_loss" in checkpoint and self.global_rank == 0:
            self._train_loss = checkpoint["train_loss"]

    def _over_processes(self, values: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(values.to(self.device, copy=True), reduce_op="sum")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Collects loss and metrics."""
        loss, scores, rule = self._loss_and_scores(batch)
        self.val_metrics.update(scores, batch["attention"], rule)
        self.log("val/loss", loss, on_epoch=True, batch_size=len(scores), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Logs the means of the epoch."""
        values = self.val_metrics.compute()  # the same on every DDP rank: averaging over ranks changes nothing
        self.log_dict({f"val/{name}": values[name] for name in METRICS}, sync_dist=True)
        self.val_metrics.reset()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Builds AdamW; linear warm-up, then a cosine to zero, by step."""
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ValueError("the cosine schedule needs an end: set trainer.max_epochs or max_steps.")
        weights = [p for p in self.predictor.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in weights if p.ndim >= 2], "weight_decay": self.settings.weight_decay},
            {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.settings.learning_rate)
        total, warmup = int(steps), round(self.settings.warmup_fraction * steps)
        scheduler = LambdaLR(optimizer, lambda step: rate_factor(step, warmup, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _loss_and_scores(self, batch: Batch) -> tuple[Tensor, Tensor, SourceRule]:
        """Scalar loss, scores [B, N], and how sources are chosen on the batch's grid."""
        rule = rule_of(batch, self.scr)
        scores = self(batch["states"], rule.grid, batch["question"])
        return LOSSES[self.loss](scores, batch["attention"], rule), scores, rule


def load_module(path: str | Path) -> SourceModule:
    """Reads a module from a checkpoint, onto the CPU and in evaluation mode.

    Checkpoints of former versions, whose hyper-parameters are flat, are read too.

    Args:
        path: A checkpoint that a Trainer wrote.

    Raises:
        CheckpointMissingError: There is none.
        FitError: It can't be read.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointMissingError(f"no checkpoint at {path}: run train.py first")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        saved = _nested(checkpoint["hyper_parameters"])
        module = SourceModule(
            PredictorConfig.from_dict(saved["network"]),
            SCRConfig.from_dict(saved["scr"]),
            FitSettings(**saved["settings"]),
            saved["loss"],
        )
        module.load_state_dict(checkpoint["state_dict"])
    except Exception as error:  # torch, pickle and zipfile each raise errors of their own for damaged bytes
        raise FitError(f"{path} is no checkpoint that this version reads: {error}\nRun train.py again.") from error
    return module.eval()


def _nested(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """Hyper-parameters by the object they belong to; former versions saved all of them side by side."""
    if "network" in saved:
        return saved
    names = {
        "network": [field.name for field in dataclasses.fields(PredictorConfig)],
        "scr": [field.name for field in dataclasses.fields(SCRConfig)],
        "settings": list(FitSettings.model_fields),
    }
    parts = {part: {name: saved[name] for name in own if name in saved} for part, own in names.items()}
    return {**parts, "loss": saved["loss"]}


class Moments:
    """Running mean and variance of each feature: float32 within a chunk, float64 across chunks.

    Chunks are merged as in Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing
    sample variances", COMPSTAT 1982; naive sums of squares would lose the variance of features with a large
    mean.
    """

    def __init__(self, size: int) -> None:
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64)
        self.squares = torch.zeros(size, dtype=torch.float64)

    @torch.no_grad()
    def add(self, values: Tensor) -> None:
        """Adds rows [R, d] of any float dtype."""
        new = len(values)
        variance, mean = (x.cpu().double() for x in torch.var_mean(values.float(), dim=0, correction=0))
        delta = mean - self.mean
        total = self.count + new
        self.squares += variance * new + delta.square() * (self.count * new / total)
        self.mean += delta * (new / total)
        self.count = total

    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        """Returns mean and population standard deviation, [d] float32 each.

        Raises:
            FitError: A value was not finite.
        """
        if not (self.mean.isfinite().all() and self.squares.isfinite().all()):
            raise FitError(
                "the training states or questions hold inf or nan. float16 ends at 65504, and some decoders "
                "have larger activations: harvest again with harvest.states_dtype=bfloat16"
            )
        return self.mean.float(), (self.squares / self.count).sqrt().float()


def rate_factor(step: int, warmup: int, total: int) -> float:
    """Factor of the learning rate: linear over `warmup` steps, then a half cosine to 0 at step `total`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min((step - warmup) / max(total - warmup, 1), 1.0)
    return 0.5 * (1 + math.cos(math.pi * done))
