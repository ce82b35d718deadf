"""How far a predictor carries: to grids that it was not fitted on, and, as a beginning, to another model.

    python train.py model=scene-next harvest.samples=2000 evaluation.images=0
    python -m benchmarks.transfer grids runs/harvest/scene-next-...
    python -m benchmarks.transfer images runs/harvest/scene-next-... --start runs/predictors/scene-llava

    grids    fits on the half of the grids with the fewest patches, and on the other half; each is measured on the
             test rows of either half, beside a predictor that was fitted on all grids with as many steps
    images   fits to few images, once from random weights and once from another model's predictor: what reads positions
             and mixes (`weights`, `hidden`, `score`) is taken over, what reads states (`project`, `gate`) is fresh

All fits have the same number of steps. Printed is the recall at K on the test split, mean and range over seeds.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.add_argument("part", choices=("grids", "images"))
PARSER.add_argument("folder", type=Path, help="a finished harvest")
PARSER.add_argument("--model", default="scene-next", help="configs/model/<this>.yaml, of the harvest")
PARSER.add_argument("--start", type=Path, help="images: another model's predictor folder")
PARSER.add_argument("--images", type=int, nargs="+", default=[25, 100, 400], help="images: how many")
PARSER.add_argument("--steps", type=int, default=400, help="of each fit, about")
PARSER.add_argument("--seeds", type=int, default=3)
if __name__ == "__main__":
    PARSER.parse_args()  # before the imports below, which take seconds

import numpy as np
import pytorch_lightning as pl

from configs import TrainConfig, load_config
from data.datamodule import ShardDataModule
from data.grids import Grid
from evaluation.tables import table
from pipeline.exits import quieten_libraries
from predictor import baselines
from predictor.fit import fit
from predictor.metrics import summarise_rows
from predictor.module import SourceModule
from scr_runtime import load_predictor
from scr_runtime.network import SourcePredictor

TAKEN_OVER = ("weights.", "hidden.", "score.")
"""Parts of a predictor that read no states of the model."""


class Some:
    """The batches of a loader that have one of these grids."""

    def __init__(self, loader: Any, grids: Sequence[Grid]) -> None:
        self.sampler, self.batch_sampler = loader.sampler, loader.batch_sampler  # Lightning gives it the epoch
        self._loader = loader
        self._grids = set(grids)
        self._count = sum(1 for _ in self)

    def __iter__(self) -> Iterator[Any]:
        return (batch for batch in self._loader if tuple(batch["grid"]) in self._grids)

    def __len__(self) -> int:
        return self._count


class OnGrids(pl.LightningDataModule):
    """The rows of a harvest that have one of these grids."""

    def __init__(self, data: ShardDataModule, grids: Sequence[Grid]) -> None:
        super().__init__()
        self._data = data
        self._grids = grids
        self.identity = data.identity | {"grids": sorted(grids)}

    def count(self, split: str) -> int:
        return sum(grid in self._grids for grid in self._data.grids(split))

    def train_dataloader(self) -> Some:
        return Some(self._data.loader("train", shuffle=True), self._grids)

    def val_dataloader(self) -> Some:
        return Some(self._data.loader("validation"), self._grids)

    def test_dataloader(self) -> Some:
        return Some(self._data.loader("test"), self._grids)


def fitted(
    config: TrainConfig, data: Any, hidden_size: int, steps: int, start: SourcePredictor | None
) -> SourceModule:
    """Fits a predictor with about so many steps, from random weights or from those of another predictor."""
    pl.seed_everything(config.seed, verbose=False)
    network = config.predictor.network(hidden_size)
    module = SourceModule(network, config.scr, config.trainer, config.predictor.loss)
    if start is not None:
        taken = {name: value for name, value in start.state_dict().items() if name.startswith(TAKEN_OVER)}
        module.predictor.load_state_dict(module.predictor.state_dict() | taken)
    loader = data.train_dataloader()
    epochs = max(1, round(steps / len(loader)))
    settings = config.trainer.model_copy(update={"max_epochs": epochs, "patience": epochs})
    module.compute_statistics(loader)
    with tempfile.TemporaryDirectory() as folder:
        return fit(module, data, Path(folder), settings, logger=False).module


def recall(config: TrainConfig, module: SourceModule, loader: Any) -> float:
    """Mean recall at K over the rows of a loader."""
    rows = baselines.evaluate(module.score, loader, config.scr)
    return summarise_rows(rows, config.evaluation.bootstrap, config.evaluation.seed)["recall"].mean


def halves(data: ShardDataModule) -> tuple[list[Grid], list[Grid]]:
    """The harvest's grids, by number of patches: the smaller half and the larger half."""
    grids = sorted(set(data.grids("train")), key=lambda grid: (grid[0] * grid[1], grid))
    if len(grids) < 2:
        raise SystemExit(f"{data.directory} has one grid, {grids[0]}: harvest images of several shapes")
    return grids[: len(grids) // 2], grids[len(grids) // 2 :]


def compare_grids(configs: Sequence[TrainConfig], folder: Path, steps: int) -> list[list[str]]:
    """Table of fits on halves of the grids, measured on either half."""
    data = ShardDataModule(folder, configs[0].trainer)
    small, large = halves(data)
    parts = {f"small ({len(small)} grids)": small, f"large ({len(large)} grids)": large}
    rows = [["fitted on", *(f"recall on {name}" for name in parts)]]
    for name, grids in {**parts, "all": [*small, *large]}.items():

        def one(config: TrainConfig, grids: Sequence[Grid] = grids) -> list[float]:
            own = data.for_fit(config.trainer, seed=config.seed, mean_maps=False)
            module = fitted(config, OnGrids(own, grids), own.hidden_size, steps, None)
            return [recall(config, module, OnGrids(own, part).test_dataloader()) for part in parts.values()]

        rows.append([name, *over_seeds(one, configs)])
    return rows


def compare_images(
    configs: Sequence[TrainConfig], folder: Path, steps: int, images: Sequence[int], start: SourcePredictor
) -> list[list[str]]:
    """Table of fits to few images, from random weights and from another predictor's."""
    data = ShardDataModule(folder, configs[0].trainer)
    rows = [["images", "from random weights", "from another model's"]]
    for count in images:

        def one(config: TrainConfig, count: int = count) -> list[float]:
            reading = config.trainer.model_copy(update={"train_images": count})
            own = data.for_fit(reading, seed=config.seed, mean_maps=False)
            modules = (fitted(config, own, own.hidden_size, steps, begin) for begin in (None, start))
            return [recall(config, module, own.test_dataloader()) for module in modules]

        rows.append([f"{count:,}", *over_seeds(one, configs)])
    return rows


def over_seeds(measure: Callable[[TrainConfig], list[float]], configs: Sequence[TrainConfig]) -> list[str]:
    """Mean and range over seeds of each number that a measurement gives."""
    values = np.array([measure(config) for config in configs])
    return [f"{own.mean():.3f} ({own.min():.3f} to {own.max():.3f})" for own in values.T]


def main(argv: Sequence[str] | None = None) -> None:
    arguments = PARSER.parse_args(argv)
    quieten_libraries()
    configs = [load_config([f"model={arguments.model}", f"seed={seed}"]) for seed in range(arguments.seeds)]
    if arguments.part == "grids":
        rows = compare_grids(configs, arguments.folder, arguments.steps)
    elif arguments.start is None:
        PARSER.error("images needs --start, another model's predictor folder")
    else:
        start = load_predictor(arguments.start)
        rows = compare_images(configs, arguments.folder, arguments.steps, arguments.images, start)
    print(f"\nrecall@K on the test split, mean (range) over {arguments.seeds} seeds, {arguments.steps} steps each\n")
    print(table(rows))


if __name__ == "__main__":
    main()
