"""A small harvest and a module to fit to it: `python -m tests.predictor.fitting SHARDS FOLDER [key=value ...]`."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from data.datamodule import ShardDataModule
from data.index import write_index
from data.sample import Sample
from data.settings import ReadingSettings
from data.shards import ShardWriter
from predictor.module import SourceModule
from predictor.settings import FitSettings
from scr_runtime.config import PredictorConfig, SCRConfig

GRIDS = ((4, 4), (3, 4))
WIDTH, EPOCHS, BATCH = 8, 4, 16
SPLITS = {"train": 30, "validation": 11, "test": 7}  # images, two prompts each: 4 steps an epoch, of uneven sizes


def write_harvest(
    folder: Path, splits: dict[str, int] = SPLITS, grids: tuple[tuple[int, int], tuple[int, int]] = GRIDS
) -> Path:
    """Maps that follow from the states, on two grids; the last batches of both have fewer rows."""
    law = torch.randn(WIDTH, generator=torch.Generator().manual_seed(9))
    image_id, shards = 0, {}
    for split, count in splits.items():
        shards[split] = [f"{split}-{number:05d}" for number in range(-(-count // 8))]
        for number, name in enumerate(shards[split]):
            with ShardWriter(folder, name, "settings") as writer:
                for _ in range(number * 8, min((number + 1) * 8, count)):
                    image_id += 1
                    generator = torch.Generator().manual_seed(image_id)
                    grid = grids[image_id % 3 == 0]
                    states = torch.randn(grid[0] * grid[1], WIDTH, generator=generator)
                    question = torch.randn(2, WIDTH, generator=generator)
                    attention = (states @ law + question @ (states * law).T).exp()
                    writer.write(
                        Sample(image_id, "", states.half(), attention, question.half(), (grid,), [{}, {}], [0.0, 0.0])
                    )
    write_index(folder, shards, {}, {})
    return folder


def data_of(folder: Path, **settings: Any) -> ShardDataModule:
    """Batches of 16 rows."""
    defaults: dict[str, Any] = {"batch_size": BATCH}
    return ShardDataModule(folder, ReadingSettings(**defaults | settings), seed=3)


def settings_of(**settings: Any) -> FitSettings:
    """Four epochs of float32 on the CPU."""
    defaults: dict[str, Any] = {
        "max_epochs": EPOCHS,
        "patience": EPOCHS,
        "learning_rate": 1e-2,
        "warmup_fraction": 0.05,
        "accelerator": "cpu",
        "precision": "32-true",
    }
    return FitSettings(**defaults | settings)


def module_of(data: ShardDataModule, seed: int = 0, scr: SCRConfig | None = None) -> SourceModule:
    """A module with statistics; the seed is of its weights."""
    pl.seed_everything(seed, verbose=False)
    network = PredictorConfig(data.hidden_size, width=16, context="both")
    module = SourceModule(network, scr or SCRConfig(num_sources=3, exclude_border=False), settings_of())
    module.compute_statistics(data.train_dataloader())
    return module


def measure(module: SourceModule, data: ShardDataModule, devices: int) -> dict[str, float]:
    """Validation metrics as a Trainer of so many processes finds them."""
    trainer = pl.Trainer(
        accelerator="cpu", devices=devices, strategy="ddp_spawn" if devices > 1 else "auto", logger=False,
        use_distributed_sampler=False, enable_checkpointing=False, enable_progress_bar=False,
    )  # fmt: skip
    (metrics,) = trainer.validate(module, datamodule=data, verbose=False)
    return dict(metrics)


def main() -> None:
    """Fits, resuming where that is possible, and measures; status 143 after SIGTERM."""
    from predictor.fit import Preempted, fit

    warnings.filterwarnings("ignore")
    shards, folder, *rest = sys.argv[1:]
    settings = {name: json.loads(value) for name, _, value in (text.partition("=") for text in rest)}
    data = data_of(Path(shards))
    try:
        fitted = fit(module_of(data), data, Path(folder), settings_of(**settings), logger=False)
    except Preempted as exception:
        print(exception, file=sys.stderr)
        sys.exit(143)
    found = measure(fitted.module, data, settings.get("devices", 1))
    print(json.dumps({"score": fitted.score, "epochs": fitted.epochs, **found}))


if __name__ == "__main__":
    main()
