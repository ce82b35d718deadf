"""The command `python -m evaluation`: whether SCR helps a model, how much of two-pass a predictor keeps, and its cost.

python -m evaluation model=scene-llava
python -m evaluation model=llava-1.5-7b data=coco2014 data.root=/coco evaluation.pope_files=a.json,b.json methods=all
python -m evaluation predictor=runs/predictors/one,runs/predictors/two benchmarks=pope,chair
python -m evaluation compare RUN RUN ...           runs by folder or MLflow id, in one table
python -m evaluation tune model=scene-llava harvest.tuning=200
torchrun --nproc-per-node 2 -m evaluation ...      by several processes
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import psutil
import torch
from mlflow import MlflowClient
from mlflow.entities import RunInfo
from mlflow.exceptions import MlflowException

from configs import TrainConfig, digest
from data.errors import LockTimeoutError
from data.locks import exclusively
from data.ranks import rank_of_this_process
from data.vlm import load_vlm
from evaluation import report
from evaluation.compare import Comparison, compare
from evaluation.errors import EvaluationError, UnfinishedError
from evaluation.reference import prepare_reference
from evaluation.settings import EvaluationSettings
from evaluation.tables import bullets, markdown, paragraph, table
from pipeline import pages, runs
from pipeline.checks import check_all
from pipeline.folders import RunFolder, latest_run, named_folders, new_folder
from pipeline.harvest import evaluation_images
from pipeline.tracking import impatient
from scr_runtime import SCR, SourcePredictor, load_predictor
from scr_runtime.errors import PredictorMismatchError
from scr_runtime.files import write_file


def run(config: TrainConfig, command: str = "") -> int:
    """Compares, prints the tables, writes the report, and logs it below the predictor's run."""
    settings = config.evaluation.for_command
    check_all([config], ["evaluation"])
    if {"pope", "fidelity"} & set(settings.benchmarks) and not settings.asks:
        raise EvaluationError("evaluation.images=0 compares no answers: give a number of images, or pope_files")
    folders = predictor_folders(config, settings)
    predictors = {
        name: load_predictor(folder) for name, folder in folders.items()
    }  # first: the questions take minutes
    for name, folder in folders.items():
        fitted = _provenance(predictors[name]).get("data_name")
        words = f", fitted on data={fitted}" if fitted else ""
        print(paragraph(f"predictor {name}: {os.path.relpath(folder.resolve())}{words}".replace(" :", ":")))
    images = evaluation_images(config, settings)
    rank = rank_of_this_process()
    device = rank.device(config.model.device, torch.cuda.device_count())
    model, processor = load_vlm(config.model.model_copy(update={"device": device}))
    for folder in folders.values():
        check_predictor(folder, model, processor, config)
    reference = prepare_reference(model, processor, config.scr, images, settings, config.paths.cache, rank)
    reference.origin["model_name"], reference.origin["data_name"] = config.model.name, config.data.name
    try:
        comparison = compare(reference, predictors, settings)
    except UnfinishedError as unfinished:
        print(paragraph(str(unfinished)))
        return 0
    lock = config.paths.cache / "evaluation-report.lock"
    try:
        with exclusively(lock, 600.0 * (rank.size == 1), "writing its report"):
            written = config.paths.cache / f"evaluation-{_digest(comparison)}.txt"
            if rank.size > 1 and written.exists() and Path(written.read_text(encoding="utf-8")).is_dir():
                print(f"{rank}: another rank has written the report: {written.read_text(encoding='utf-8')}")
                return 0
            folder = write_report(config, comparison, command, next(iter(predictors.values()), None))
            write_file(written, str(folder.absolute()).encode())
    except LockTimeoutError:
        print(f"{rank}: another rank writes the report")
    return 0


def write_report(config: TrainConfig, comparison: Comparison, command: str, predictor: SourcePredictor | None) -> Path:
    """Prints the tables, writes the files into the folder of the predictor's run, and logs them to MLflow."""
    embedded = config.data.world is not None and not comparison.settings.pope_files
    print_comparison(comparison, embedded=embedded)
    folder = new_folder(run_of_the_predictor(config) / "evaluations")
    files = report.write(folder, comparison, embedded=embedded, command=command)
    print("\n" + paragraph(f"report: {files['html']}"))
    print(paragraph(f"answers, one line each: {files['answers']}"))
    if predictor is not None:
        log_below_run(config, predictor, comparison, folder)
    return folder


def run_of_the_predictor(config: TrainConfig) -> Path:
    """Folder of the run that made the first named predictor; the newest run's for a predictor that lies elsewhere."""
    for place in config.evaluation.predictors[:1]:
        run = RunFolder(Path(place).expanduser().resolve().parent)
        if run.record and os.access(run.path, os.W_OK):
            return run.path
    latest = config.paths.latest
    return latest.resolve() if latest.exists() else latest.parent


def _digest(comparison: Comparison) -> str:
    """Identity of a result: its answers and its settings."""
    answers = sorted(store.digest for store in comparison.stores.values())
    return digest(answers, comparison.settings)[:24]


def print_comparison(comparison: Comparison, *, embedded: bool) -> None:
    """Prints the verdict, the tables and what they say."""
    found = report.verdict(comparison)
    print(f"\n{paragraph(found.sentence)}\n{bullets([found.reason])}\n")
    for prompt in comparison.prompts:
        print(f"prompt {prompt.name}\n\n{table(report.answer_rows(comparison, prompt))}\n")
    if comparison.prompts:
        print(paragraph(report.LEGEND) + "\n")
    for rows in (report.caption_rows(comparison), report.fidelity_rows(comparison)):
        if rows:
            print(table(rows) + "\n")
    print(bullets(report.reading(comparison, embedded=embedded)))


def check_predictor(folder: Path, model: Any, processor: Any, config: TrainConfig) -> None:
    """Checks that a predictor was fitted for this model, and that its settings can be used.

    Raises:
        PredictorError: If not; names the folder.
    """
    try:
        SCR(model, config=config.scr, predictor=folder, mode="one-pass", processor=processor)
    except PredictorMismatchError as error:
        raise PredictorMismatchError(
            f"{folder}: {error}. Name a predictor of {config.model.name} (predictor=FOLDER), or its model (model=NAME)"
        ) from None


def predictor_folders(config: TrainConfig, settings: EvaluationSettings) -> dict[str, Path]:
    """Name -> predictor folder: those of `evaluation.predictors`, else the newest run's; none where none is needed."""
    if not {"one-pass", "auto"} & set(settings.methods):
        return {}
    if not settings.predictors:
        return {"": latest_run(config).predictor}
    return named_folders(settings.predictors, [])


def log_below_run(config: TrainConfig, predictor: SourcePredictor, comparison: Comparison, folder: Path) -> None:
    """Logs a comparison as a run below the one that made the predictor, if the tracking store has that.

    The predictor's run keeps its own numbers: they may be of other questions.
    """
    made = _provenance(predictor).get("mlflow_run_id")
    if not made or (config.tracking.uri is None and not config.paths.mlflow_db.exists()):
        return
    try:
        with impatient():
            client = MlflowClient(config.tracking_uri)
            experiment = client.get_experiment(client.get_run(made).info.experiment_id).name
        name = runs.unused_name(client, experiment, f"evaluation: {config.data.name}, {comparison.images} images")
        started = psutil.Process().create_time()
        run = runs.create_run(client, experiment, name, {"run.kind": "evaluation"}, made, started)
        try:
            _log_files(client, run.info, config, comparison, folder)
        except BaseException:
            client.set_terminated(run.info.run_id, "FAILED")
            raise
        client.set_terminated(run.info.run_id)
    except (MlflowException, OSError) as error:  # the report is written, and stays
        words = f"not logged below run {made} of {config.tracking_uri}, which made the predictor"
        print(paragraph(f"{words}: {error}"))
        return
    print(paragraph(f"logged as run {run.info.run_id}, below the predictor's run {made}"))
    print(paragraph(f"compare runs: {pages.where_runs_are(config, run.info.experiment_id)}"))


def _log_files(client: MlflowClient, info: RunInfo, config: TrainConfig, comparison: Comparison, folder: Path) -> None:
    for key, value in {"model.name": config.model.name, "data": config.data.name}.items():
        client.log_param(info.run_id, key, value)
    runs.log_metrics(client, info.run_id, report.headlines(comparison))
    client.log_artifacts(info.run_id, str(folder), "reports")
    files = {"reports/evaluation.html": "report", "reports/answers.jsonl": "answers"}
    found = report.verdict(comparison)
    parts = [f"**{found.sentence}**", pages.artifact_links(info, files), found.reason]
    parts += map(markdown, report.headline_tables(comparison))
    pages.describe_run(client, info.run_id, "\n\n".join(parts))
    newest = f"{pages.run_link(info)}: **{found.sentence}**"
    pages.describe_experiment(client, info.experiment_id, "evaluation", newest)


def _provenance(predictor: SourcePredictor) -> dict[str, Any]:
    return (getattr(predictor, "info", None) or {}).get("provenance") or {}
