"""The command `python -m export`: exports the best checkpoint of a finished fit again.

pipeline/predictors.py has the commands for a folder that was exported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from configs import TrainConfig
from data.datamodule import ShardDataModule
from evaluation.tables import paragraph
from export.errors import ExportError
from export.package import Facts, export_predictor
from pipeline.exits import quieten_libraries
from pipeline.folders import RunFolder, latest_run
from predictor.checkpoints import BEST
from scr_runtime import SCRConfig
from scr_runtime.artifact import CONFIG_NAME


def run(config: TrainConfig, run_folder: Path | None = None) -> int:
    """Exports the fit of a run, by default the newest, and prints where to. The former predictor is kept beside it."""
    quieten_libraries()
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
        facts=Facts(former["metrics"], former["provenance"], stored_verdict(folder)),
    )
    words = f"{exported.folder}: {exported.predictor.count_parameters():,} parameters, reloaded and equal; "
    print(paragraph(f"{words}auto falls back under an expected share of {exported.calibration.threshold:.3f}"))
    return 0


def stored_verdict(folder: RunFolder) -> Mapping[str, str] | None:
    """The verdict of the evaluation that ended a run; None if there was none."""
    file = folder.reports / "evaluation.json"
    return json.loads(file.read_text(encoding="utf-8"))["verdict"] if file.is_file() else None
