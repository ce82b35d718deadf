"""Where everything lies: every place that is read or generated, as it follows from a configuration."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from configs.schema import TrainConfig


@dataclass(frozen=True)
class Paths:
    """Every place of one configuration; all that is generated lies under `runs_dir`. Made by `TrainConfig.paths`."""

    data: Path
    """Root of the data set: data.root, or runs/data/<data.name>, with its sizes behind it for a world of others."""
    train_images: Path
    train_annotations: Path | None
    eval_images: Path | None
    eval_annotations: Path | None
    harvest: Path
    """Shards: runs/harvest/<model>-<data>; behind it -block<n> where model.scr.state_layer is not 0, and a digest
    where settings of the harvest are not the defaults."""
    fits: Path
    """One folder for each run: runs/fits/<model>."""
    latest: Path
    """The newest complete run: the link runs/fits/<model>/latest; of a variant runs/sweeps/<model>/<variant>."""
    predictor: Path
    """Its exported predictor: runs/predictors/<model>, a link; of a variant in its folder."""
    cache: Path
    """What is derived from inputs and can be made again: runs/cache."""
    sweeps: Path
    """Children of sweeps, and the summaries: runs/sweeps/<model>."""
    mlflow_db: Path
    """runs/mlflow.db."""
    mlflow_artifacts: Path
    """runs/mlflow."""


def paths_of(config: TrainConfig) -> Paths:
    """Works out every place of a configuration."""
    runs = Path(config.runs_dir).expanduser()
    name, data = config.model.name, config.data
    data_name = f"{data.name}{_world_suffix(config)}"
    root = Path(data.root).expanduser() if data.root else runs / "data" / data_name
    sweeps = runs / "sweeps" / name
    own = sweeps / config.variant if config.variant else None
    layer = config.model.scr.state_layer
    harvest = f"{name}-{data_name}" + (f"-block{layer}" if layer else "") + _harvest_suffix(config)
    return Paths(
        data=root,
        train_images=root / data.train_images,
        train_annotations=root / data.train_annotations if data.train_annotations else None,
        eval_images=root / data.eval_images if data.eval_images else None,
        eval_annotations=root / data.eval_annotations if data.eval_annotations else None,
        harvest=runs / "harvest" / (config.harvest.name or harvest),
        fits=runs / "fits" / name,
        latest=own or runs / "fits" / name / "latest",
        predictor=own / "predictor" if own else runs / "predictors" / name,
        cache=runs / "cache",
        sweeps=sweeps,
        mlflow_db=runs / "mlflow.db",
        mlflow_artifacts=runs / "mlflow",
    )


def _world_suffix(config: TrainConfig) -> str:
    """Worlds of other sizes or seeds lie beside the default one; they never replace it."""
    world = config.data.world
    if world is None or world == type(world)(sizes=world.sizes):
        return ""
    return f"-{world.train}-{world.val}" + (f"-seed{world.seed}" if world.seed else "")


def _harvest_suffix(config: TrainConfig) -> str:
    """Harvests of other settings lie beside the default one; they never replace it."""
    changed = config.harvest.sample_settings
    if changed == type(config.harvest)().sample_settings:
        return ""
    return "-" + hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:6]
