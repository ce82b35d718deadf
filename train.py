"""The whole chain, read top to bottom: harvest if it is missing, fit, export, compare.

python train.py                                    the embedded world, in minutes
python train.py model=llava-1.5-7b data=coco2014 data.root=/path/to/coco2014
python train.py predictor.loss=kl,bce seed=0,1,2   a sweep: six children of one MLflow run
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads made a shared machine 8 times slower
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # not a page of database migrations at the first run

import pytorch_lightning as pl
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from pytorch_lightning.loggers import MLFlowLogger

from configs.load import ConfigError, fingerprint, read_config, save_config
from configs.schema import TrainConfig
from configs.sweep import Child, Sweep, parse_sweep, short_names
from data.datamodule import ShardDataModule
from data.errors import DataError
from data.harvest import harvest_from_config, held_out_images, training_images
from data.shards import ShardReader
from data.vlm import library_versions, load_vlm, unprocessed
from evaluation import fit as fit_report
from evaluation import report
from evaluation import sweep as sweep_report
from evaluation.compare import Comparison, Reference, compare, measure_reference
from evaluation.sweep import Trial
from export import registry
from export.package import Exported, export_predictor
from predictor import baselines
from predictor.calibration import ConfidenceRows, calibration_summary, confidence_rows
from predictor.figures import map_example, reliability_figure, source_maps_figure
from predictor.fit import Preempted, fit, interrupted_run
from predictor.metrics import Interval, summarise_rows
from predictor.module import SourceModule
from scr_runtime import SCRConfig, describe_model
from scr_runtime.errors import SCRError

_FIGURE_IMAGES = 4
_SELECTED_BY = "val/best_mass"
_PLACES = ("runs_dir", "variant", "harvest.name", "tracking.")
_STOPS = (KeyboardInterrupt, SystemExit, Preempted)
"""What ends a sweep, not one child alone."""
_EXPECTED = (DataError, SCRError, FileNotFoundError, ValueError)
"""Errors whose message tells a user enough."""


@dataclass(frozen=True)
class Work:
    """What all fits on one harvest share."""

    model: Any
    processor: Any
    harvested: Mapping[str, Any]
    data: ShardDataModule
    references: dict[str, Reference] = field(default_factory=dict)
    """Answers that need no predictor, by the settings that they follow from."""
    others: dict[str, dict[str, dict[str, Interval]]] = field(default_factory=dict)
    """Floors and ceiling on the test split, by the same."""


@dataclass(frozen=True)
class Fit:
    """A finished fit: its best checkpoint, its rows on the test split and those of floors and ceiling."""

    module: SourceModule
    metrics: dict[str, Interval]
    floors: dict[str, dict[str, Interval]]


@dataclass(frozen=True)
class Result:
    """What a run found out; `comparison` is None where no answers were compared."""

    fit: Fit
    exported: Exported
    rows: ConfidenceRows
    confidence: dict[str, float]
    comparison: Comparison | None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the chain, or a sweep of chains; returns the exit code."""
    sweep = parse_sweep(argv, "python train.py", "Harvest, fit, export and compare a one-pass predictor.")
    _quieten()
    signal.signal(signal.SIGTERM, _end)  # a fit has a handler of its own
    started = time.perf_counter()
    config = sweep.children[0].config
    try:
        experiments = list(dict.fromkeys(child.config.experiment for child in sweep.children))
        client = registry.connect(config.tracking_uri, experiments, config.paths.mlflow_artifacts)
    except Exception as error:  # MLflow wraps every store's own errors; before any work, all mean the same
        print(f"error: MLflow at {config.tracking_uri} cannot be used: {error}\nSee tracking.uri.", file=sys.stderr)
        return 1
    try:
        failed = run_sweep(sweep, client) if sweep.keys else run_once(sweep.children[0], client)
    except _EXPECTED as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Preempted as stop:
        print(f"\n{stop}\nThe same command again goes on from there.", file=sys.stderr)
        return 143  # 128 + SIGTERM: what a shell reports of a process that the signal ended
    except KeyboardInterrupt:
        print("\nstopped; what is finished is kept, and the same command goes on from there", file=sys.stderr)
        return 130
    if failed:
        print(f"error: {failed} of {len(sweep.children)} children have no result", file=sys.stderr)
        return 1
    print(f"done in {(time.perf_counter() - started) / 60:.1f} minutes")
    return 0


def _end(*_: object) -> None:
    raise Preempted("SIGTERM: what is finished is kept.")


def run_once(child: Child, client: MlflowClient) -> int:
    """One configuration, one run; nothing has failed where this returns."""
    config = child.config
    with tracked(child, client) as tracker:
        work = prepare(config)
        result = chain(config, work, tracker)
    tell(config, SCRConfig(**dataclasses.asdict(config.model.scr)), result, str(tracker.run_id))
    register(client, config, str(tracker.run_id))
    return 0


def prepare(config: TrainConfig) -> Work:
    """Loads the model, and harvests what is missing."""
    step(1, f"model {config.model.name} and images of {config.data.name}")
    model, processor = load_vlm(**config.model.loading)
    step(2, "harvest: attention maps and block-0 states of the training images")
    harvested = harvest_from_config(config, model, processor, overwrite=True)
    data = ShardDataModule(
        config.paths.harvest,
        config.trainer.batch_size,
        config.trainer.num_workers,
        seed=config.seed,
        cache=config.trainer.cache,
        stream_from=config.trainer.stream_from,
        **_chosen(config),
    )
    return Work(model, processor, harvested, data)


def _chosen(config: TrainConfig) -> dict[str, Any]:
    return {"train_images": config.trainer.train_images, "mean_maps": config.predictor.target == "mean"}


def chain(config: TrainConfig, work: Work, tracker: MLFlowLogger) -> Result:
    """Fit, export, compare; all of it goes to MLflow."""
    scr = SCRConfig(**dataclasses.asdict(config.model.scr))
    work.data.seed, work.data.batch_size = config.seed, config.trainer.batch_size  # children share its shards
    work.data.choose(**_chosen(config))
    log_data(config, work, tracker)
    step(3, "fit: the predictor learns the maps")
    fit = fit_predictor(config, scr, work, tracker)
    step(4, "export: the predictor folder, calibrated, reloaded and compared")
    exported = export(config, scr, fit, work, tracker)
    rows = confidence_rows(fit.module.score, work.data.test_dataloader(), scr)
    confidence = calibration_summary(exported.calibration, rows)
    result = Result(fit, exported, rows, confidence, compare_answers(config, scr, work, exported))
    log_result(config, scr, work, result, tracker)
    tracker.experiment.set_tag(tracker.run_id, "config.fingerprint", _fingerprint(config, work))  # it is complete
    return result


# -- sweeps ----------------------------------------------------------------------------------------------------------


def run_sweep(sweep: Sweep, client: MlflowClient) -> int:
    """Runs every child, those of a model under one parent run; returns how many have no result.

    What children share is made once for all that share it; what an earlier command finished is not run again.
    """
    failed, numbers = 0, itertools.count(1)
    for children in _grouped(sweep.children, lambda config: [config.experiment, config.model.name]):
        parent = open_parent(children, sweep, client)
        trials = {child.label: Trial(child.choices, "not run", {}) for child in children}
        try:
            for sharing in _grouped(children, _shared):
                for child, trial in run_children(sharing, parent, client, numbers, len(sweep.children)):
                    trials[child.label] = trial
        finally:
            failed += close_parent(children, list(trials.values()), parent, client)
    return failed


def run_children(
    children: Sequence[Child], parent: Run, client: MlflowClient, numbers: Iterator[int], total: int
) -> Iterator[tuple[Child, Trial]]:
    """Runs children that share model and harvest; one that fails is told, and the next one starts."""
    try:
        work = prepare(children[0].config)
    except Exception as error:
        _tell_error(error)
        for _ in children:
            next(numbers)
        return
    for child, number in zip(children, numbers, strict=False):
        same = _fingerprint(child.config, work)  # whatever command it was that finished it
        run = registry.find_run(client, child.config.experiment, "config.fingerprint", same, "FINISHED")
        print(f"\n[child {number}/{total}] {child.label}" + (" (finished before)" if run else ""), flush=True)
        if run is None:
            run_id = ""
            try:
                with tracked(child, client, parent) as tracker:
                    run_id = str(tracker.run_id)
                    chain(child.config, work, tracker)
            except _STOPS:
                raise
            except Exception as error:
                _tell_error(error)
                yield child, Trial(child.choices, "FAILED", {}, run_id)
                continue
            run = client.get_run(run_id)
        metrics = {name: value for name, value in run.data.metrics.items() if not name.startswith("system/")}
        print(sweep_report.headline(metrics))
        yield child, Trial(child.choices, "FINISHED", metrics, run.info.run_id)


def open_parent(children: Sequence[Child], sweep: Sweep, client: MlflowClient) -> Run:
    """Takes up the parent run that an earlier command left for this very grid, or opens one."""
    experiment = children[0].config.experiment
    grid = fingerprint(sorted(str(child.config.variant) for child in children))
    if found := registry.find_run(client, experiment, "sweep.fingerprint", grid):
        client.update_run(found.info.run_id, status="RUNNING")
        return found
    name = f"sweep: {' x '.join(short_names(sweep.keys).values())} ({len(children)})"
    tags = {"run.kind": "sweep", "sweep.keys": " ".join(sweep.keys), "sweep.fingerprint": grid}
    parent = registry.create_run(client, experiment, name, tags)
    swept = {key: list(dict.fromkeys(child.choices[key] for child in children)) for key in sweep.keys}
    for key, values in swept.items():
        client.log_param(parent.info.run_id, key, ",".join(values)[:250])
    client.log_dict(parent.info.run_id, {"keys": list(swept), "values": swept}, "sweep/sweep.yaml")
    return parent


def close_parent(children: Sequence[Child], trials: Sequence[Trial], parent: Run, client: MlflowClient) -> int:
    """Tells the sweep of one model in the terminal and on the parent run; returns how many children have no result."""
    config, run, names = children[0].config, parent.info.run_id, short_names(children[0].choices)
    missing = sum(trial.status != "FINISHED" for trial in trials)
    folder = config.paths.sweeps / f"summary-{parent.data.tags['sweep.fingerprint'][:8]}"
    title = f"{config.model.name}: {parent.info.run_name}"
    files = sweep_report.write(folder, trials, names, title)
    for file in files:
        client.log_artifact(run, str(file), "sweep")
    report.log(run, config.tracking_uri, sweep_report.summary_metrics(trials, names), [])
    print(f"\n{title}\n\n{report.table(sweep_report.summary_rows(trials, names))}")
    if any(len(cell.means) and cell.finished > 1 for cell in sweep_report.cells(trials)):
        print(sweep_report.NOTE)
    for trial in trials:
        if trial.status != "FINISHED":
            label = " ".join(f"{key}={value}" for key, value in trial.choices.items())
            print(f"without a result: {label} ({trial.status}" + (f", run {trial.run_id})" if trial.run_id else ")"))
    if not missing:
        register(client, config, max(trials, key=lambda trial: trial.metrics[_SELECTED_BY]).run_id)
    print(f"\nsummary: {folder}\nchildren: {config.paths.sweeps}")
    print(f"compare runs: {_ui(config)}  (experiment {config.experiment!r}, run {run})")
    client.set_terminated(run, "FAILED" if missing else "FINISHED")
    return missing


def _grouped(children: Sequence[Child], key: Callable[[TrainConfig], Any]) -> list[list[Child]]:
    groups: dict[str, list[Child]] = {}
    for child in children:
        groups.setdefault(fingerprint(key(child.config)), []).append(child)
    return list(groups.values())


def _shared(config: TrainConfig) -> list[Any]:
    """What `prepare` looks at, but for seed and batch size, which `chain` sets."""
    model, trainer = config.model, config.trainer
    reading = [trainer.num_workers, trainer.cache, trainer.stream_from]
    return [
        model.loading,
        model.scr.attention_layers,
        model.scr.state_layer,
        dataclasses.asdict(config.data),
        dataclasses.asdict(config.harvest),
        reading,
    ]


def _tell_error(error: Exception) -> None:
    if isinstance(error, _EXPECTED):
        print(f"error: {error}", file=sys.stderr)
    else:
        traceback.print_exception(error)


# -- MLflow ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def tracked(child: Child, client: MlflowClient, parent: Run | None = None) -> Iterator[MLFlowLogger]:
    """A run with the resolved configuration; its status tells how the block ended.

    It is the run of an interrupted fit of the same configuration, if that fit is to be gone on with.
    """
    config, paths = child.config, child.config.paths
    earlier = interrupted_run(paths.checkpoints) if config.trainer.resume and paths.config.exists() else None
    goes_on = earlier is not None and _same_as_saved(config)
    paths.reports.mkdir(parents=True, exist_ok=True)
    save_config(config, paths.config)
    name = child.short_label or f"{config.model.name}-{config.predictor.loss}-seed{config.seed}"
    tags = {"run.kind": "child", "sweep.choice": child.label} if parent else {"run.kind": "single"}
    run = registry.reopen_run(client, earlier) if goes_on and earlier else None
    if run is None:
        run = registry.create_run(client, config.experiment, name, tags, parent.info.run_id if parent else None)
        client.log_metric(run.info.run_id, _SELECTED_BY, 0.0, step=0)  # MLflow's comparison starts with the first one
    with registry.recorded(client, run.info.run_id, config.tracking_uri, _STOPS):
        tracker = MLFlowLogger(config.experiment, tracking_uri=config.tracking_uri, run_id=run.info.run_id)
        settings = _flat(dataclasses.asdict(config))  # all but places, which would only tell apart what is alike
        tracker.log_hyperparams({**child.groups, **{k: v for k, v in settings.items() if not k.startswith(_PLACES)}})
        client.log_artifact(run.info.run_id, str(paths.config))
        yield tracker


def _same_as_saved(config: TrainConfig) -> bool:
    try:
        return read_config(TrainConfig, config.paths.config) == config
    except ConfigError:  # of another version of the project
        return False


def log_data(config: TrainConfig, work: Work, tracker: MLFlowLogger) -> None:
    """Records which maps the fit saw."""
    client, run, harvested = tracker.experiment, str(tracker.run_id), work.harvested
    client.set_tag(run, "data.fingerprint", harvested["fingerprint"])
    for key in ("images", "samples", "skipped", "bytes"):
        client.log_metric(run, f"harvest/{key}", harvested[key])
    name = f"{config.model.name}-{config.data.name}"
    registry.log_dataset(client, run, name, str(harvested["fingerprint"]), str(harvested["directory"]))


def _fingerprint(config: TrainConfig, work: Work) -> str:
    return fingerprint(config.deciding, str(work.harvested["fingerprint"]))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


# -- fit and export --------------------------------------------------------------------------------------------------


def fit_predictor(config: TrainConfig, scr: SCRConfig, work: Work, tracker: MLFlowLogger) -> Fit:
    """Fits with Lightning, takes the epoch of best validation mass, and measures it beside floors and ceiling."""
    pl.seed_everything(config.seed, verbose=False)
    trainer, data = config.trainer, work.data
    module = SourceModule(data.hidden_size, **config.fitting)
    count = module.predictor.count_parameters()
    print(f"{count:,} parameters, rank {module.predictor.config.rank}; {data.count('train'):,} training maps")
    tracker.log_metrics({"predictor/parameters": count})
    module.compute_statistics(data.train_dataloader())
    fitted = fit(
        module,
        data,
        config.paths.checkpoints,
        logger=tracker,
        max_epochs=trainer.max_epochs,
        patience=trainer.patience,
        gradient_clip=trainer.gradient_clip,
        accelerator=trainer.accelerator,
        devices=trainer.devices,
        precision=trainer.precision,
        resume=trainer.resume,
    )
    tracker.experiment.update_run(tracker.run_id, status="RUNNING")  # Lightning's logger takes it for finished
    tracker.log_metrics({_SELECTED_BY: fitted.score}, step=fitted.epochs)
    print(f"best epoch: val/mass {fitted.score:.4f} after {fitted.epochs} epochs")
    module = fitted.module
    return Fit(module, measure(config, scr, work, module.score), measure_others(config, scr, work))


def measure(config: TrainConfig, scr: SCRConfig, work: Work, score: baselines.Score) -> dict[str, Interval]:
    """Metrics of a predictor, or of a rule, on the test split."""
    rows = baselines.evaluate(score, work.data.test_dataloader(), scr)
    return summarise_rows(rows, config.evaluation.bootstrap, config.evaluation.seed)


def measure_others(config: TrainConfig, scr: SCRConfig, work: Work) -> dict[str, dict[str, Interval]]:
    """Metrics of the floors and of the ceiling, once for all fits that share them."""
    evaluation = config.evaluation
    key = fingerprint(scr.to_dict(), evaluation.bootstrap, evaluation.seed, _chosen(config))
    if key not in work.others:
        rules = baselines.floors(work.data.train_dataloader(), scr.exclude_border, config.evaluation.seed)
        if config.harvest.prompts_per_image > 1:
            rules["other prompts (ceiling)"] = baselines.OtherPrompts.fit(
                work.data.test_dataloader(), scr.exclude_border
            )
        work.others[key] = {name: measure(config, scr, work, rule) for name, rule in rules.items()}
    return work.others[key]


def export(config: TrainConfig, scr: SCRConfig, fit: Fit, work: Work, tracker: MLFlowLogger) -> Exported:
    """Packs the best checkpoint with its metrics and origin."""
    exported = export_predictor(
        config.paths.checkpoints / "best.ckpt",
        config.paths.predictor,
        scr=scr,
        model=describe_model(work.model, work.processor),
        validation=work.data.val_dataloader(),
        target_fallback=config.predictor.target_fallback,
        target_fidelity=config.predictor.target_fidelity,
        metrics={f"test/{name}": interval.mean for name, interval in fit.metrics.items()},
        provenance={
            "mlflow_run_id": tracker.run_id,
            "data_fingerprint": work.harvested["fingerprint"],
            "loss": config.predictor.loss,
            "seed": config.seed,
            "libraries": library_versions(),
        },
    )
    print(f"{exported.folder}: reloaded, outputs equal to the checkpoint's")
    return exported


def compare_answers(config: TrainConfig, scr: SCRConfig, work: Work, exported: Exported) -> Comparison | None:
    """Asks the model under every mode; None if no answers are to be compared."""
    settings = config.evaluation
    if not settings.images:
        return None
    step(5, "compare: two-pass, one-pass, auto and the controls on held-out images")
    asked = {
        "num_images": settings.images,
        "questions_per_image": settings.questions_per_image,
        "batch_size": settings.batch_size,
        "seed": settings.seed,
    }
    key = fingerprint(scr.to_dict(), asked)
    if key not in work.references:
        images = held_out_images(config)
        work.references[key] = measure_reference(work.model, work.processor, scr, images, **asked)
    repeats = {"bootstrap": settings.bootstrap, "latency_repeats": settings.latency_repeats}
    return compare(work.references[key], exported.folder, **repeats)


# -- the result ------------------------------------------------------------------------------------------------------


def log_result(config: TrainConfig, scr: SCRConfig, work: Work, result: Result, tracker: MLFlowLogger) -> str:
    """Logs the predictor, every number, figures and reports to MLflow; returns the id of the LoggedModel."""
    client, run, folder = tracker.experiment, str(tracker.run_id), config.paths.reports
    shown = {"loss": config.predictor.loss, "seed": config.seed, "data": work.harvested["fingerprint"]}
    model_id = registry.log_predictor(client, run, result.exported.folder, shown)
    figures = {
        "maps.png": maps_figure(config, work.processor, result.fit.module, scr),
        "reliability.png": reliability_figure(result.exported.calibration, result.rows),
    }
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=130)
        client.log_artifact(run, str(folder / name), "figures")
    values, files = fit_report.metrics(result.fit.metrics, result.fit.floors, result.confidence), []
    if result.comparison is not None:
        values |= report.metrics(result.comparison)
        files = list(report.write(folder, result.comparison, embedded=config.data.world is not None).values())
    report.log(run, config.tracking_uri, values, files, model_id)
    return model_id


def tell(config: TrainConfig, scr: SCRConfig, result: Result, run: str) -> None:
    """Prints the tables and where everything is."""
    title = f"The predictor on {config.harvest.test} test images, K = {scr.num_sources}"
    print(f"\n{title} (95 % intervals over images; mass: attention recovered, of the best K's)\n")
    print(report.table(fit_report.source_rows(result.fit.metrics, result.fit.floors, scr.num_sources)))
    confidence = result.confidence
    print(
        f"\nconfidence on the test split: expected calibration error {confidence['ece']:.3f} isotonic, "
        f"{confidence['ece_temperature']:.3f} by temperature alone, {confidence['ece_raw']:.3f} raw; "
        f"{confidence['fallback']:.0%} of the maps under auto's threshold"
    )
    if (comparison := result.comparison) is not None:
        print(f"\nAnswers on {comparison.images} held-out images\n")
        print(report.table(report.answer_rows(comparison)))
        print("\n" + report.bullets(report.reading(comparison, embedded=config.data.world is not None)))
    folder = result.exported.folder
    print(f"\nreport and figures: {config.paths.reports}")
    print(f"predictor: {folder}  ({result.exported.predictor.count_parameters():,} parameters)")
    print(f"compare runs: {_ui(config)}  (experiment {config.experiment!r}, run {run})")
    print(f'use it: with SCR(model, predictor="{folder}", mode="auto"): model.generate(**inputs)')


def register(client: MlflowClient, config: TrainConfig, run: str) -> None:
    """Registers the predictor of a run, if a name for it is set."""
    name, model_id = config.tracking.register, registry.logged_model(client, run)
    if name is not None and model_id is not None:
        version = registry.register(client, model_id, name, run)
        print(f"registered: models:/{name}@{registry.ALIAS} is version {version}, of run {run}")


def maps_figure(config: TrainConfig, processor: Any, module: SourceModule, scr: SCRConfig) -> Any:
    """Map, prediction and chosen sources over test images, one question each."""
    images = training_images(config)
    samples = ShardReader(config.paths.harvest, "test")
    examples = []
    for number in range(min(_FIGURE_IMAGES, len(samples))):
        sample = samples[number]
        with torch.inference_mode():
            scores = module(sample.states[None], sample.grid, sample.question[:1])[0]
        examples.append(
            map_example(
                unprocessed(processor, images.open(sample.image_id)),
                sample.attention[0],
                scores,
                sample.grid,
                scr,
                sample.prompts[0]["text"],
            )
        )
    return source_maps_figure(examples)


def _ui(config: TrainConfig) -> str:
    """What to type, or to open, for MLflow's pages."""
    if config.tracking_uri == "sqlite:///runs/mlflow.db":
        return "make ui"
    return f"make ui URI={config.tracking_uri}" if "sql" in config.tracking_uri else config.tracking_uri


def step(number: int, text: str) -> None:
    """Prints a headline."""
    print(f"\n[{number}/5] {text}", flush=True)


def _quieten() -> None:
    """Silences what is no news to a user: advice about workers, and notices of libraries about each other."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    logging.getLogger("pytorch_lightning.loggers.mlflow").setLevel(
        logging.ERROR
    )  # "experiment not found, creating it"
    for message in (
        ".*does not have many workers.*",
        ".*exists and is not empty.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*number of training batches.*smaller than the logging interval.*",
    ):
        warnings.filterwarnings("ignore", message)


if __name__ == "__main__":
    sys.exit(main())
