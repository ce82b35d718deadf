"""Compares an exported predictor with two-pass, vanilla and the controls on held-out images.

python -m evaluation model=scene-llava
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from configs.load import parse_cli
from configs.schema import TrainConfig
from data.errors import DataError
from data.harvest import held_out_images
from data.vlm import load_vlm
from evaluation import report
from evaluation.compare import compare, measure_reference
from scr_runtime import SCRConfig
from scr_runtime.errors import SCRError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the comparison and prints its table; returns the exit code."""
    config = parse_cli(TrainConfig, argv=argv, prog="python -m evaluation", description=__doc__ or "")
    if not config.evaluation.images:
        print("error: evaluation.images=0 compares no answers: give it a number of images", file=sys.stderr)
        return 2
    paths = config.paths
    try:
        model, processor = load_vlm(**config.model.loading)
        reference = measure_reference(
            model,
            processor,
            SCRConfig(**dataclasses.asdict(config.model.scr)),
            held_out_images(config),
            num_images=config.evaluation.images,
            questions_per_image=config.evaluation.questions_per_image,
            batch_size=config.evaluation.batch_size,
            seed=config.evaluation.seed,
        )
        comparison = compare(
            reference,
            paths.predictor,
            bootstrap=config.evaluation.bootstrap,
            latency_repeats=config.evaluation.latency_repeats,
        )
    except (DataError, SCRError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    embedded = config.data.world is not None
    print(report.table(report.answer_rows(comparison)))
    print("\n" + report.bullets(report.reading(comparison, embedded=embedded)))
    files = report.write(paths.reports, comparison, embedded=embedded)
    print(f"\nreport: {files['md']}, figure: {files['png']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
