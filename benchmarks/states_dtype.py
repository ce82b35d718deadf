"""What int8 states cost the predictor: the same images harvested as float16 and as int8, the same fit, paired rows.

python -m benchmarks.states_dtype
python -m benchmarks.states_dtype --train 4000 --epochs 20 --folder runs/states-dtype

On the embedded world. Intervals are bootstraps over images; the last row is the difference on the same maps.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path
from typing import Any

PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.add_argument("--train", type=int, default=1500, help="training images (default 1500)")
PARSER.add_argument("--epochs", type=int, default=8, help="epochs of each fit (default 8)")
PARSER.add_argument("--folder", default="runs/states-dtype", help="where shards go (default runs/states-dtype)")
PARSER.add_argument("--runs", default="runs", help="where the world is rendered (default runs)")
if __name__ == "__main__":
    PARSER.parse_args()  # before the imports below, which take seconds

import pytorch_lightning as pl
import torch

from configs import TrainConfig, load_config
from data.datamodule import ShardDataModule
from data.harvest import harvest
from data.harvester import prepare
from data.vlm import load_vlm
from evaluation.tables import table
from pipeline.harvest import training_images
from predictor import baselines
from predictor.fit import fit
from predictor.metrics import METRICS, Interval, bootstrap_interval
from predictor.module import SourceModule

DTYPES = ("float16", "int8")


def main() -> None:
    """Prints one table."""
    options = PARSER.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows, sizes = measure(options)
    scr = configuration(options, DTYPES[0]).scr
    print(f"\n{options.train} images, 2 prompts each, {options.epochs} epochs; K = {scr.num_sources}")

    def cells(values: dict[str, Any], image: Any, show: str) -> list[str]:
        intervals: list[Interval] = [bootstrap_interval(values[name], image) for name in METRICS]
        return [f"{i.mean:{show}} [{i.low:{show}}, {i.high:{show}}]" for i in intervals]

    lines = [["states", "MB", *METRICS]]
    for dtype, found in rows.items():
        lines.append([dtype, f"{sizes[dtype] / 1e6:.0f}", *cells(found, found["group"], ".4f")])
    one, other = rows.values()
    differences = {name: other[name] - one[name] for name in METRICS}
    print(table([*lines, ["int8 - float16", "", *cells(differences, one["group"], "+.4f")]]))


def configuration(options: argparse.Namespace, dtype: str) -> TrainConfig:
    """The settings of `train.py` for the embedded world, with those of this comparison."""
    overrides = [f"runs_dir={options.runs}", "model.device=cpu", f"harvest.states_dtype={dtype}"]
    overrides += [f"harvest.samples={options.train}", "harvest.validation=100", "harvest.test=400"]
    overrides += ["trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.resume=false"]
    return load_config([*overrides, f"trainer.max_epochs={options.epochs}"])


def measure(options: argparse.Namespace) -> tuple[dict[str, dict[str, Any]], dict[str, int]]:
    """Number format -> metrics of every map of the test split, and bytes of the shards."""
    config = configuration(options, DTYPES[0])
    images = training_images(config)
    model, processor = load_vlm(config.model)
    rows, sizes = {}, {}
    for dtype in DTYPES:
        folder = Path(options.folder, dtype)
        config = configuration(options, dtype)
        job, harvester = prepare(
            folder, model=model, processor=processor, scr=config.scr, images=images, settings=config.harvest
        )
        sizes[dtype] = harvest(job, harvester, overwrite=True).bytes
        rows[dtype] = rows_of_fit(config, folder)
    return rows, sizes


def rows_of_fit(config: TrainConfig, folder: Path) -> dict[str, Any]:
    """Fits like train.py, without tracking; returns the test split's rows."""
    data = ShardDataModule(folder, config.trainer, seed=config.seed)
    pl.seed_everything(config.seed, verbose=False)
    network = config.predictor.network(data.hidden_size)
    module = SourceModule(network, config.scr, config.trainer, config.predictor.loss)
    module.compute_statistics(data.train_dataloader())
    checkpoints = folder.with_name(f"{folder.name}-checkpoints")
    fitted = fit(module, data, checkpoints, config.trainer, logger=False)
    return baselines.evaluate(fitted.module.score, data.test_dataloader(), config.scr)


if __name__ == "__main__":
    main()
