"""Predictors as registered models of MLflow: logged, registered, downloaded.

A predictor stays the folder that it is, without pickle or a copy of its class: a download is a folder for
`scr_runtime.load_predictor`.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import LoggedModelOutput, LoggedModelStatus
from mlflow.exceptions import MlflowException

from scr_runtime import load_predictor

MODEL_TYPE = "scr-predictor"
ALIAS = "latest-fit"
"""Alias that `register` moves to the version it makes; ``latest`` itself is a reserved word of MLflow."""


def log_predictor(
    client: MlflowClient, run_id: str, folder: Path, params: Mapping[str, Any], name: str = "predictor"
) -> str:
    """Uploads a predictor folder as the LoggedModel of a run.

    Args:
        client: Of the tracking server.
        run_id: The run that made it.
        folder: A finished predictor folder.
        params: What the models page shows beside it; values are cut at 250 characters.
        name: Of the LoggedModel; letters that MLflow does not take become hyphens.

    Returns:
        The model's id; ``models:/<id>`` is its address.
    """
    model = client.create_logged_model(
        client.get_run(run_id).info.experiment_id,
        name=re.sub(r"[/:.%\"']+", "-", name),
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
    """Sets MLflow's global URI: it resolves the address of a LoggedModel there, whatever URI it is called with."""
    former = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(former)


def download(uri: str, folder: str | Path, tracking_uri: str) -> Path:
    """Downloads a predictor into a folder, and reads it once to prove it.

    Args:
        uri: ``models:/<name>@latest-fit``, ``models:/<name>/<version>`` or ``models:/<model id>``.
        folder: Where it goes; must not exist yet.
        tracking_uri: Of the tracking store; the default configuration's is ``sqlite:///runs/mlflow.db``.

    Returns:
        `folder`, for ``SCR(model, predictor=...)`` or ``scr_runtime.load_predictor``.

    Raises:
        FileExistsError: If there is something at `folder`.
        mlflow.exceptions.MlflowException: If there is no such model.
        scr_runtime.errors.SCRError: If the download is not a predictor that this version reads.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists: choose another folder, or remove it first")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as staged:
        with _tracking_at(tracking_uri):
            downloaded = Path(download_artifacts(artifact_uri=uri, dst_path=staged, tracking_uri=tracking_uri))
        load_predictor(downloaded)
        shutil.copytree(downloaded, folder)
    return folder
