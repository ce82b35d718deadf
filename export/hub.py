"""Predictors as repositories of the Hugging Face Hub. Login, cache and proxies are huggingface_hub's own."""

from __future__ import annotations

import shutil
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from export.errors import PublishError
from scr_runtime import load_predictor
from scr_runtime.places import FILES, local_folder

_ENGINES = ("model.onnx", "model.pt2")


def push(folder: Path, repo: str, *, private: bool = False, revision: str | None = None) -> str:
    """Uploads a predictor folder as one commit, after its golden pair has been compared.

    Args:
        folder: A predictor folder.
        repo: ``ORG/NAME``; made if it is missing.
        private: Whether a repository that is made is private.
        revision: Branch; ``None`` is the main one. It has to exist.

    Returns:
        The commit, to pin by ``SCR(model, predictor=repo, revision=commit)``.

    Raises:
        scr_runtime.errors.PredictorError: If the folder can't be used.
        PublishError: If the Hub refuses.
    """
    load_predictor(folder, verify=True)
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, revision=revision, allow_patterns=[*FILES, *_ENGINES],
            commit_message="SCR predictor",
        )  # fmt: skip
    except (HfHubHTTPError, ValueError, OSError) as error:
        raise PublishError(
            f"{folder} was not pushed to {repo}: {type(error).__name__}: {str(error).strip():.500}\n"
            "Log in with `hf auth login`, or set HF_TOKEN; the name has the form ORG/NAME."
        ) from error
    return str(commit.oid)


def pull(repo: str, folder: Path, revision: str | None = None) -> Path:
    """Downloads a predictor into a folder, and compares its golden pair before the folder is there.

    Raises:
        PublishError: If there is something at `folder`.
        scr_runtime.errors.PredictorError: If it can't be fetched, or can't be used.
    """
    if folder.exists():
        raise PublishError(f"{folder} exists: choose another folder, or remove it first")
    with local_folder(repo, revision) as found:
        load_predictor(found, verify=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        staged = folder.with_name(f".{folder.name}.staged")
        shutil.rmtree(staged, ignore_errors=True)
        shutil.copytree(found, staged)
    return staged.rename(folder)
