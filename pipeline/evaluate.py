"""The command `python -m evaluation`: compares an exported predictor with two-pass, vanilla and the controls.

python -m evaluation model=scene-llava
"""

from __future__ import annotations

from collections.abc import Sequence

from configs import TrainConfig, parse_cli
from data.vlm import load_vlm
from evaluation import report
from evaluation.compare import compare, measure_reference
from evaluation.errors import EvaluationError
from evaluation.tables import bullets, table
from pipeline.exits import exit_code
from pipeline.folders import latest_run, new_folder
from pipeline.harvest import held_out_images
from scr_runtime import load_predictor


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the comparison and prints its table; returns the exit code."""
    about = "Compares an exported predictor with two-pass, vanilla and the controls on held-out images."
    config = parse_cli(argv, "python -m evaluation", [about, "python -m evaluation model=scene-llava"])
    return exit_code(lambda: run(config))


def run(config: TrainConfig) -> int:
    """Compares, prints the tables and writes the report."""
    if not config.evaluation.images:
        raise EvaluationError("evaluation.images=0 compares no answers: give it a number of images")
    predictor = load_predictor(latest_run(config).predictor)  # first: the questions take minutes
    images = held_out_images(config)
    model, processor = load_vlm(config.model)
    reference = measure_reference(model, processor, config.scr, images, config.evaluation, config.paths.cache)
    comparison = compare(reference, predictor, config.evaluation)
    embedded = config.data.world is not None
    print(table(report.answer_rows(comparison)))
    print("\n" + bullets(report.reading(comparison, embedded=embedded)))
    folder = new_folder(latest_run(config).path / "evaluations")
    files = report.write(folder, comparison, embedded=embedded)
    print(f"\nreport: {files['md']}, figure: {files['png']}")
    return 0
