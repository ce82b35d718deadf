"""What a run found: logged to MLflow with its figures, and printed."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from mlflow import MlflowClient
from pytorch_lightning.loggers import MLFlowLogger

from configs import TrainConfig
from data.chat import unprocessed
from data.shards import ShardReader
from evaluation import fit_report, report
from evaluation.figures import map_example, reliability_figure, source_maps_figure
from evaluation.fit_report import FitTable
from evaluation.methods import ONE_PASS
from evaluation.sweep_report import DPI
from evaluation.tables import bullets, markdown, paragraph, table
from evaluation.verdict import essentials
from export import registry
from export.card import write_card
from pipeline import pages, runs
from pipeline.folders import RunFolder
from pipeline.harvest import training_images
from pipeline.stages import Fit, Packed, Result, Work
from predictor.module import SourceModule
from scr_runtime.files import write_file
from scr_runtime.rule import source_rule

_FIGURE_IMAGES = 4
FIGURES = ("maps.png", "reliability.png")
"""Of the fit, in a run's reports/."""


def log_fit(
    config: TrainConfig, work: Work, folder: RunFolder, fitted: Fit, packed: Packed, tracker: MLFlowLogger
) -> str:
    """Logs the predictor, its metrics and its figures; returns the id of the LoggedModel.

    It comes before the comparison, which takes longest: what the fit found is kept if that fails.
    """
    client, run = tracker.experiment, str(tracker.run_id)
    shown = {"loss": config.predictor.loss, "seed": config.seed, "data": work.harvested.fingerprint}
    name = f"{config.model.name} {client.get_run(run).info.run_name}"
    model_id = registry.log_predictor(client, run, packed.exported.folder, shown, name)
    figures = (
        maps_figure(config, work.processor, fitted.module),
        reliability_figure(packed.exported.calibration, packed.rows),
    )
    for name, figure in zip(FIGURES, figures, strict=True):
        figure.savefig(folder.reports / name, dpi=DPI)
        client.log_artifact(run, str(folder.reports / name), "figures")
    values = fit_report.metrics(fitted.metrics, fitted.floors, packed.confidence)
    values |= {f"test/{name}": value for name, value in fitted.sources.metrics().items()}
    values["predictor/parameters"] = packed.exported.predictor.count_parameters()
    write_file(folder.reports / "fit.json", (json.dumps({"metrics": values}, indent=1) + "\n").encode())
    client.log_artifact(run, str(folder.reports / "fit.json"), "reports")
    headlines = fit_report.headlines(fitted.metrics, packed.confidence)
    data = (runs.dataset_name(config), str(work.harvested.fingerprint))
    runs.log_metrics(client, run, headlines, model_id, data)
    return model_id


def log_comparison(
    config: TrainConfig, folder: RunFolder, result: Result, tracker: MLFlowLogger, model_id: str
) -> None:
    """Writes the report of a run's comparison, if there is one, and logs it with its headline numbers."""
    comparison = result.comparison
    if comparison is None:
        return
    client, run = tracker.experiment, str(tracker.run_id)
    command = shlex.join(["python", *sys.argv])
    figures = [folder.reports / name for name in FIGURES]
    embedded, fitted = config.data.world is not None, replace(fit_table(config, result), figures=figures)
    files = report.write(folder.reports, comparison, embedded=embedded, command=command, fitted=fitted)
    runs.log_metrics(client, run, report.headlines(comparison), model_id)
    runs.log_curve(client, run, "auto_error", report.fallback_curve(comparison))
    for file in files.values():
        client.log_artifact(run, str(file), "reports")
    registry.log_card(client, model_id, write_card(folder.predictor, vars(report.verdict(comparison))))


def describe(config: TrainConfig, result: Result, tracker: MLFlowLogger, model_id: str) -> None:
    """Describes the run, its model and its experiment on MLflow's pages: verdict, tables, links, pictures."""
    client, comparison, sentence = tracker.experiment, result.comparison, last_line(config, result)
    info = client.get_run(tracker.run_id).info
    files = {"figures/maps.png": "maps", "figures/reliability.png": "reliability", "config.yaml": "settings"}
    if comparison is not None:
        answers = {"reports/answers.jsonl": "answers"} if comparison.prompts else {}
        files = {"reports/evaluation.html": "report", **answers, **files}
    parts = [f"**{sentence}**", pages.artifact_links(info, files, model_id)]
    if comparison is not None:
        parts += [report.verdict(comparison).reason, *map(markdown, report.headline_tables(comparison))]
    fitted = fit_table(config, result)
    parts += [fitted.title, markdown(fitted.rows), pages.picture(info, "figures/maps.png")]
    pages.describe_run(client, info.run_id, "\n\n".join(parts), model_id)
    kind = "trial" if config.trainer.trial else "run"
    pages.describe_experiment(client, info.experiment_id, kind, f"{pages.run_link(info)}: **{sentence}**")


def verdict_line(result: Result) -> str:
    """What a run shows, in one sentence."""
    if result.comparison is not None and result.comparison.prompts:
        return report.verdict(result.comparison).sentence
    mass, prior = result.fit.metrics["mass"], result.fit.floors["position"]["mass"]
    beaten = "beats" if mass.low > prior.high else "does not clearly beat"
    sentence = (
        f"No answers were compared; the predictor {beaten} a map of positions ({mass.mean:.3f} of the attention "
        f"recovered, against {prior.mean:.3f})."
    )
    found = result.comparison.fidelity if result.comparison is not None else {}
    kept, control = (one.edit_kept if (one := found.get(name)) else None for name in (ONE_PASS, "position"))
    if kept is None or control is None:
        return sentence
    return f"{sentence} It keeps {kept.mean:.0%} of two-pass's edit, a map of positions {control.mean:.0%}."


def last_line(config: TrainConfig, result: Result) -> str:
    """What a command ends with, and MLflow's pages begin with: the verdict, and whether it is a trial's."""
    return verdict_line(result) + " (A trial: fit the whole before you decide.)" * config.trainer.trial


def print_result(config: TrainConfig, folder: RunFolder, result: Result, experiment_id: str) -> None:
    """Prints the tables and where everything is."""
    fitted = fit_table(config, result)
    print("\n" + "\n".join(map(paragraph, [fitted.title, *fitted.notes])) + "\n")
    print(table(fitted.rows, marked=("predictor",)))
    print("\n" + paragraph(fitted.confidence))
    if (comparison := result.comparison) is not None:
        print(f"\n{'Answers' if comparison.prompts else 'Edits and cost'} on {comparison.images} held-out images")
        for rows in report.headline_tables(comparison):
            print("\n" + table(rows, marked=(report.deployed(comparison),)))
        if comparison.prompts:
            print("\n" + paragraph(report.LEGEND))
        print("\n" + bullets(essentials(comparison, embedded=config.data.world is not None)))
    count = result.packed.exported.predictor.count_parameters()
    link = config.paths.predictor
    predictor = link if link.resolve() == folder.predictor.resolve() else folder.predictor
    places = {
        "this run": folder.path,
        "report": folder.reports / ("evaluation.html" if comparison is not None else "fit.json"),
        "figures": folder.reports,
        "predictor": f"{predictor} ({count:,} parameters)",
        "compare runs": pages.where_runs_are(config, experiment_id),
    }
    print("\n" + "\n".join(paragraph(f"{name}: {place}") for name, place in places.items()))
    print(f'to try it:\n  predictor = "{predictor}"\n  with SCR(model, predictor=predictor, mode="auto"):')
    print("      model.generate(**inputs)")


def fit_table(config: TrainConfig, result: Result) -> FitTable:
    """What the fit of a run found."""
    sources, confidence = result.fit.sources, result.packed.confidence
    notes = ["95 % intervals over images; mass: attention on the chosen patches, as a share of the best K's."]
    if config.scr.source_fraction is None and sources.fewest < config.scr.num_sources:
        asked = f"num_sources={config.scr.num_sources} was asked"
        notes.insert(0, f"{asked}: at most half of a grid's eligible patches are used.")
    return FitTable(
        title=f"The predictor on {config.harvest.test} test images, K = {sources}.",
        notes=notes,
        rows=source_rows(result.fit),
        confidence=f"Confidence on the test split: expected calibration error {confidence['ece']:.3f} isotonic, "
        f"{confidence['ece_temperature']:.3f} by temperature alone, {confidence['ece_raw']:.3f} raw; "
        f"{confidence['fallback']:.0%} of the maps under auto's threshold.",
    )


def source_rows(fit: Fit) -> list[list[str]]:
    """Table of the predictor between floors and reference; its heads name K where that is one number."""
    head, *rows = fit_report.source_rows(fit.metrics, fit.floors, fit.sources.most)
    if fit.sources.fewest < fit.sources.most:
        head = [cell.replace(f"@{fit.sources.most}", "@K") for cell in head]
    return [head, *rows]


def register(client: MlflowClient, config: TrainConfig, run: str) -> None:
    """Registers the predictor of a run, if a name for it is set."""
    name, model_id = config.tracking.register_as, registry.logged_model(client, run)
    if name is not None and model_id is not None:
        version = registry.register(client, model_id, name, run)
        print(paragraph(f"registered: models:/{name}@{registry.ALIAS} is version {version}, of run {run}"))


def maps_figure(config: TrainConfig, processor: Any, module: SourceModule) -> Any:
    """Map, prediction and chosen sources over test images, one question each."""
    images = training_images(config)
    samples = ShardReader(Path(config.paths.harvest), "test")
    examples = []
    for number in range(min(_FIGURE_IMAGES, len(samples))):
        sample = samples[number].overview
        with torch.inference_mode():
            scores = module(sample.states[None], sample.grid, sample.question[:1])[0]
        picture = unprocessed(processor, images.open(sample.image_id))
        rule = source_rule(config.scr, sample.grid)
        examples.append(map_example(picture, sample.attention[0], scores, rule, sample.prompts[0]["text"]))
    return source_maps_figure(examples)
