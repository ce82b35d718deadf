"""What int8 states cost the predictor: the same images harvested as float16 and as int8, the same fit, paired rows.

python -m benchmarks.states_dtype
python -m benchmarks.states_dtype --train 4000 --epochs 20 --folder runs/states-dtype

On the embedded world. Intervals are bootstraps over images; the last row is the difference on the same maps.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from configs.load import load_config
from configs.schema import TrainConfig
from data.datamodule import ShardDataModule
from data.harvest import harvest, training_images
from data.vlm import load_vlm
from evaluation.report import table
from predictor import baselines
from predictor.fit import fit
from predictor.metrics import METRICS, bootstrap_interval
from predictor.module import SourceModule
from scr_runtime import SCRConfig


def rows_of_fit(config: TrainConfig, scr: SCRConfig, folder: Path, epochs: int) -> Any:
    """Fits like train.py, without tracking; returns the test split's rows."""
    data = ShardDataModule(folder, config.trainer.batch_size, seed=config.seed)
    pl.seed_everything(config.seed, verbose=False)
    module = SourceModule(data.hidden_size, **config.fitting)
    module.compute_statistics(data.train_dataloader())
    fitted = fit(
        module,
        data,
        folder.with_name(f"{folder.name}-checkpoints"),
        logger=False,
        max_epochs=epochs,
        patience=config.trainer.patience,
        gradient_clip=config.trainer.gradient_clip,
        accelerator="cpu",
    )
    return baselines.evaluate(fitted.module.score, data.test_dataloader(), scr)


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=1500, help="training images (default 1500)")
    parser.add_argument("--epochs", type=int, default=8, help="epochs of each fit (default 8)")
    parser.add_argument("--folder", default="runs/states-dtype", help="where shards go (default runs/states-dtype)")
    parser.add_argument("--runs", default="runs", help="where the world is rendered (default runs)")
    options = parser.parse_args()

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    config = load_config(TrainConfig, "train", [f"runs_dir={options.runs}", "model.device=cpu"])
    scr = SCRConfig(**dataclasses.asdict(config.model.scr))
    model, processor = load_vlm(**config.model.loading)
    images = training_images(config)
    rows, sizes = {}, {}
    for dtype in ("float16", "int8"):
        folder = Path(options.folder, dtype)
        summary = harvest(
            folder,
            model=model,
            processor=processor,
            config=scr,
            images=images,
            splits={"train": options.train, "validation": 100, "test": 400},
            states_dtype=dtype,
            overwrite=True,
        )
        sizes[dtype] = summary["bytes"]
        rows[dtype] = rows_of_fit(config, scr, folder, options.epochs)
    print(f"\n{options.train} images, 2 prompts each, {options.epochs} epochs; K = {scr.num_sources}")
    lines = [["states", "MB", *METRICS]]
    for dtype, found in rows.items():
        intervals = [bootstrap_interval(found[name], found["group"]) for name in METRICS]
        lines.append(
            [dtype, f"{sizes[dtype] / 1e6:.0f}", *(f"{i.mean:.4f} [{i.low:.4f}, {i.high:.4f}]" for i in intervals)]
        )
    one, other = rows.values()
    pairs = [bootstrap_interval(other[name] - one[name], one["group"]) for name in METRICS]
    lines.append(["int8 - float16", "", *(f"{i.mean:+.4f} [{i.low:+.4f}, {i.high:+.4f}]" for i in pairs)])
    print(table(lines))


if __name__ == "__main__":
    main()
