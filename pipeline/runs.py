"""The life of an MLflow run: created with its origin, reopened, recorded until its end."""

from __future__ import annotations

import contextlib
import itertools
import json
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Run
from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_GIT_COMMIT, MLFLOW_PARENT_RUN_ID
from pytorch_lightning.loggers import MLFlowLogger

from configs import Child, TrainConfig
from configs.grid import short_names
from configs.load import SAVED, saved_config
from data.folder import HarvestSummary
from pipeline import pages
from pipeline.exits import STOPS, way_on
from pipeline.folders import RunFolder
from pipeline.stages import SELECTED_BY, compare_answers, export, fit_predictor
from pipeline.tracking import experiment_id, process_tags
from predictor.errors import Preempted

_PLACES = ("runs_dir", "overwrite", "variant", "harvest.name", "tracking.")
"""Settings that are no params: they would tell equal runs apart."""
_NAMED = ("model", "data.root")
"""Settings that are in no run's name: the experiment has the model's."""
_LONGEST_NAME = 80
_STAGES = {
    fit_predictor.__code__: "the fit",
    export.__code__: "the export",
    compare_answers.__code__: "the comparison",
}
SYSTEM_METRICS_SECONDS = 5
"""Sampling interval; MLflow's own 10 s would miss short fits. MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL overrides it."""


@contextlib.contextmanager
def tracked(
    child: Child, client: MlflowClient, folder: RunFolder, parent: Run | None = None
) -> Iterator[MLFlowLogger]:
    """A run with the resolved configuration; its status says how the block ended.

    It is the run that an interrupted command left for the same folder, if the store still has it.
    """
    config = child.config
    earlier = folder.record.get("mlflow_run_id")
    # Lightning's logger marks a run as finished when its fit is; the folder knows better
    run = reopen_run(client, earlier, even_finished=not folder.complete) if isinstance(earlier, str) else None
    if run is None:
        name = unused_name(client, config.experiment, child.short_label or run_name(child))
        tags = {"run.kind": "child", "sweep.choice": child.label} if parent else {"run.kind": "single"}
        run = create_run(client, config.experiment, name, tags, parent.info.run_id if parent else None)
        client.log_metric(run.info.run_id, SELECTED_BY, 0.0, step=0)  # MLflow's comparison shows the first metric
    folder.note(mlflow_run_id=run.info.run_id)
    with recorded(client, run.info.run_id, config.tracking_uri, STOPS, resumes=config.trainer.resume):
        tracker = ResumedLogger(client, run, config)
        settings = {key: value for key, value in _flat(config.model_dump()).items() if not key.startswith(_PLACES)}
        logged = run.data.params  # of a reopened run; MLflow rejects other values, such as another cache
        tracker.log_hyperparams(
            {key: value for key, value in {**child.groups, **settings}.items() if key not in logged}
        )
        client.log_artifact(run.info.run_id, str(folder.config))
        yield tracker


def run_name(child: Child) -> str:
    """What a plain run was given beside its model: ``predictor=paper max_epochs=3``."""
    given = {key: value for key, value in child.given.items() if key not in _NAMED and not key.startswith(_PLACES)}
    saved = given.pop(SAVED, None)
    names = short_names(given)
    words = [f"{names[key]}={value}" for key, value in given.items()]
    if saved is not None and (file := saved_config([f"{SAVED}={saved}"])) is not None:
        words.insert(0, f"as {file.resolve().parent.name}")
    text = " ".join(words) or "defaults"
    return text if len(text) <= _LONGEST_NAME else f"{text[: _LONGEST_NAME - 3]}..."


def unused_name(client: MlflowClient, experiment: str, name: str) -> str:
    """The name, with a number behind it if the experiment has runs of that name."""
    runs = client.search_runs([experiment_id(client, experiment)], max_results=1000)
    taken = {run.info.run_name for run in runs}
    names = itertools.chain([name], (f"{name} #{number}" for number in itertools.count(2)))
    return next(candidate for candidate in names if candidate not in taken)


class ResumedLogger(MLFlowLogger):
    """Lightning's logger, for a run that lasts longer than its fit and may hold some of the coming steps already.

    An epoch's metrics are logged before its checkpoint is written. A fit that was killed in between takes the epoch's
    steps again, with the same values: what the run has is not logged a second time.

    Args:
        client: Of the tracking store.
        run: The run, as it was found.
        config: Names the experiment and the store.
    """

    def __init__(self, client: MlflowClient, run: Run, config: TrainConfig) -> None:
        super().__init__(config.experiment, tracking_uri=config.tracking_uri, run_id=run.info.run_id)
        self._last = {
            key: max(metric.step for metric in client.get_metric_history(run.info.run_id, key))
            for key in run.data.metrics
            if not key.startswith("system/")
        }

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Logs the metrics whose step lies behind those that the run had when it was opened."""
        new = {key: value for key, value in metrics.items() if (step or 0) > self._last.get(key, -1)}
        new.pop("epoch", None)  # Lightning's: a chart of the steps against themselves
        super().log_metrics(new, step)

    def finalize(self, status: str = "success") -> None:
        """Leaves the run's status alone: `recorded` sets it, when export and comparison are done as well."""


def _flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def create_run(
    client: MlflowClient,
    experiment: str,
    name: str,
    tags: Mapping[str, str],
    parent: str | None = None,
    started: float | None = None,
) -> Run:
    """Creates a run that knows its command, its user and the commit of its code.

    Args:
        client: Of the tracking store.
        experiment: Name of the experiment.
        name: Name of the run.
        tags: More tags.
        parent: Run id that it is nested under.
        started: Seconds since the epoch when its work began; now, if None.
    """
    origin = {"command": shlex.join(["python", *sys.argv]), **git_tags(Path(__file__).parents[1]), **process_tags()}
    if parent is not None:
        origin[MLFLOW_PARENT_RUN_ID] = parent
    tags = resolve_tags({**origin, **tags})
    start = int(1000 * (time.time() if started is None else started))
    return client.create_run(experiment_id(client, experiment), start, tags, name)


def reopen_run(client: MlflowClient, run_id: str, *, even_finished: bool = False) -> Run | None:
    """Reopens a run that ended before its work did; None if the store no longer has it, or it is finished."""
    try:
        run = client.get_run(run_id)
    except MlflowException:
        return None
    if run.info.lifecycle_stage != "active" or (run.info.status == "FINISHED" and not even_finished):
        return None
    client.update_run(run_id, status="RUNNING")
    said = {"error"} if pages.by_user(run.data.tags) else {"error", pages.NOTE}
    for key in said & set(run.data.tags):  # they say how it ended
        client.delete_tag(run_id, key)
    for key, value in process_tags().items():
        client.set_tag(run_id, key, value)
    return run


@contextlib.contextmanager
def recorded(
    client: MlflowClient,
    run_id: str,
    uri: str,
    stops: tuple[type[BaseException], ...] = (KeyboardInterrupt, SystemExit),
    *,
    resumes: bool = True,
) -> Iterator[None]:
    """Logs system metrics inside the block, and gives the run the status and the error that the block ends with.

    ``MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING=false`` leaves the metrics out.

    Args:
        client: Of the tracking store.
        run_id: The run.
        uri: Of the tracking store.
        stops: What ends a run as KILLED instead of FAILED.
        resumes: Whether the same command resumes the run.
    """
    monitor = SystemMetricsMonitor(run_id, SYSTEM_METRICS_SECONDS, tracking_uri=uri)
    status = "FAILED"
    try:
        if MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.get() or not MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.is_set():
            monitor.start()
        yield
        status = "FINISHED"
    except stops as stop:
        status = "KILLED"
        with contextlib.suppress(Exception):
            pages.describe_run(client, run_id, f"{_what_stopped(stop)}; {way_on(resumes)}")
        raise
    except Exception as error:
        with contextlib.suppress(Exception):  # on a full disk the store fails too; the error itself counts
            client.set_tag(run_id, "error", f"{type(error).__name__}: {error}"[:500])
        raise
    finally:
        failed = status != "FINISHED"
        with contextlib.suppress(*(Exception,) * failed):
            monitor.finish()
            client.set_terminated(run_id, status)


def _what_stopped(stop: BaseException) -> str:
    """What ended a run, and in which stage, if one had begun."""
    called = [frame.f_code for frame, _ in traceback.walk_tb(stop.__traceback__)]
    stage = next((f" in {_STAGES[code]}" for code in called if code in _STAGES), "")
    signals = {KeyboardInterrupt: "Ctrl-C", Preempted: "SIGTERM"}
    return f"stopped by {signals.get(type(stop), type(stop).__name__)}{stage}"


def log_data(client: MlflowClient, run_id: str, config: TrainConfig, harvested: HarvestSummary) -> None:
    """Records which maps a fit sees: fingerprint, and the shards as the run's dataset input, with their counts."""
    client.set_tag(run_id, "data.fingerprint", str(harvested.fingerprint))
    counts = {key: getattr(harvested, key) for key in ("images", "samples", "skipped", "bytes")}
    name, source = dataset_name(config), json.dumps({"uri": str(harvested.directory)})
    digest = str(harvested.fingerprint)[:36]
    dataset = Dataset(name, digest, source_type="local", source=source, profile=json.dumps(counts))
    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, "training")])])


def dataset_name(config: TrainConfig) -> str:
    """What the harvest of a configuration is called as a dataset."""
    return f"{config.model.name}-{config.data.name}"


def log_metrics(
    client: MlflowClient,
    run_id: str,
    values: Mapping[str, float],
    model_id: str | None = None,
    dataset: tuple[str, str] | None = None,
) -> None:
    """Logs metrics to a run, and to its LoggedModel if there is one, with the name and fingerprint of its data."""
    now, (name, digest) = int(1000 * time.time()), dataset or (None, None)
    on_model = {"model_id": model_id, "dataset_name": name, "dataset_digest": digest and digest[:36]}
    entities = [Metric(key, value, now, 0, **on_model) for key, value in values.items()]
    for start in range(0, len(entities), 500):
        client.log_batch(run_id, metrics=entities[start : start + 500])


def log_curve(client: MlflowClient, run_id: str, name: str, points: Mapping[int, float]) -> None:
    """Logs one metric over steps."""
    now = int(1000 * time.time())
    client.log_batch(run_id, metrics=[Metric(name, value, now, step) for step, value in points.items()])


def git_tags(folder: Path) -> dict[str, str]:
    """Commit of the code in `folder`, and whether files differ from it; nothing if that is no git repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        return {
            MLFLOW_GIT_COMMIT: git("rev-parse", "HEAD"),
            "git.dirty": str(bool(git("status", "--porcelain"))).lower(),
        }
    except (OSError, subprocess.SubprocessError):
        return {}
