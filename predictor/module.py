"""The LightningModule that fits a `SourcePredictor` to two-pass attention maps."""

import math
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm

from predictor.losses import LOSSES
from predictor.metrics import METRICS, SourceMetrics
from scr_runtime.config import SCRConfig
from scr_runtime.network import PredictorConfig, SourcePredictor
from scr_runtime.redistribute import Grid, claims_of, effective_num_sources, eligible_patches

Batch = Mapping[str, Any]


class SourceModule(pl.LightningModule):
    """Trains, validates and tests one predictor.

    A batch is `{"states": [B, N, d] 16 or 32 bit, "attention": [B, N] float32, "question": [B, d],
    "grid": (rows, columns), "key": [B] str}`, one row for each (image, prompt). Rows of one batch share a
    grid. `"weight"`, if it is there, is what the batch's loss counts (among several processes, 1 on average).

    Logged, once an epoch: `train/loss`; `val/loss` and `val/<metric>`; `test/loss` and `test/<metric>`, for
    every name in `predictor.metrics.METRICS`. Choose checkpoints by the largest `val/mass`.

    Call `compute_statistics` once before `Trainer.fit`. After `Trainer.test`, `test_rows` has the metrics of
    each row.
    """

    has_statistics: Tensor

    def __init__(
        self,
        hidden_size: int,
        rank: int | None = None,
        width: int = 256,
        budget: int = 120_000,
        position: str = "fourier",
        question: str = "bilinear",
        context: str = "both",
        components: int = 24,
        loss: str = "kl",
        num_sources: int = 32,
        exclude_border: bool = True,
        connectivity: int = 8,
        suppress_claimed: bool = False,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        warmup_fraction: float = 0.05,
    ) -> None:
        """Builds an untrained predictor.

        Args:
            hidden_size: d of the VLM's decoder.
            rank: Of the factorised first layer; None lets it follow from the budget.
            width: Hidden units.
            budget: Trainable parameters to aim at.
            position: What is told of a patch's place, see `PredictorConfig`.
            question: How the question enters.
            context: What is told of the other patches.
            components: Softmaxes whose mixture is the map.
            loss: One of `predictor.losses.LOSSES`.
            num_sources: K, capped for small grids as at run time.
            exclude_border: Whether border patches may not be sources.
            connectivity: Neighbours that a source claims; the choice depends on it if claimed ones are suppressed.
            suppress_claimed: Whether patches that a source has claimed may not be sources.
            learning_rate: Peak of AdamW's schedule.
            weight_decay: AdamW's, on matrices only (no biases, no gains).
            warmup_fraction: Share of all steps with a linearly rising rate; a cosine to zero follows.

        Raises:
            ValueError: Unknown loss, or a fraction outside 0..1.
        """
        super().__init__()
        if loss not in LOSSES:
            close = get_close_matches(str(loss), LOSSES, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"loss is {loss!r}; legal: {', '.join(LOSSES)}.{hint}")
        if not 0 <= warmup_fraction < 1:
            raise ValueError(f"warmup_fraction is {warmup_fraction}; legal: 0 up to, not including, 1.")
        self.save_hyperparameters(logger=False)  # for checkpoints; train.py logs the resolved config, once
        self.predictor = SourcePredictor(
            PredictorConfig(
                hidden_size=hidden_size,
                rank=rank,
                width=width,
                budget=budget,
                position=position,
                question=question,
                context=context,
                components=components,
            )
        )
        self.register_buffer("has_statistics", torch.tensor(False))
        self.scr = SCRConfig(
            num_sources=num_sources,
            exclude_border=exclude_border,
            connectivity=connectivity,
            suppress_claimed=suppress_claimed,
        )
        self.loss = LOSSES[loss]
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_fraction = warmup_fraction
        self._train_loss = torch.zeros(2)  # of the epoch: sum over rows, rows
        self.val_metrics = SourceMetrics()
        self.test_metrics = SourceMetrics(keep_rows=True)
        self.test_rows: dict[str, np.ndarray] = {}

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
        """How far each row's features reach, [B]: what the drift guard is fitted on."""
        states, question = batch["states"].to(self.device), batch["question"].to(self.device)
        return self.predictor.score_and_spread(states, batch["grid"], question)[1].to(batch["states"].device)

    def compute_statistics(self, dataloader: Iterable[Batch]) -> None:
        """Measures each feature's mean and standard deviation over the training set and stores them.

        States (over all patches) and questions have their own. They become buffers of the predictor: part of
        every checkpoint and of the exported folder.

        Args:
            dataloader: The training set, read once. Prompts of one image each count its states.

        Raises:
            ValueError: The set is empty, or a value is not finite.
        """
        size = int(self.hparams["hidden_size"])
        states, questions = Moments(size), Moments(size)
        for batch in tqdm(dataloader, desc="feature statistics", unit="batch", leave=False, delay=2):
            for part in batch["states"].split(16):  # [16, N, d]: bounds the float32 copy
                states.add(part.flatten(0, 1))
            questions.add(batch["question"])
        if not states.count:
            raise ValueError("compute_statistics got an empty training set.")
        self.predictor.set_statistics(*states.mean_and_std(), *questions.mean_and_std())
        self.has_statistics.fill_(True)

    def on_fit_start(self) -> None:
        """Refuses to train on raw features."""
        if not self.has_statistics:
            raise RuntimeError("call module.compute_statistics(train_dataloader) once before Trainer.fit.")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the loss of a batch."""
        loss, scores, _, _ = self._loss_and_scores(batch)
        weight = batch.get("weight", 1.0)
        rows = len(scores) * (weight > 0)
        self._train_loss = self._train_loss.to(loss.device) + torch.stack(
            [loss.detach() * rows, loss.new_tensor(rows)]
        )
        return loss * weight

    def on_train_epoch_end(self) -> None:
        """Logs the mean loss over the epoch's rows, of all processes, and from before an interruption."""
        total, rows = self._over_processes(self._train_loss)
        self.log("train/loss", total / rows, prog_bar=True, sync_dist=True)  # the same number in every process
        self._train_loss = torch.zeros(2)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the loss of the epoch that is running."""
        checkpoint["train_loss"] = self._over_processes(self._train_loss)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes on with the loss of the epoch that was running."""
        if "train_loss" in checkpoint and self.global_rank == 0:
            self._train_loss = checkpoint["train_loss"]

    def _over_processes(self, values: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(values.to(self.device, copy=True), reduce_op="sum")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Collects loss and metrics."""
        self._evaluation_step(batch, "val", self.val_metrics)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Collects loss, metrics and their rows."""
        self._evaluation_step(batch, "test", self.test_metrics)

    def on_validation_epoch_end(self) -> None:
        """Logs the means of the epoch."""
        self._log_metrics("val", self.val_metrics)

    def on_test_epoch_end(self) -> None:
        """Logs the means, keeps the rows."""
        self.test_rows = self.test_metrics.rows()
        self._log_metrics("test", self.test_metrics)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Builds AdamW; linear warm-up, then a cosine to zero, by step."""
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ValueError("the cosine schedule needs an end: set trainer.max_epochs or max_steps.")
        weights = [p for p in self.predictor.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in weights if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate)
        total, warmup = int(steps), round(self.warmup_fraction * steps)
        scheduler = LambdaLR(optimizer, lambda step: rate_factor(step, warmup, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _loss_and_scores(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, int]:
        """Scalar loss, scores [B, N], eligible [N], K of this grid."""
        grid: Grid = batch["grid"]
        scores = self(batch["states"], grid, batch["question"])
        eligible = eligible_patches(grid, self.scr.exclude_border, scores.device)
        k = effective_num_sources(grid, self.scr)
        return self.loss(scores, batch["attention"], eligible, k), scores, eligible, k

    def _evaluation_step(self, batch: Batch, stage: str, metrics: SourceMetrics) -> None:
        loss, scores, eligible, k = self._loss_and_scores(batch)
        claims = claims_of(batch["grid"], self.scr, scores.device)
        metrics.update(scores, batch["attention"], eligible, k, batch["grid"], batch["key"], claims)
        self.log(f"{stage}/loss", loss, on_epoch=True, batch_size=len(scores), sync_dist=True)

    def _log_metrics(self, stage: str, metrics: SourceMetrics) -> None:
        values = metrics.compute()  # the same on every DDP rank, so that averaging over ranks changes nothing
        self.log_dict({f"{stage}/{name}": values[name] for name in METRICS}, sync_dist=True)
        metrics.reset()


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
            ValueError: A value was not finite.
        """
        if not (self.mean.isfinite().all() and self.squares.isfinite().all()):
            raise ValueError(
                "the training states or questions hold inf or nan. float16 ends at 65504, and some decoders "
                "have larger activations: harvest again with harvest.states_dtype=bfloat16."
            )
        return self.mean.float(), (self.squares / self.count).sqrt().float()


def rate_factor(step: int, warmup: int, total: int) -> float:
    """Factor of the learning rate: linear over `warmup` steps, then a half cosine to 0 at step `total`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    return 0.5 * (1 + math.cos(math.pi * progress))
