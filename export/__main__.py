"""Exports the best checkpoint of a finished fit again, for example with another fallback target.

python -m export model=scene-llava predictor.target_fallback=0.1
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from configs.load import parse_cli
from configs.schema import TrainConfig
from data.datamodule import ShardDataModule
from data.errors import DataError
from export.package import ExportError, export_predictor
from scr_runtime import SCRConfig
from scr_runtime.artifact import CONFIG_NAME
from scr_runtime.errors import SCRError


def main(argv: Sequence[str] | None = None) -> int:
    """Packs ``best.ckpt`` into the predictor folder; returns the exit code."""
    config = parse_cli(TrainConfig, argv=argv, prog="python -m export", description=__doc__ or "")
    paths = config.paths
    try:
        record = paths.predictor / CONFIG_NAME
        if not record.is_file():
            raise FileNotFoundError(f"no predictor at {paths.predictor}: run train.py first")
        former = json.loads(record.read_text())
        data = ShardDataModule(paths.harvest, config.trainer.batch_size)
        exported = export_predictor(
            paths.checkpoints / "best.ckpt",
            paths.predictor,
            scr=SCRConfig.from_dict(former["scr"]),
            model=former["model"],
            validation=data.val_dataloader(),
            target_fallback=config.predictor.target_fallback,
            target_fidelity=config.predictor.target_fidelity,
            metrics=former["metrics"],
            provenance=former["provenance"],
        )
    except (DataError, SCRError, ExportError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{exported.folder}: {exported.predictor.count_parameters():,} parameters, reloaded and equal; "
        f"auto falls back under an expected share of {exported.calibration.threshold:.3f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
