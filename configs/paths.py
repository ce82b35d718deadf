"""Where everything lies: every place that is read or generated, as it follows from a configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from configs.schema import TrainConfig


@dataclass(frozen=True)
class Paths:
    """Every place of one configuration; all that is generated lies under `runs_dir`. Made by `TrainConfig.paths`."""

    data: Path
    """Root of the data set: data.root, or runs/data/<data.name>."""
    train_images: Path
    train_annotations: Path
    eval_images: Path
    eval_annotations: Path
    harvest: Path
    """Shards: runs/harvest/<model>-<data>, and -block<n> behind it where model.scr.state_layer is not 0."""
    checkpoints: Path
    """Lightning checkpoints: runs/checkpoints/<model>; of a variant runs/sweeps/<model>/<variant>/checkpoints."""
    predictor: Path
    """The exported predictor: runs/predictors/<model>; of a variant runs/sweeps/<model>/<variant>/predictor."""
    cache: Path
    """What is derived from inputs and can be made again: runs/cache."""
    sweeps: Path
    """Children of sweeps, and the summaries: runs/sweeps/<model>."""
    reports: Path
    """Tables and figures: runs/reports/<model>; of a variant runs/sweeps/<model>/<variant>/reports."""
    config: Path
    """The resolved config of the last run: config.yaml in `reports`."""
    mlflow_db: Path
    """runs/mlflow.db."""
    mlflow_artifacts: Path
    """runs/mlflow."""


def paths_of(config: TrainConfig) -> Paths:
    """Works out every place of a configuration."""
    runs = Path(config.runs_dir).expanduser()
    name, data = config.model.name, config.data
    root = Path(data.root).expanduser() if data.root else runs / "data" / data.name
    sweeps = runs / "sweeps" / name
    own = sweeps / config.variant if config.variant else None
    reports = own / "reports" if own else runs / "reports" / name
    layer = config.model.scr.state_layer
    harvest = f"{name}-{data.name}" + (f"-block{layer}" if layer else "")
    return Paths(
        data=root,
        train_images=root / data.train_images,
        train_annotations=root / data.train_annotations,
        eval_images=root / data.eval_images,
        eval_annotations=root / data.eval_annotations,
        harvest=runs / "harvest" / (config.harvest.name or harvest),
        checkpoints=own / "checkpoints" if own else runs / "checkpoints" / name,
        predictor=own / "predictor" if own else runs / "predictors" / name,
        cache=runs / "cache",
        sweeps=sweeps,
        reports=reports,
        config=reports / "config.yaml",
        mlflow_db=runs / "mlflow.db",
        mlflow_artifacts=runs / "mlflow",
    )
