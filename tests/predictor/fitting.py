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
from data.shards import Sample, ShardWriter, write_index
from predictor.module import SourceModule

GRIDS = ((4, 4), (3, 4))
WIDTH, EPOCHS, BATCH = 8, 4, 16
SPLITS = {"train": 30, "validation": 11, "test": 7}  # images, two prompts each: 4 steps an epoch, of uneven sizes


def write_harvest(folder: Path, splits: dict[str, int] = SPLITS) -> Path:
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
                    grid = GRIDS[image_id % 3 == 0]
                    states = torch.randn(grid[0] * grid[1], WIDTH, generator=generator)
                    question = torch.randn(2, WIDTH, generator=generator)
                    attention = (states @ law + question @ (states * law).T).exp()
                    writer.write(
                        Sample(image_id, "", states.half(), attention, question.half(), grid, [{}, {}], [0.0, 0.0])
                    )
    write_index(folder, shards, {}, {})
    return folder


def data_of(folder: Path, **settings: Any) -> ShardDataModule:
    """Batches of 16 rows."""
    defaults: dict[str, Any] = {"batch_size": BATCH, "seed": 3}
    return ShardDataModule(folder, **defaults | settings)


def module_of(data: ShardDataModule, seed: int = 0) -> SourceModule:
    """A module with statistics; the seed is of its weights."""
    pl.seed_everything(seed, verbose=False)
    module = SourceModule(data.hidden_size, width=16, num_sources=3, exclude_border=False, learning_rate=1e-2)
    module.compute_statistics(data.train_dataloader())
    return module


def measure(module: SourceModule, data: ShardDataModule, devices: int) -> dict[str, float]:
    """Validation and test metrics as a Trainer of so many processes finds them."""
    found: dict[str, float] = {}
    for stage in ("validate", "test"):
        trainer = pl.Trainer(
            accelerator="cpu", devices=devices, strategy="ddp_spawn" if devices > 1 else "auto", logger=False,
            use_distributed_sampler=False, enable_checkpointing=False, enable_progress_bar=False,
        )  # fmt: skip
        (metrics,) = getattr(trainer, stage)(module, datamodule=data, verbose=False)
        found |= metrics
    return found


def main() -> None:
    """Fits, resuming where that is possible, and measures; status 143 after SIGTERM."""
    from predictor.fit import Preempted, fit

    warnings.filterwarnings("ignore")
    shards, folder, *rest = sys.argv[1:]
    settings = {name: json.loads(value) for name, _, value in (text.partition("=") for text in rest)}
    data = data_of(Path(shards), **settings.pop("data", {}))
    defaults: dict[str, Any] = {
        "max_epochs": EPOCHS,
        "patience": EPOCHS,
        "gradient_clip": 1.0,
        "logger": False,
        "resume": True,
    }
    devices = settings.get("devices", 1)
    try:
        fitted = fit(module_of(data), data, Path(folder), accelerator="cpu", **defaults | settings)
    except Preempted as exception:
        print(exception, file=sys.stderr)
        sys.exit(143)
    print(json.dumps({"score": fitted.score, "epochs": fitted.epochs, **measure(fitted.module, data, devices)}))


if __name__ == "__main__":
    main()
