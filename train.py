"""The whole chain, read top to bottom: harvest if it is missing, fit, export, compare.

python train.py                                    the embedded world, in minutes
python train.py model=llava-1.5-7b data=coco2014 data.root=/path/to/coco2014
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads made a shared machine 8 times slower
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # not a page of database migrations at the first run

import numpy as np
import pytorch_lightning as pl
import torch
from mlflow.entities import Dataset, DatasetInput
from pytorch_lightning.loggers import MLFlowLogger

from configs.load import parse_cli, save_config
from configs.schema import TrainConfig
from data.datamodule import ShardDataModule
from data.errors import DataError
from data.harvest import harvest_from_config, held_out_images, training_images
from data.shards import ShardReader
from data.vlm import library_versions, load_vlm, unprocessed
from evaluation import report
from evaluation.compare import Comparison, compare
from export.package import Exported, export_predictor
from predictor import baselines
from predictor.calibration import calibration_summary, confidence_rows
from predictor.figures import map_example, reliability_figure, source_maps_figure
from predictor.fit import Preempted, fit
from predictor.metrics import Interval, summarise_rows
from predictor.module import SourceModule
from scr_runtime import SCRConfig, describe_model
from scr_runtime.errors import SCRError

_FIGURE_IMAGES = 4


@dataclass(frozen=True)
class Fit:
    """A finished fit: its best checkpoint, its rows on the test split and those of floors and ceiling."""

    module: SourceModule
    metrics: dict[str, Interval]
    floors: dict[str, dict[str, Interval]]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the chain; returns the exit code."""
    config = parse_cli(TrainConfig, argv=argv, description="Harvest, fit, export and compare a one-pass predictor.")
    _quieten()
    started = time.perf_counter()
    try:
        tracker = start_run(config)
    except Exception as error:  # MLflow wraps every store's own errors; before any work, all mean the same
        print(f"error: MLflow at {config.tracking_uri} cannot be used: {error}\nSee tracking.uri.", file=sys.stderr)
        return 1
    status = "FAILED"
    try:
        chain(config, tracker)
        status = "FINISHED"
    except (DataError, SCRError, FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Preempted as stop:
        status = "KILLED"
        print(f"\n{stop}\nThe same command again goes on from there.", file=sys.stderr)
        return 143  # 128 + SIGTERM: what a shell reports of a process that the signal ended
    except KeyboardInterrupt:
        status = "KILLED"
        print("\nstopped; finished shards and epochs are kept, and the next run goes on from them", file=sys.stderr)
        return 130
    finally:
        tracker.experiment.set_terminated(tracker.run_id, status)
    print(f"done in {(time.perf_counter() - started) / 60:.1f} minutes")
    return 0


def chain(config: TrainConfig, tracker: MLFlowLogger) -> None:
    """Harvest, fit, export, compare, tell."""
    scr = SCRConfig(**dataclasses.asdict(config.model.scr))
    step(1, f"model {config.model.name} and images of {config.data.name}")
    model, processor = load_vlm(**config.model.loading)
    step(2, "harvest: attention maps and block-0 states of the training images")
    harvested = harvest_from_config(config, model, processor, overwrite=True)
    log_data(tracker, config, harvested)
    step(3, "fit: the predictor learns the maps")
    data = ShardDataModule(
        config.paths.harvest,
        config.trainer.batch_size,
        config.trainer.num_workers,
        seed=config.seed,
        cache=config.trainer.cache,
        stream_from=config.trainer.stream_from,
    )
    fit = fit_predictor(config, scr, data, tracker)
    step(4, "export: the predictor folder, calibrated, reloaded and compared")
    exported = export(config, scr, fit, data, describe_model(model, processor), harvested, tracker)
    step(5, "compare: two-pass, one-pass, auto and the controls on held-out images")
    settings = dataclasses.asdict(config.evaluation)
    comparison = compare(
        model, processor, exported.folder, scr, held_out_images(config), num_images=settings.pop("images"), **settings
    )
    tell(config, scr, processor, data, fit, exported, comparison, tracker)


# -- MLflow ----------------------------------------------------------------------------------------------------------


def start_run(config: TrainConfig) -> MLFlowLogger:
    """Opens the MLflow run with the resolved configuration, before any work, so that a wrong URI fails at once."""
    paths = config.paths
    paths.reports.mkdir(parents=True, exist_ok=True)
    save_config(config, paths.config)
    local = config.tracking.uri is None
    tracker = MLFlowLogger(
        experiment_name=config.experiment,
        tracking_uri=config.tracking_uri,
        artifact_location=paths.mlflow_artifacts.absolute().as_uri() if local else None,
        run_name=f"{config.model.name}-{config.predictor.loss}-seed{config.seed}",
    )
    tracker.log_hyperparams(_flat(dataclasses.asdict(config)))
    tracker.experiment.log_artifact(tracker.run_id, str(paths.config))
    return tracker


def log_data(tracker: MLFlowLogger, config: TrainConfig, harvested: Mapping[str, Any]) -> None:
    """Records which maps the fit saw, as an MLflow dataset input."""
    client, run = tracker.experiment, tracker.run_id
    client.set_tag(run, "data.fingerprint", harvested["fingerprint"])
    for key in ("images", "samples", "skipped", "bytes"):
        client.log_metric(run, f"harvest/{key}", harvested[key])
    dataset = Dataset(
        name=f"{config.model.name}-{config.data.name}",
        digest=str(harvested["fingerprint"])[:36],
        source_type="local",
        source=str(harvested["directory"]),
    )
    client.log_inputs(run, [DatasetInput(dataset)])


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


# -- fit and export --------------------------------------------------------------------------------------------------


def fit_predictor(config: TrainConfig, scr: SCRConfig, data: ShardDataModule, tracker: MLFlowLogger) -> Fit:
    """Fits with Lightning, takes the epoch of best validation mass, and measures it beside floors and ceiling."""
    pl.seed_everything(config.seed, verbose=False)
    trainer = config.trainer
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
    print(f"best epoch: val/mass {fitted.score:.4f} after {fitted.epochs} epochs")
    module = fitted.module
    test = data.test_dataloader()
    k, border = scr.num_sources, scr.exclude_border
    others = baselines.floors(data.train_dataloader(), border, config.seed)
    if config.harvest.prompts_per_image > 1:
        others["other prompts (ceiling)"] = baselines.OtherPrompts.fit(data.test_dataloader(), border)
    repeats, seed = config.evaluation.bootstrap, config.evaluation.seed
    return Fit(
        module,
        summarise_rows(baselines.evaluate(module.score, test, k, border), repeats, seed),
        {
            name: summarise_rows(baselines.evaluate(rule, test, k, border), repeats, seed)
            for name, rule in others.items()
        },
    )


def export(
    config: TrainConfig,
    scr: SCRConfig,
    fit: Fit,
    data: ShardDataModule,
    model: Mapping[str, Any],
    harvested: Mapping[str, Any],
    tracker: MLFlowLogger,
) -> Exported:
    """Packs the best checkpoint with its metrics and origin, and logs how its confidence holds on the test split."""
    exported = export_predictor(
        config.paths.checkpoints / "best.ckpt",
        config.paths.predictor,
        scr=scr,
        model=model,
        validation=data.val_dataloader(),
        target_fallback=config.predictor.target_fallback,
        metrics={f"test/{name}": interval.mean for name, interval in fit.metrics.items()},
        provenance={
            "mlflow_run_id": tracker.run_id,
            "data_fingerprint": harvested["fingerprint"],
            "loss": config.predictor.loss,
            "seed": config.seed,
            "libraries": library_versions(),
        },
    )
    print(f"{exported.folder}: reloaded, outputs equal to the checkpoint's")
    return exported


# -- the result ------------------------------------------------------------------------------------------------------


def tell(
    config: TrainConfig,
    scr: SCRConfig,
    processor: Any,
    data: ShardDataModule,
    fit: Fit,
    exported: Exported,
    comparison: Comparison,
    tracker: MLFlowLogger,
) -> None:
    """Prints the tables and where everything is; logs metrics, figures and the predictor to MLflow."""
    client, run = tracker.experiment, str(tracker.run_id)
    embedded = config.data.world is not None
    rows = confidence_rows(fit.module.score, data.test_dataloader(), scr.num_sources, scr.exclude_border)
    confidence = calibration_summary(exported.calibration, rows)
    figures = {
        "maps.png": maps_figure(config, processor, fit.module, scr),
        "reliability.png": reliability_figure(
            rows.raw, exported.calibration(rows.raw), rows.recall, exported.calibration.threshold
        ),
    }
    for name, figure in figures.items():
        figure.savefig(config.paths.reports / name, dpi=130)
        client.log_artifact(run, str(config.paths.reports / name), "figures")
    values = report.metrics(comparison)
    for name, interval in fit.metrics.items():
        values |= {
            f"test/{name}": interval.mean,
            f"test/{name}_low": interval.low,
            f"test/{name}_high": interval.high,
        }
    for baseline, metrics in fit.floors.items():
        label = baseline.split(" (")[0].replace(" ", "_")
        values |= {f"test/{label}/{name}": interval.mean for name, interval in metrics.items()}
    values |= {f"test/confidence/{name}": value for name, value in confidence.items() if np.isfinite(value)}
    files = report.write(config.paths.reports, comparison, embedded=embedded)
    report.log(run, config.tracking_uri, values, list(files.values()))
    client.log_artifacts(run, str(exported.folder), "predictor")

    title = f"The predictor on {config.harvest.test} test images, K = {scr.num_sources}"
    print(f"\n{title} (95 % intervals over images; mass: attention recovered, of the best K's)\n")
    print(report.table(source_rows(fit, scr)))
    print(
        f"\nconfidence on the test split: expected calibration error {confidence['ece']:.3f} "
        f"(raw {confidence['ece_raw']:.3f}), {confidence['fallback']:.0%} of the maps under auto's threshold"
    )
    print(f"\nAnswers on {comparison.images} held-out images\n")
    print(report.table(report.answer_rows(comparison)))
    print("\n" + report.bullets(report.reading(comparison, embedded=embedded)))
    folder = exported.folder
    ui = (
        "make ui" if config.tracking.uri is None and config.runs_dir == "runs" else f"mlflow ui: {config.tracking_uri}"
    )
    print(f"\nreport and figures: {config.paths.reports}")
    print(f"predictor: {folder}  ({exported.predictor.count_parameters():,} parameters)")
    print(f"compare runs: {ui}  (experiment {config.experiment!r}, run {run})")
    print(f'use it: with SCR(model, predictor="{folder}", mode="auto"): model.generate(**inputs)')


def source_rows(fit: Fit, scr: SCRConfig) -> list[list[str]]:
    """Table of the predictor between its floors and its ceiling."""
    names = ("recall", "ndcg", "mass")
    rows = [["scores from", *(f"{name}@{scr.num_sources}" for name in names)]]
    for label, metrics in {**fit.floors, "predictor": fit.metrics}.items():
        cells = [f"{metrics[n].mean:.3f} [{metrics[n].low:.3f}, {metrics[n].high:.3f}]" for n in names]
        rows.append([label, *cells])
    return rows


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
                scr.num_sources,
                scr.exclude_border,
                sample.prompts[0]["text"],
            )
        )
    return source_maps_figure(examples)


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
