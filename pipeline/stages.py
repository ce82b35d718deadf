"""The stages of the chain as plain calls: load, harvest, fit, export, compare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import MLFlowLogger

from configs import TrainConfig, digest
from data.datamodule import ShardDataModule
from data.grids import grids_of
from data.index import read_sidecar
from data.shards import ShardReader
from data.vlm import library_versions, load_vlm
from evaluation import fit_report
from evaluation.compare import Comparison, compare, measure_reference
from evaluation.questions import Item
from evaluation.reference import Reference, unlabelled_reference
from evaluation.tables import paragraph
from export.package import Exported, Facts, export_predictor
from pipeline.folders import RunFolder, named_folders
from pipeline.harvest import check_space, evaluation_images, harvest_from_config
from predictor import baselines
from predictor.batch import SourceCount
from predictor.calibration import ConfidenceRows, confidence_rows
from predictor.checkpoints import BEST
from predictor.errors import FitError
from predictor.fit import fit
from predictor.metrics import Interval, summarise_rows
from predictor.module import SourceModule
from predictor.reliability import calibration_summary
from scr_runtime import describe_model, load_predictor
from scr_runtime.errors import PrefillError
from scr_runtime.rule import source_rule

SELECTED_BY = "best_mass"
"""Metric that chooses among the children of a sweep."""


class Work:
    """What all fits on one harvest share: the model, the shards, and what needs no predictor, made once.

    Attributes:
        model: The vision-language model.
        processor: Its processor.
        harvested: What the harvest came to.
    """

    def __init__(self, config: TrainConfig) -> None:
        """Loads the model, and harvests what is missing."""
        print_step(1, f"model {config.model.name} and images of {config.data.name}")
        check_space(config)
        self.model, self.processor = load_vlm(config.model)
        print_step(2, "harvest: attention maps and block-0 states of the training images")
        self.harvested = harvest_from_config(config, self.model, self.processor, overwrite=config.overwrite)
        if skipped := self.harvested.skipped:
            words = (
                "1 image could not be read and was" if skipped == 1 else f"{skipped} images could not be read and were"
            )
            print(paragraph(f"{words} skipped: python -m data.inspect show {self.harvested.directory} names them"))
        reading = config.trainer.model_copy(update={"train_images": None})  # that choice is each fit's own
        self._data = ShardDataModule(config.paths.harvest, reading)
        self._references: dict[str, Reference] = {}
        self._floors: dict[str, dict[str, dict[str, Interval]]] = {}

    def data(self, config: TrainConfig) -> ShardDataModule:
        """The shards as a configuration reads them."""
        return self._data.for_fit(config.trainer, seed=config.seed, mean_maps=config.mean_maps)

    def reference(self, config: TrainConfig) -> Reference:
        """What is asked about, and the answers that need no predictor; without annotations, pictures and prompts."""
        settings = config.evaluation.for_training
        key = digest(config.scr.to_dict(), settings)
        if key not in self._references:
            if settings.asks:
                images, cache = evaluation_images(config, settings), config.paths.cache
                reference = measure_reference(self.model, self.processor, config.scr, images, settings, cache)
            else:
                folder, items = config.paths.train_images, held_out_prompts(config)
                reference = unlabelled_reference(self.model, self.processor, config.scr, folder, items, settings)
            reference.origin.update(model_name=config.model.name, data_name=config.data.name)
            self._references[key] = reference
        return self._references[key]

    def floors(self, config: TrainConfig) -> dict[str, dict[str, Interval]]:
        """Metrics of the floors and of the reference on the test split."""
        settings, scr = config.evaluation, config.scr
        chosen = [config.trainer.train_images, config.mean_maps]
        key = digest(scr.to_dict(), settings.bootstrap, settings.seed, chosen)
        if key not in self._floors:
            data = self.data(config)
            rules = baselines.floors(data.train_dataloader(), scr, settings.seed)
            if config.harvest.prompts_per_image > 1:
                rules["other prompts (reference)"] = baselines.OtherPrompts.fit(data.test_dataloader(), scr)
            self._floors[key] = {name: measure(config, data, rule, name) for name, rule in rules.items()}
        return self._floors[key]

    def result_id(self, config: TrainConfig) -> str:
        """Identity of what decides a result: settings and data."""
        return digest(config.result_settings, str(self.harvested.fingerprint))


@dataclass(frozen=True)
class Fit:
    """A finished fit: its best checkpoint, and on the test split K, its metrics and those of floors and reference.

    Attributes:
        epochs: How many it took in all.
    """

    module: SourceModule
    sources: SourceCount
    metrics: dict[str, Interval]
    floors: dict[str, dict[str, Interval]]
    epochs: int = 0


@dataclass(frozen=True)
class Packed:
    """An exported predictor, and how far its confidence can be trusted on the test split."""

    exported: Exported
    rows: ConfidenceRows
    confidence: dict[str, float]


@dataclass(frozen=True)
class Result:
    """What a run found; `comparison` is None where nothing was compared."""

    fit: Fit
    packed: Packed
    comparison: Comparison | None


def fit_predictor(config: TrainConfig, work: Work, folder: RunFolder, tracker: MLFlowLogger) -> Fit:
    """Fits with Lightning, takes the epoch of best validation mass, and measures it beside floors and reference."""
    print_step(3, "fit: the predictor learns the maps")
    pl.seed_everything(config.seed, verbose=False)
    data = work.data(config)
    check_grids(config, data)
    module = SourceModule(
        config.predictor.network(data.hidden_size), config.scr, config.trainer, config.predictor.loss
    )
    count = module.predictor.count_parameters()
    rank, maps = module.predictor.config.rank, data.count("train")
    print(paragraph(f"{count:,} parameters, rank {rank}; {maps:,} training maps"))
    module.compute_statistics(data.train_dataloader())
    fitted = fit(module, data, folder.checkpoints, config.trainer, logger=tracker)
    tracker.log_metrics({SELECTED_BY: round(fitted.score, 4)}, step=fitted.epochs)
    limit, patience = config.trainer.max_epochs, config.trainer.patience
    early = f" of at most {limit}: none of the last {patience} was better" if fitted.epochs < limit else ""
    print(paragraph(f"best epoch: val/mass {fitted.score:.4f}; fitted for {fitted.epochs} epochs{early}"))
    sources = SourceCount.of(data.grids("test"), config.scr)
    metrics, floors = measure(config, data, fitted.module.score, "predictor"), work.floors(config)
    return Fit(fitted.module, sources, metrics, floors, fitted.epochs)


def check_grids(config: TrainConfig, data: ShardDataModule) -> None:
    """Checks that each grid of the harvest has patches that can be sources, before any of them is fitted to.

    Raises:
        FitError: One has none.
    """
    for shard in data.index["shards"]:
        for entry in read_sidecar(data.directory, shard["name"])["samples"]:
            try:
                for grid in grids_of(entry["grid"]):
                    source_rule(config.scr, grid)
            except PrefillError as error:
                raise FitError(
                    f"image {int(entry['key'])} of {data.directory}: {error} (model.scr.exclude_border=false), or "
                    "harvest again in another folder (harvest.name): pictures too small for it are left out"
                ) from error


def measure(config: TrainConfig, data: ShardDataModule, score: baselines.Score, name: str) -> dict[str, Interval]:
    """Metrics of a predictor, or of a rule of this name, on the test split."""
    rows = baselines.evaluate(score, data.test_dataloader(), config.scr, f"test split, {name}")
    return summarise_rows(rows, config.evaluation.bootstrap, config.evaluation.seed)


def export(config: TrainConfig, fitted: Fit, work: Work, folder: RunFolder, run: str) -> Packed:
    """Packs the best checkpoint with its metrics and origin, and judges its confidence on the test split."""
    print_step(4, "export: the predictor folder, calibrated, reloaded and compared")
    data = work.data(config)
    exported = export_predictor(
        folder.checkpoints / BEST,
        folder.predictor,
        scr=config.scr,
        model=describe_model(work.model, work.processor),
        validation=data.val_dataloader(),
        settings=config.predictor,
        facts=Facts(
            metrics={
                **fit_report.metrics(fitted.metrics, fitted.floors, {}),
                **{f"test/{name}": value for name, value in fitted.sources.metrics().items()},
            },
            provenance={
                "mlflow_run_id": run,
                "data_name": config.data.name,
                "data_fingerprint": work.harvested.fingerprint,
                "loss": config.predictor.loss,
                "seed": config.seed,
                "libraries": library_versions(),
                "used": {
                    **{f"{split} maps": data.count(split) for split in ("train", "validation", "test")},
                    "epochs": fitted.epochs,
                },
            },
        ),
    )
    print(paragraph(f"{exported.folder}: reloaded, outputs equal to the checkpoint's"))
    rows = confidence_rows(fitted.module.score, data.test_dataloader(), config.scr)
    return Packed(exported, rows, calibration_summary(exported.calibration, rows))


def compare_answers(config: TrainConfig, work: Work, exported: Exported) -> Comparison | None:
    """Asks the model under every method; without annotations, compares edits and costs; None if nothing is wanted."""
    if config.evaluation.asks:
        print_step(5, "compare: two-pass, one-pass, auto and the controls on held-out images")
    elif has_unlabelled(config):
        print_step(5, "compare: edits and cost on held-out pictures; no answers, for want of annotations")
    else:
        return None
    predictors = {"": load_predictor(exported.folder)}
    others = named_folders(config.evaluation.predictors, [""])
    predictors |= {name: load_predictor(folder) for name, folder in others.items()}
    return compare(work.reference(config), predictors, config.evaluation.for_training)


def has_unlabelled(config: TrainConfig) -> bool:
    """Whether pictures without annotations are to be compared: two at least, by fidelity or latency."""
    wanted = {"fidelity", "latency"} & set(config.evaluation.benchmarks)
    return config.paths.train_annotations is None and config.harvest.test > 1 and bool(wanted)


def held_out_prompts(config: TrainConfig) -> list[Item]:
    """Pictures of the test split, as many as fidelity is measured on, each with its first prompt."""
    samples = ShardReader(config.paths.harvest, "test")
    count = min(len(samples), config.evaluation.fidelity_images)
    return [Item(sample.file, sample.prompts[0]["text"]) for sample in map(samples.stored, range(count))]


def print_step(number: int, text: str) -> None:
    """Prints a headline."""
    print("\n" + paragraph(f"[{number}/5] {text}"), flush=True)


def shared_settings(config: TrainConfig) -> list[Any]:
    """The settings that a `Work` depends on; seed and batch size are each fit's own."""
    model, trainer = config.model, config.trainer
    return [
        model.model_dump(exclude={"name", "scr"}),
        model.scr.attention_layers,
        model.scr.state_layer,
        config.data.model_dump(),
        config.harvest.model_dump(),
        [trainer.num_workers, trainer.cache, trainer.stream_from],
    ]
