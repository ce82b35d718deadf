"""Predictors as registered models of MLflow: logged, registered, promoted, rolled back, downloaded.

A predictor stays the folder that it is, without pickle or a copy of its class: a download is a folder for
`scr_runtime.load_predictor`.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import LoggedModelOutput, LoggedModelStatus
from mlflow.exceptions import MlflowException

from export.errors import PublishError
from scr_runtime import SourcePredictor, load_predictor
from scr_runtime.artifact import CARD_NAME

MODEL_TYPE = "scr-predictor"
ALIAS = "latest-fit"
"""Alias that `register` moves to the version it makes; ``latest`` itself is a reserved word of MLflow."""
CHAMPION = "champion"
"""Alias of the version in service, which `promote` and `rollback` move."""
_BEFORE = "champion.before"  # tag of a version: the champion that it took the place of
_DESCRIPTION = (
    "Source predictors for one-pass Spatial Credit Redistribution. @champion is the version in service, moved by "
    "python -m export promote and rollback; @latest-fit is the newest."
)


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
        client.create_registered_model(name, description=_DESCRIPTION)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        if not client.get_registered_model(name).description:
            client.update_registered_model(name, _DESCRIPTION)
    known = [v for v in client.search_model_versions(f"name='{name}'") if v.run_id == run_id]
    if known:
        version = known[0].version
    else:
        address = f"models:/{model_id}"
        version = client.create_model_version(
            name, address, run_id, description=_card_text(address), model_id=model_id
        ).version
    client.set_registered_model_alias(name, ALIAS, str(version))
    return str(version)


def log_card(client: MlflowClient, model_id: str, card: Path) -> None:
    """Replaces the model card of a LoggedModel."""
    client.log_model_artifact(model_id, str(card))


def _card_text(address: str) -> str:
    """The card of a model without its metadata, as far as a description can hold it."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            text = (Path(download_artifacts(artifact_uri=address, dst_path=folder)) / CARD_NAME).read_text("utf-8")
        except (MlflowException, OSError):
            return "a predictor folder without a card"
        return text.split("\n---\n", 1)[-1].strip()[:4000]


@dataclass(frozen=True)
class Order:
    """Who moves an alias, and why.

    Attributes:
        who: A name.
        why: A reason; needed where it is forced.
        force: Whether it is moved although the candidate is no better.
    """

    who: str
    why: str = ""
    force: bool = False


def promote(client: MlflowClient, tracking_uri: str, name: str, version: str, order: Order) -> str:
    """Moves ``@champion`` to a version, if its predictor is better than the champion's.

    Better is: the same data fingerprint, a higher ``test/mass``, and no lower ``test/recall``, as config.json stores
    them. A first champion has nothing to beat. Both folders are downloaded and read, the candidate's with its golden
    pair.

    Args:
        client: Of the tracking server.
        tracking_uri: Its URI.
        name: The registered model.
        version: The candidate.
        order: Who, why, and whether by force. All of it is recorded in tags of the version.

    Returns:
        What was compared, in a sentence.

    Raises:
        PublishError: If the candidate is not better, or is the champion already.
        scr_runtime.errors.PredictorError: If the candidate can't be read, or computes something else here.
    """
    if order.force and not order.why:
        raise PublishError("force=true needs a reason: why='...'. It is recorded with the version.")
    champion = _champion(client, name)
    if champion == version:
        raise PublishError(f"version {version} of {name} is the champion already")
    candidate = _read(f"models:/{name}/{version}", tracking_uri, verify=True)
    found, better = "the first champion", True
    if champion is not None:
        found, better = _compared(candidate, _read(f"models:/{name}/{champion}", tracking_uri))
    if not better and not order.force:
        raise PublishError(
            f"version {version} of {name} is not promoted over version {champion}: {found}. To promote it all the "
            "same: force=true why='...'"
        )
    tags = {
        _BEFORE: champion or "", "champion.who": order.who, "champion.why": order.why, "champion.compared": found,
        "champion.forced": str(order.force and not better).lower(),
    }  # fmt: skip
    for key, value in tags.items():
        client.set_model_version_tag(name, version, key, value)
    client.set_registered_model_alias(name, CHAMPION, version)
    return found


def rollback(client: MlflowClient, name: str, order: Order) -> tuple[str, str]:
    """Moves ``@champion`` back to the version that the champion took the place of.

    Returns:
        The version that was the champion, and the one that is now.

    Raises:
        PublishError: If there is no champion, or none was before it.
    """
    champion = _champion(client, name)
    if champion is None:
        raise PublishError(f"{name} has no @{CHAMPION}: promote a version first")
    before = client.get_model_version(name, champion).tags.get(_BEFORE)
    if not before:
        raise PublishError(f"version {champion} of {name} is its first champion: there is none to go back to")
    client.set_registered_model_alias(name, CHAMPION, before)
    client.set_model_version_tag(name, champion, "rolled_back", json.dumps({"who": order.who, "why": order.why}))
    return champion, before


def _champion(client: MlflowClient, name: str) -> str | None:
    aliases = client.get_registered_model(name).aliases
    return str(aliases[CHAMPION]) if CHAMPION in aliases else None


def _read(uri: str, tracking_uri: str, *, verify: bool = False) -> SourcePredictor:
    with tempfile.TemporaryDirectory() as folder, _tracking_at(tracking_uri):
        return load_predictor(download_artifacts(artifact_uri=uri, dst_path=folder), verify=verify)


def _compared(candidate: SourcePredictor, champion: SourcePredictor) -> tuple[str, bool]:
    """How a candidate stands to the champion, in words, and whether it is better."""
    one, other = candidate.info, champion.info
    prints = [info.get("provenance", {}).get("data_fingerprint") for info in (one, other)]
    if prints[0] is None or prints[0] != prints[1]:
        return (
            f"their data differs (data_fingerprint {prints[0]} and {prints[1]}), so metrics can't be compared",
            False,
        )
    parts, signs = [], []
    for key in ("test/mass", "test/recall"):
        values = [info.get("metrics", {}).get(key) for info in (one, other)]
        if not all(isinstance(value, int | float) for value in values):
            return f"{key} is {values[0]} and {values[1]}: both folders need a number", False
        parts.append(f"{key} {values[0]:.4f} against {values[1]:.4f}")
        signs.append(values[0] - values[1])
    return ", ".join(parts), signs[0] > 0 and signs[1] >= 0


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
