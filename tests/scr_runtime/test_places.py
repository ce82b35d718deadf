"""Predictors from elsewhere: the three forms, and what is told where one can't be fetched."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from scr_runtime import SCR, SCRConfig, describe_model, errors, load_predictor, save_predictor
from scr_runtime.places import FORMS, kind_of, local_folder
from tests.scr_runtime.reference import make_predictor

pytestmark = pytest.mark.filterwarnings("ignore:32 sources are asked for")  # the paper's K, on 36 patches

CONFIG = SCRConfig(num_sources=4, edit_layers=(0, 2), attention_layers=(2, 4))
COMMITS = "a" * 40, "b" * 40


@pytest.fixture
def folder(tmp_path: Path, tiny_llava: Any) -> Path:
    model = tiny_llava(0)
    return save_predictor(tmp_path / "made" / "p", make_predictor(model), scr=CONFIG, model=describe_model(model))


@pytest.fixture
def cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hub's cache on this machine, with two commits of a repository, as the library lays it out."""
    repository = tmp_path / "hub" / "models--org--scr-tiny"
    for commit, threshold in zip(COMMITS, (0.25, 0.75), strict=True):
        predictor = load_predictor(folder)
        predictor.threshold = threshold
        save_predictor(repository / "snapshots" / commit, predictor, scr=CONFIG, model=predictor.info["model"])
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMITS[1])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return repository


def test_the_forms_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "here").mkdir(parents=True)
    assert [kind_of(place) for place in ("org/scr-llava-1.5-7b", "a/b", "A_1/b.c-d")] == ["hub"] * 3
    assert [kind_of(place) for place in ("models:/a@champion", "models:/a/1", "models:/m-0123")] == ["registry"] * 3
    for place in ("org/here", "./org/x", "/org/x", "../x", "a/b/c", "name", "", "~/x", "https://h.co/a/b", "a\0b/c",
                  "a b/c", "org\\x", "x" * 90 + "/" + "y" * 90, Path("org/x"), Path("models:/a/1")):  # fmt: skip
        assert kind_of(place) == "folder", place


def test_a_repository_of_the_hub(cache: Path, tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(0)
    for revision, threshold in ((None, 0.75), ("main", 0.75), (COMMITS[0], 0.25)):
        assert load_predictor("org/scr-tiny", revision=revision, verify=True).threshold == threshold
        with torch.no_grad(), SCR(model, predictor="org/scr-tiny", revision=revision, mode="one-pass") as scr:
            model(**llava_inputs(model, [1]))
        assert scr.config == CONFIG and f"threshold {threshold}" in repr(scr)
    with local_folder("org/scr-tiny", COMMITS[0], local_files_only=True) as found:
        assert found == cache / "snapshots" / COMMITS[0]


def test_what_the_hub_does_not_have(cache: Path, tiny_llava: Any) -> None:
    for place, revision in (("org/other", None), ("org/scr-tiny", "c" * 40), ("org/scr-tiny", "v1")):
        with pytest.raises(errors.PredictorNotFoundError) as caught:
            load_predictor(place, revision=revision, local_files_only=True)
        assert place in str(caught.value) and str(revision or "") in str(caught.value) and FORMS in str(caught.value)
        with pytest.raises(errors.PredictorNotFoundError):
            SCR(tiny_llava(0), predictor=place, revision=revision, mode="one-pass")
        with pytest.warns(RuntimeWarning, match="every prefill runs two-pass with the paper's settings"):
            SCR(tiny_llava(0), predictor=place, revision=revision, mode="auto")


def test_what_the_hub_says_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*args: Any, **kwargs: Any) -> str:
        raise OSError("Got: ConnectError\n\nCheck your connection and try again.")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    with pytest.raises(errors.PredictorNotFoundError) as caught:
        load_predictor("org/other")
    message = str(caught.value)
    assert "OSError: Got: ConnectError Check your connection and try again. A predictor" in message
    assert "\n" not in message


def test_every_mistake_shows_the_forms(folder: Path, tiny_llava: Any) -> None:
    for place in ("nowhere", "./org/x", "", "https://huggingface.co/org/x", folder.parent):
        with pytest.raises(errors.PredictorNotFoundError) as caught:
            load_predictor(place)
        assert FORMS in str(caught.value)
    for place in (str(folder), folder, "models:/a/1", "nowhere"):
        with pytest.raises(errors.ConfigurationError, match=r"revision='main' is for a Hub repository.*ORG/NAME"):
            load_predictor(place, revision="main")
    with pytest.raises(errors.ConfigurationError, match=r"predictor=3: .*models:/NAME@ALIAS"):
        SCR(tiny_llava(0), predictor=3)  # type: ignore[arg-type]


def test_the_registry_without_mlflow(tiny_llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow.artifacts", None)
    with pytest.raises(errors.PredictorNotFoundError, match=r"pip install 'scr-runtime\[registry\]'"):
        load_predictor("models:/scr@champion")
    with pytest.warns(RuntimeWarning, match=r"pip install 'scr-runtime\[registry\]'"):
        SCR(tiny_llava(0), config=CONFIG, predictor="models:/scr@champion", mode="auto")


def test_the_registry_with_it(folder: Path, tiny_llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/export/test_registry.py does it with a real store."""
    asked: list[Path] = []

    def download_artifacts(artifact_uri: str, dst_path: str) -> str:
        if artifact_uri != "models:/scr@champion":
            raise RuntimeError("no such alias")
        asked.append(Path(dst_path))
        return str(shutil.copytree(folder, Path(dst_path) / "predictor"))

    monkeypatch.setattr("mlflow.artifacts.download_artifacts", download_artifacts)
    scr = SCR(tiny_llava(0), predictor="models:/scr@champion", mode="one-pass")
    assert scr.config == CONFIG
    assert len(asked) == 1 and not asked[0].exists()  # nothing stays on the disk
    with pytest.raises(errors.PredictorNotFoundError, match=r"models:/scr@none.*no such alias.*ORG/NAME"):
        load_predictor("models:/scr@none")
