"""The tracking store: opened, its runs found and read. No fit is imported here."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import mlflow
import psutil
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from pipeline import pages
from pipeline.errors import TrackingError
from pipeline.exits import way_on
from pipeline.store import follow_moved_artifacts

_HOST, _PROCESS = "process.host", "process.id"
FILES = ("fit.json", "evaluation.json")
"""Artifacts below reports/ that hold every number of a run, under `metrics`."""


def connect(uri: str, experiments: Sequence[str], artifacts: Path) -> MlflowClient:
    """Opens a tracking store and its experiments, within seconds or with an error.

    Args:
        uri: Tracking URI.
        experiments: Names; those that are not there are created.
        artifacts: Where files of new experiments go if the store is a database; a server chooses for itself.

    Raises:
        TrackingError: If the store cannot be used, or an experiment of that name was deleted.
    """
    server = uri.startswith(("http://", "https://", "databricks"))
    try:
        with impatient():
            if uri == f"sqlite:///{artifacts.with_name('mlflow.db')}":
                follow_moved_artifacts(artifacts.with_name("mlflow.db"), artifacts)
            mlflow.set_tracking_uri(uri)
            client = MlflowClient(uri)
            for name in experiments:
                found = client.get_experiment_by_name(name)
                if found is None:
                    client.create_experiment(name, None if server else artifacts.absolute().as_uri())
                elif found.lifecycle_stage == "deleted":
                    raise TrackingError(f"the experiment {name!r} is deleted: restore it, or set tracking.experiment")
                pages.add_view(client, experiment_id(client, name))
            close_dead_runs(client, experiments)
    except TrackingError:
        raise
    except Exception as error:  # every kind of store has errors of its own; before any work, all mean the same
        raise TrackingError(f"MLflow at {uri} cannot be used: {error}\nSee tracking.uri.") from error
    return client


@contextlib.contextmanager
def impatient() -> Iterator[None]:
    """One retry and ten seconds for the first contact; later, MLflow's own patience bridges a server's restart."""
    first = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
    mine = {key: value for key, value in first.items() if key not in os.environ}
    os.environ.update(mine)
    try:
        yield
    finally:
        for key in mine:
            del os.environ[key]


def close_dead_runs(client: MlflowClient, experiments: Sequence[str]) -> int:
    """Marks runs as KILLED that say RUNNING although their process on this machine has died; returns how many."""
    closed = 0
    for name in experiments:
        wanted = f"attributes.status = 'RUNNING' and tags.`{_HOST}` = '{socket.gethostname()}'"
        for run in client.search_runs([experiment_id(client, name)], wanted, max_results=1000):
            if not _is_alive(run.data.tags.get(_PROCESS, "")):
                died = "the process died (SIGKILL, out of memory, power)"
                client.set_tag(run.info.run_id, "error", died)
                resumes = run.data.params.get("trainer.resume") != "False"
                pages.describe_run(client, run.info.run_id, f"{died}; {way_on(resumes)}")
                client.set_terminated(run.info.run_id, "KILLED")
                closed += 1
    return closed


def process_tags() -> dict[str, str]:
    """Which process a run belongs to."""
    own = psutil.Process()
    return {_HOST: socket.gethostname(), _PROCESS: f"{own.pid} {own.create_time():.2f}"}


def _is_alive(process: str) -> bool:
    """Whether the process "<pid> <start>" of this machine lives; another that got its number doesn't count."""
    try:
        pid, start = process.split()
        return abs(psutil.Process(int(pid)).create_time() - float(start)) < 1
    except (ValueError, psutil.Error):
        return False


def find_run(client: MlflowClient, experiment: str, tag: str, value: str, status: str | None = None) -> Run | None:
    """The newest run of an experiment with this tag, and if given this status."""
    wanted = f"tags.`{tag}` = '{value}'" + (f" and attributes.status = '{status}'" if status else "")
    return next(iter(client.search_runs([experiment_id(client, experiment)], wanted, max_results=1)), None)


def every_number(client: MlflowClient, run: Run) -> dict[str, float]:
    """Metrics of a run, with those of its files: few of them are metrics of MLflow, whose pages draw each as a bar."""
    numbers = {key: value for key, value in run.data.metrics.items() if not key.startswith("system/")}
    for file in FILES:
        with contextlib.suppress(MlflowException, OSError, ValueError, KeyError):  # a run without answers has one only
            content = Path(client.download_artifacts(run.info.run_id, f"reports/{file}")).read_text(encoding="utf-8")
            numbers |= json.loads(content)["metrics"]
    return numbers


def experiment_id(client: MlflowClient, name: str) -> str:
    """Id of an experiment.

    Raises:
        LookupError: There is none of that name.
    """
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        raise LookupError(f"the experiment {name!r} has gone: it was there when the tracking store was opened")
    return experiment.experiment_id
