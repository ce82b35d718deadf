"""Where a predictor is: in a folder, in MLflow's registry, or on the Hugging Face Hub."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from scr_runtime.errors import ConfigurationError, PredictorNotFoundError

FILES = ("config.json", "model.safetensors", "golden.safetensors", "README.md")
"""What is fetched from the Hub."""
FORMS = (
    "A predictor is given as a folder ('runs/predictors/scene-llava'), as a model of MLflow's registry "
    "('models:/NAME@ALIAS' or 'models:/NAME/VERSION'), or as a repository of the Hugging Face Hub ('ORG/NAME')."
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)

Place = str | os.PathLike[str]


def kind_of(place: Place) -> Literal["folder", "registry", "hub"]:
    """Tells the three forms apart.

    The first rule that holds decides:

    1. A path object is a folder.
    2. What begins with ``models:/`` is a model of MLflow's registry.
    3. What exists on this machine is a folder.
    4. ``ORG/NAME``, two parts of letters, digits, ``-``, ``_`` and ``.`` that begin with a letter or digit, is a
       repository of the Hub.
    5. All else is a folder, which does not exist.
    """
    if not isinstance(place, str):
        return "folder"
    if place.startswith("models:/"):
        return "registry"
    try:
        exists = os.path.lexists(place)
    except (OSError, ValueError):
        exists = False
    return "hub" if not exists and is_hub_id(place) else "folder"


def is_hub_id(name: str) -> bool:
    """Whether a name is ``ORG/NAME``: one that the Hub can be asked for."""
    return len(name) <= 96 and _HUB_ID.fullmatch(name) is not None


@contextmanager
def local_folder(place: Place, revision: str | None = None, *, local_files_only: bool = False) -> Generator[Path]:
    """A predictor folder on this machine, for the duration of the block: fetched if it is elsewhere.

    Args:
        place: See ``kind_of``.
        revision: Commit, tag or branch of a Hub repository; ``None`` is its main branch.
        local_files_only: Whether the Hub is not asked, only its cache; so does ``HF_HUB_OFFLINE=1``.

    Raises:
        ConfigurationError: If a revision is given for what is no Hub repository.
        PredictorNotFoundError: If it can't be fetched. That a folder exists is not checked here.
    """
    kind = kind_of(place)
    if revision is not None and kind != "hub":
        raise ConfigurationError(f"revision={revision!r} is for a Hub repository, and {str(place)!r} is none. {FORMS}")
    if kind == "hub":
        yield _from_hub(str(place), revision, local_files_only)
    elif kind == "registry":
        with tempfile.TemporaryDirectory(prefix="scr-predictor-") as folder:
            yield _from_registry(str(place), folder)
    else:
        yield Path(place)


def _from_hub(repository: str, revision: str | None, local_files_only: bool) -> Path:
    """The Hub's snapshot in its cache; its login and its environment variables hold."""
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                repository, revision=revision, local_files_only=local_files_only, allow_patterns=list(FILES)
            )
        )
    except Exception as error:  # the Hub's own errors, those of its transport, and those of the disk
        at = "" if revision is None else f" at revision {revision!r}"
        raise PredictorNotFoundError(
            f"no folder {repository!r} on this machine, and the Hub gave no repository of that name{at}: "
            f"{_in_short(error)}. {FORMS}"
        ) from error


def _from_registry(uri: str, folder: str) -> Path:
    """Downloads through MLflow, from the tracking server that MLflow is set to."""
    try:
        from mlflow.artifacts import download_artifacts
    except ImportError as error:
        raise PredictorNotFoundError(
            f"{uri!r} is a model of MLflow's registry, and mlflow is not installed: "
            "pip install 'scr-runtime[registry]', and set MLFLOW_TRACKING_URI"
        ) from error
    try:
        return Path(download_artifacts(artifact_uri=uri, dst_path=folder))
    except Exception as error:  # MLflow's own errors, those of its store, and those of the disk
        raise PredictorNotFoundError(
            f"{uri!r} can't be fetched from MLflow, at its tracking URI: {_in_short(error)}. {FORMS}"
        ) from error


def _in_short(error: Exception) -> str:
    """An error of another library in one line, without the full stop."""
    return f"{type(error).__name__}: {' '.join(str(error).split()):.300}".rstrip(".")
