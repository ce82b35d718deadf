"""The command `python -m export`: exports the best checkpoint of a finished fit again.

python -m export model=scene-llava predictor.target_fallback=0.1
"""

from __future__ import annotations

import json
from pathlib import Path

from configs import TrainConfig
from data.datamodule import ShardDataModule
from export.package import ExportError, export_predictor
from pipeline.folders import RunFolder, latest_run
from predictor.checkpoints import BEST
from scr_runtime import SCRConfig
from scr_runtime.artifact import CONFIG_NAME


def run(config: TrainConfig, run_folder: Path | None = None) -> int:
    """Exports the fit of a run, by default the newest, and prints where to. The former predictor is kept beside it."""
    folder = RunFolder(run_folder.resolve()) if run_folder else latest_run(config)
    record = folder.predictor / CONFIG_NAME
    if not record.is_file():
        raise ExportError(f"no predictor at {folder.predictor}: run train.py first")
    former = json.loads(record.read_text())
    exported = export_predictor(
        folder.checkpoints / BEST,
        folder.predictor,
        scr=SCRConfig.from_dict(former["scr"]),
        model=former["model"],
        validation=ShardDataModule(config.paths.harvest, config.trainer).val_dataloader(),
        settings=config.predictor,
        metrics=former["metrics"],
        provenance=former["provenance"],
    )
    print(
        f"{exported.folder}: {exported.predictor.count_parameters():,} parameters, reloaded and equal; "
        f"auto falls back under an expected share of {exported.calibration.threshold:.3f}"
    )
    return 0
