"""What goes to MLflow beyond a logger's metrics: runs with their origin, and predictors as registered models.

A predictor stays the folder that it is, no pickle and no copy of the class: what comes back from the registry is a
folder for `scr_runtime.load_predictor`.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelOutput, LoggedModelStatus, Run
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_GIT_COMMIT, MLFLOW_PARENT_RUN_ID

from scr_runtime import load_predictor

NAME = "predictor"
"""Name of the LoggedModel of every run."""
MODEL_TYPE = "scr-predictor"
ALIAS = "latest-fit"
"""Alias that `register` moves to the version it makes; ``latest`` itself is a reserved word of MLflow."""
SYSTEM_METRICS_SECONDS = 5
"""Sampling interval; MLflow's own 10 s would miss short fits. MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL overrides it."""


# -- runs ------------------------------------------------------------------------------------------------------------


def connect(uri: str, experiments: Sequence[str], artifacts: Path) -> MlflowClient:
    """Opens a tracking store and its experiments, within seconds or with an error.

    Args:
        uri: Tracking URI.
        experiments: Names; those that are not there are created.
        artifacts: Where files of new experiments go if the store is a database; a server chooses for itself.

    Raises:
        ValueError: If an experiment of that name was deleted.
        Exception: Whatever the store says; every kind of store has errors of its own.
    """
    server = uri.startswith(("http://", "https://", "databricks"))
    with _impatient():
        mlflow.set_tracking_uri(uri)
        client = MlflowClient(uri)
        for name in experiments:
            found = client.get_experiment_by_name(name)
            if found is None:
                client.create_experiment(name, None if server else artifacts.absolute().as_uri())
            elif found.lifecycle_stage == "deleted":
                raise ValueError(f"the experiment {name!r} is deleted: restore it, or choose tracking.experiment")
    return client


@contextlib.contextmanager
def _impatient() -> Iterator[None]:
    """One retry and ten seconds for the first contact; later, MLflow's own patience bridges a server's restart."""
    first = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
    mine = {key: value for key, value in first.items() if key not in os.environ}
    os.environ.update(mine)
    try:
        yield
    finally:
        for key in mine:
            del os.environ[key]


def create_run(
    client: MlflowClient, experiment: str, name: str, tags: Mapping[str, str], parent: str | None = None
) -> Run:
    """Creates a run that knows its command, its user and the commit of its code.

    Args:
        client: Of the tracking store.
        experiment: Name of the experiment.
        name: Name of the run.
        tags: More tags.
        parent: Run id that it is nested under.
    """
    origin = {"command": shlex.join(["python", *sys.argv]), **git_tags(Path(__file__).parents[1])}
    if parent is not None:
        origin[MLFLOW_PARENT_RUN_ID] = parent
    tags = resolve_tags({**origin, **tags})
    return client.create_run(_experiment_id(client, experiment), run_name=name, tags=tags)


def reopen_run(client: MlflowClient, run_id: str) -> Run | None:
    """Takes up a run that ended before its work did; None if the store no longer has it."""
    try:
        run = client.get_run(run_id)
    except MlflowException:
        return None
    if run.info.lifecycle_stage != "active" or run.info.status == "FINISHED":
        return None
    client.update_run(run_id, status="RUNNING")
    return run


@contextlib.contextmanager
def recorded(
    client: MlflowClient,
    run_id: str,
    uri: str,
    stops: tuple[type[BaseException], ...] = (KeyboardInterrupt, SystemExit),
) -> Iterator[None]:
    """Logs system metrics inside the block, and gives the run the status and the error that the block ends with.

    Args:
        client: Of the tracking store.
        run_id: The run.
        uri: Of the tracking store.
        stops: What ends a run as KILLED instead of FAILED.
    """
    monitor = SystemMetricsMonitor(run_id, SYSTEM_METRICS_SECONDS, tracking_uri=uri)
    status = "FAILED"
    try:
        monitor.start()
        yield
        status = "FINISHED"
    except stops:
        status = "KILLED"
        raise
    except Exception as error:
        client.set_tag(run_id, "error", f"{type(error).__name__}: {error}"[:500])
        raise
    finally:
        monitor.finish()
        client.set_terminated(run_id, status)


def find_run(client: MlflowClient, experiment: str, tag: str, value: str, status: str | None = None) -> Run | None:
    """The newest run of an experiment with this tag, and if given this status."""
    wanted = f"tags.`{tag}` = '{value}'" + (f" and attributes.status = '{status}'" if status else "")
    return next(iter(client.search_runs([_experiment_id(client, experiment)], wanted, max_results=1)), None)


def log_dataset(client: MlflowClient, run_id: str, name: str, fingerprint: str, folder: str) -> None:
    """Names the shards that a run is fitted on, as its dataset input."""
    dataset = Dataset(name=name, digest=fingerprint[:36], source_type="local", source=folder)
    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, "training")])])


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


def _experiment_id(client: MlflowClient, name: str) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        raise LookupError(f"the experiment {name!r} has gone: it was there when the tracking store was opened")
    return experiment.experiment_id


# -- predictors ------------------------------------------------------------------------------------------------------


def log_predictor(client: MlflowClient, run_id: str, folder: Path, params: Mapping[str, Any]) -> str:
    """Uploads a predictor folder as the LoggedModel of a run.

    Args:
        client: Of the tracking server.
        run_id: The run that made it.
        folder: A finished predictor folder.
        params: What the models page shows beside it; values are cut at 250 characters.

    Returns:
        The model's id; ``models:/<id>`` is its address.
    """
    model = client.create_logged_model(
        client.get_run(run_id).info.experiment_id,
        name=NAME,
        source_run_id=run_id,
        params={key: str(value)[:250] for key, value in params.items()},
        model_type=MODEL_TYPE,
    )
    try:
        client.log_model_artifacts(model.model_id, str(folder))
    except BaseException:
        client.finalize_logged_model(model.model_id, LoggedModelStatus.FAILED)
        raise
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    return model.model_id


def logged_model(client: MlflowClient, run_id: str) -> str | None:
    """Id of the LoggedModel of a run, or None."""
    outputs = client.get_run(run_id).outputs
    models = outputs.model_outputs if outputs else []
    return models[0].model_id if models else None


def register(client: MlflowClient, model_id: str, name: str, run_id: str) -> str:
    """Makes a version of a registered model from the LoggedModel of a run, and moves the alias to it.

    A run whose model is a version already does not get a second one.

    Returns:
        The number of the version; ``models:/<name>@latest-fit`` is its address.
    """
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    known = [v for v in client.search_model_versions(f"name='{name}'") if v.run_id == run_id]
    if known:
        version = known[0].version
    else:
        version = client.create_model_version(name, f"models:/{model_id}", run_id, model_id=model_id).version
    client.set_registered_model_alias(name, ALIAS, str(version))
    return str(version)


@contextlib.contextmanager
def _tracking_at(uri: str) -> Iterator[None]:
    """MLflow resolves the address of a LoggedModel at its global URI, whatever URI it is called with."""
    former = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(former)


def download(uri: str, folder: str | Path, tracking_uri: str) -> Path:
    """Fetches a predictor into a folder, and reads it once to prove it.

    Args:
        uri: ``models:/<name>@latest-fit``, ``models:/<name>/<version>`` or ``models:/<model id>``.
        folder: Where it goes; must not exist yet.
        tracking_uri: Of the server, ``sqlite:///runs/mlflow.db`` for one that nobody chose.

    Returns:
        `folder`, for ``SCR(model, predictor=...)`` or ``scr_runtime.load_predictor``.

    Raises:
        FileExistsError: If there is something at `folder`.
        mlflow.exceptions.MlflowException: If there is no such model.
        scr_runtime.errors.SCRError: If what came is no predictor that this version reads.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists: choose another folder, or remove it first")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as staged:
        with _tracking_at(tracking_uri):
            came = Path(download_artifacts(artifact_uri=uri, dst_path=staged, tracking_uri=tracking_uri))
        load_predictor(came)
        shutil.copytree(came, folder)
    return folder
