"""The whole chain: harvest if it is missing, fit, export, compare.

python train.py                                    the embedded world, in minutes
python train.py model=llava-1.5-7b data=coco2014 data.root=/path/to/coco2014
python train.py predictor.loss=kl,bce seed=0,1,2   a sweep: six children of one MLflow run

The stages are in pipeline/stages.py, their order for one configuration is `pipeline.sweep.chain`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

try:
    from configs import Sweep, parse_sweep
    from pipeline.commands import start
except ModuleNotFoundError as missing:
    sys.exit(
        f"error: {missing.name} is not installed in this Python ({sys.executable}).\n"
        "`make train` installs everything into .venv and runs; afterwards `source .venv/bin/activate`, or type\n"
        ".venv/bin/python instead of python."
    )

PROGRAM = "python train.py"
ABOUT = [
    "Harvest, fit, export and compare a one-pass predictor.",
    f"{PROGRAM}                                 the embedded world, in minutes",
    f"{PROGRAM} trainer=quick                   a trial in about a minute",
    f"{PROGRAM} model=llava-1.5-7b data=coco2014 data.root=/path/to/coco2014",
    f"{PROGRAM} predictor.loss=kl,bce seed=0,1  values with commas: a sweep",
]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the chain, or a sweep of chains; returns the exit code."""
    sweep = parse_sweep(argv, PROGRAM, ABOUT)
    configs = [child.config for child in sweep.children]
    resumes = all(config.trainer.resume for config in configs)
    return start(PROGRAM, configs, lambda: run(sweep), ["harvest", "evaluation"], resumes=resumes)


def run(sweep: Sweep) -> int:
    """Opens the tracking store, then runs one configuration or all; returns the exit code."""
    # here, because they import torch, Lightning and MLflow: help and a typo cost no time
    from pipeline.checks import check_all
    from pipeline.exits import quieten_libraries
    from pipeline.sweep import ended, run_once, run_sweep
    from pipeline.tracking import connect

    quieten_libraries()
    configs = [child.config for child in sweep.children]
    check_all(configs)
    experiments = list(dict.fromkeys(config.experiment for config in configs))
    client = connect(configs[0].tracking_uri, experiments, configs[0].paths.mlflow_artifacts)
    failed = run_sweep(sweep, client) if sweep.keys else run_once(sweep.children[0], client)
    if failed:
        print(f"error: {failed} of {len(sweep.children)} children have no result", file=sys.stderr)
        return 1
    if sweep.keys:
        print(ended())
    return 0


if __name__ == "__main__":
    sys.exit(main())
