"""Runs of the chain: one configuration, or a grid of them as children of one MLflow run for each model."""

from __future__ import annotations

import itertools
import json
import math
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import psutil
from mlflow import MlflowClient
from mlflow.entities import Run
from pytorch_lightning.loggers import MLFlowLogger

from configs import Child, Sweep, TrainConfig, digest
from configs.grid import short_names
from evaluation import sweep_report
from evaluation.paper import row_of, table_rows
from evaluation.sweep_report import Trial
from evaluation.tables import paragraph, table
from pipeline import pages, runs
from pipeline.exits import STOPS, print_error
from pipeline.folders import RunFolder, finish_run, open_run
from pipeline.result import describe, last_line, log_comparison, log_fit, print_result, register
from pipeline.stages import SELECTED_BY, Result, Work, compare_answers, export, fit_predictor, shared_settings
from pipeline.tracking import every_number, find_run

RESULT_TAG = "config.fingerprint"
"""Identity of what decided a run's result; set last, so that a run that has it is complete."""
GRID_TAG = "sweep.fingerprint"


def run_once(child: Child, client: MlflowClient) -> int:
    """Runs one configuration, and ends with its verdict; returns 0, the number of failed runs."""
    config = child.config
    work = Work(config)  # first: a slip that it finds leaves no run
    with open_run(config) as folder:
        with runs.tracked(child, client, folder) as tracker:
            result = chain(config, work, folder, tracker)
        notes = finish_run(folder, config)
        print_result(config, folder, result, str(tracker.experiment_id))
    for note in notes:
        print(paragraph(f"note: {note}"))
    register(client, config, str(tracker.run_id))
    print(f"{ended()}\n\n{paragraph(last_line(config, result), strong=True)}")
    return 0


def ended() -> str:
    """How long this process took, its start-up included."""
    return f"done in {(time.time() - psutil.Process().create_time()) / 60:.1f} minutes"


def chain(config: TrainConfig, work: Work, folder: RunFolder, tracker: MLFlowLogger) -> Result:
    """Fits, exports and compares; all of it goes to MLflow. What an interrupted run has done is not done again."""
    client, run = tracker.experiment, str(tracker.run_id)
    runs.log_data(client, run, config, work.harvested)
    fitted = fit_predictor(config, work, folder, tracker)
    packed = export(config, fitted, work, folder, run)
    model_id = log_fit(config, work, folder, fitted, packed, tracker)
    result = Result(fitted, packed, compare_answers(config, work, packed.exported))
    log_comparison(config, folder, result, tracker, model_id)
    describe(config, result, tracker, model_id)
    client.set_tag(run, RESULT_TAG, work.result_id(config))
    return result


def run_sweep(sweep: Sweep, client: MlflowClient) -> int:
    """Runs every child, those of a model under one parent run; returns how many have no result.

    What children share is made once for all that share it; what an earlier command finished is not run again.
    """
    failed, numbers = 0, itertools.count(1)
    models, parents = dict[str, list[Trial]](), list[str]()
    for children in _grouped(sweep.children, lambda config: [config.experiment, config.model.name]):
        parent = open_parent(children, sweep, client)
        trials = {child.label: Trial(child.choices, "not run", {}) for child in children}
        try:
            for sharing in _grouped(children, shared_settings):
                for child, trial in run_children(sharing, parent, client, numbers, len(sweep.children)):
                    trials[child.label] = trial
        finally:
            failed += close_parent(children, list(trials.values()), parent, client)
        models[children[0].config.model.name] = list(trials.values())
        parents.append(parent.info.run_id)
    if len(models) > 1:
        compare_models(sweep.children[0].config, models, parents, client)
    return failed


def run_children(
    children: Sequence[Child], parent: Run, client: MlflowClient, numbers: Iterator[int], total: int
) -> Iterator[tuple[Child, Trial]]:
    """Runs children that share model and harvest; an error of one is printed, and the next one starts."""
    try:
        work = Work(children[0].config)
    except Exception as error:
        print_error(error)
        for _ in children:
            next(numbers)
        return
    for child, number in zip(children, numbers, strict=False):
        result_id = work.result_id(child.config)  # whatever command finished it
        run = find_run(client, child.config.experiment, RESULT_TAG, result_id, "FINISHED")
        words = f"[child {number}/{total}] {child.label}" + (" (finished before)" if run else "")
        print(f"\n{paragraph(words)}", flush=True)
        if run is None:
            run_id = ""
            try:
                with open_run(child.config) as folder:
                    with runs.tracked(child, client, folder, parent) as tracker:
                        run_id = str(tracker.run_id)
                        chain(child.config, work, folder, tracker)
                    finish_run(folder, child.config)
            except STOPS:
                raise
            except Exception as error:
                print_error(error)
                yield child, Trial(child.choices, "FAILED", {}, run_id)
                continue
            run = client.get_run(run_id)
        metrics = every_number(client, run)
        print(paragraph(sweep_report.headline(metrics)))
        yield child, Trial(child.choices, "FINISHED", metrics, run.info.run_id)


def open_parent(children: Sequence[Child], sweep: Sweep, client: MlflowClient) -> Run:
    """Reopens the parent run that an earlier command left for this very grid, or creates one."""
    experiment = children[0].config.experiment
    grid = digest(sorted(str(child.config.variant) for child in children))
    if found := find_run(client, experiment, GRID_TAG, grid):
        client.update_run(found.info.run_id, status="RUNNING")
        return found
    swept_names = " x ".join(short_names(sweep.keys).values())
    number = f"{len(children)} trials" if children[0].config.trainer.trial else str(len(children))
    name = runs.unused_name(client, experiment, f"sweep: {swept_names} ({number})")
    tags = {"run.kind": "sweep", "sweep.keys": " ".join(sweep.keys), GRID_TAG: grid}
    parent = runs.create_run(client, experiment, name, tags)
    swept = {key: list(dict.fromkeys(child.choices[key] for child in children)) for key in sweep.keys}
    for key, values in swept.items():
        client.log_param(parent.info.run_id, key, ",".join(values)[:250])
    client.log_dict(parent.info.run_id, {"keys": list(swept), "values": swept}, "sweep/sweep.yaml")
    return parent


def close_parent(children: Sequence[Child], trials: Sequence[Trial], parent: Run, client: MlflowClient) -> int:
    """Reports the sweep of one model in the terminal and on the parent run; returns how many have no result."""
    config, run, names = children[0].config, parent.info.run_id, short_names(children[0].choices)
    missing = sum(not _finished(trial) for trial in trials)
    folder = config.paths.sweeps / f"summary-{parent.data.tags[GRID_TAG][:8]}"
    title = f"{config.model.name}: {parent.info.run_name}"
    for file in sweep_report.write(folder, trials, names, title):
        client.log_artifact(run, str(file), "sweep")
    pairs = list(zip(children, trials, strict=True))
    known = {child.short_label: trial.run_id for child, trial in pairs if trial.run_id}
    winner, best = max(pairs, key=lambda pair: _selected_by(pair[1]))
    chosen = f"best by val/mass: {winner.label} ({best.metrics[SELECTED_BY]:.4f})" if _finished(best) else ""
    pages.describe_sweep(client, parent, sweep_report.markdown_text(trials, names), known, chosen)
    print(f"\n{paragraph(title)}\n\n{sweep_report.summary_table(trials, names)}")
    if any(len(cell.means) and cell.finished > 1 for cell in sweep_report.cells(trials)):
        print(paragraph(sweep_report.NOTE))
    for child, trial in pairs:
        if trial.status != "FINISHED":
            state = trial.status + (f", run {trial.run_id}" if trial.run_id else "")
            print(paragraph(f"without a result: {child.label} ({state})"))
    if chosen:
        print(paragraph(chosen))
    if not missing:
        register(client, config, best.run_id)
        runs.log_metrics(client, run, pages.columns(best.metrics))
    print(f"\n{paragraph(f'summary: {folder}')}\n{paragraph(f'children: {config.paths.sweeps}')}")
    print(paragraph(f"compare runs: {pages.where_runs_are(config, parent.info.experiment_id)}"))
    client.set_terminated(run, "FAILED" if missing else "FINISHED")
    return missing


def compare_models(
    config: TrainConfig, models: Mapping[str, Sequence[Trial]], parents: Sequence[str], client: MlflowClient
) -> None:
    """Puts a sweep's models into one table, in the terminal and on each model's parent run.

    Args:
        config: Of one child; it names the folder of the sweeps and MLflow's place.
        models: Name of each model -> its children, as far as they came.
        parents: Their parent runs.
        client: Of the tracking store.
    """
    trials = [trial for own in models.values() for trial in own]
    names = short_names(trials[0].choices)
    best = {name: max(own, key=_selected_by) for name, own in models.items() if any(map(_finished, own))}
    answers = table_rows([row_of(name, trial.metrics) for name, trial in best.items()])
    title = f"{len(models)} models: {', '.join(models)}"
    folder = config.paths.sweeps.parent / f"models-{digest(sorted(parents))[:8]}"
    for file in sweep_report.write(folder, trials, names, title, answers):
        for parent in parents:
            client.log_artifact(parent, str(file), "models")
    print(f"\n{paragraph(title)}\n\n{sweep_report.summary_table(trials, names)}")
    print(f"\nAnswers of each model's best child\n\n{table(answers)}")
    print("\n" + paragraph(f"tables and figure: {folder}"))
    for parent in parents:
        pages.describe_models(client, client.get_run(parent), title)
    page = _comparison_page([trial.run_id for trial in best.values()], client)
    print(paragraph(f"compare models: {pages.server(config)}{page}"))


def _finished(trial: Trial) -> bool:
    return trial.status == "FINISHED"


def _selected_by(trial: Trial) -> float:
    return trial.metrics[SELECTED_BY] if _finished(trial) else -math.inf


def _comparison_page(run_ids: Sequence[str], client: MlflowClient) -> str:
    """The address of MLflow's page that compares runs, on the server that `make ui` starts."""
    experiments = dict.fromkeys(client.get_run(run_id).info.experiment_id for run_id in run_ids)
    chosen = {"runs": run_ids, "experiments": list(experiments)}
    query = {key: json.dumps(list(values), separators=(",", ":")) for key, values in chosen.items()}
    return f"http://127.0.0.1:5000/#/compare-runs?{urllib.parse.urlencode(query)}"


def _grouped(children: Sequence[Child], key: Callable[[TrainConfig], Any]) -> list[list[Child]]:
    groups: dict[str, list[Child]] = {}
    for child in children:
        groups.setdefault(digest(key(child.config)), []).append(child)
    return list(groups.values())
