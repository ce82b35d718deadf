"""The command `python -m export`: exports the best checkpoint of a finished fit again, and what a folder is good for.

python -m export model=scene-llava predictor.target_fallback=0.1
python -m export verify FOLDER                     see pipeline/predictors.py for this and the other commands
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence

from configs import TrainConfig, parse_cli
from data.datamodule import ShardDataModule
from export.errors import ExportError
from export.package import Facts, export_predictor
from pipeline.exits import exit_code
from pipeline.folders import RunFolder, latest_run
from pipeline.predictors import COMMANDS, USAGE, run_command
from predictor.checkpoints import BEST
from scr_runtime import SCRConfig
from scr_runtime.artifact import CONFIG_NAME


def main(argv: Sequence[str] | None = None) -> int:
    """Packs ``best.ckpt`` into the predictor folder, or runs one of the other commands; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in COMMANDS:
        return exit_code(lambda: run_command(arguments[0], arguments[1:]))
    about = "Exports the best checkpoint of a finished fit again, for example with another fallback target."
    example = "python -m export model=scene-llava predictor.target_fallback=0.1"
    config = parse_cli(arguments, "python -m export", [about, example, "", "Other commands:", *USAGE])
    return exit_code(lambda: run(config))


def run(config: TrainConfig) -> int:
    """Exports, and prints where to. The former predictor is kept beside the new one."""
    folder = latest_run(config)
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
    print(
        f"{exported.folder}: {exported.predictor.count_parameters():,} parameters, reloaded and equal; "
        f"auto falls back under an expected share of {exported.calibration.threshold:.3f}"
    )
    return 0


def stored_verdict(folder: RunFolder) -> Mapping[str, str] | None:
    """The verdict of the evaluation that ended a run; None if there was none."""
    file = folder.reports / "evaluation.json"
    return json.loads(file.read_text(encoding="utf-8"))["verdict"] if file.is_file() else None
