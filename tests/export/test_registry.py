"""Predictors through a real SQLite store: logged, registered, fetched and read again; runs with their origin."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from export import registry
from scr_runtime import PredictorConfig, SCRConfig, SourcePredictor, load_predictor, save_predictor
from scr_runtime.errors import SCRError

# MLflow's own: its use of SQLAlchemy, and connections that its pool leaves to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning"),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[MlflowClient, str]:
    folder = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{folder}/mlflow.db"
    return registry.connect(uri, ["fits"], folder / "artifacts"), uri


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "predictor"
    torch.manual_seed(0)
    network = SourcePredictor(PredictorConfig(hidden_size=16, rank=4, width=8))
    model = {"model_type": "llava", "hidden_size": 16, "layers": 4}
    scr = SCRConfig(num_sources=2, edit_layers=(0, 1), attention_layers=(1, 2))
    save_predictor(folder, network, scr=scr, model=model)
    return folder


def made(client: MlflowClient, predictor: Path, seed: int) -> tuple[str, str]:
    run = registry.create_run(client, "fits", f"seed={seed}", {}).info.run_id
    return run, registry.log_predictor(client, run, predictor, {"seed": seed})


def test_a_predictor_comes_back_from_the_registry_as_it_was(
    store: tuple[MlflowClient, str], predictor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, uri = store
    run, model = made(client, predictor, 0)
    assert registry.logged_model(client, run) == model
    logged = client.get_logged_model(model)
    assert (logged.name, logged.status, logged.params, logged.source_run_id) == (
        "predictor",
        "READY",
        {"seed": "0"},
        run,
    )
    assert registry.register(client, model, "tiny", run) == "1"
    elsewhere = f"sqlite:///{tmp_path}/other.db"
    monkeypatch.setattr("mlflow.tracking._tracking_service.utils._tracking_uri", elsewhere)
    for place, address in enumerate((f"models:/tiny@{registry.ALIAS}", "models:/tiny/1", f"models:/{model}")):
        folder = registry.download(address, tmp_path / "deep" / str(place), uri)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
            path.name: path.read_bytes() for path in predictor.iterdir()
        }
        for name, weight in load_predictor(predictor).state_dict().items():
            assert torch.equal(load_predictor(folder).state_dict()[name], weight)
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"0", "1", "2"}  # nothing staged is left
    assert mlflow.get_tracking_uri() == elsewhere


def test_the_alias_moves_to_the_newest_and_no_model_is_registered_twice(
    store: tuple[MlflowClient, str], predictor: Path
) -> None:
    client, _ = store
    first, second = made(client, predictor, 1), made(client, predictor, 2)
    versions = [registry.register(client, model, "moving", run) for run, model in (first, second, first)]
    assert versions == ["1", "2", "1"]
    assert len(client.search_model_versions("name='moving'")) == 2
    assert client.get_model_version_by_alias("moving", registry.ALIAS).run_id == first[0]


def test_what_can_not_be_fetched_leaves_nothing_behind(
    store: tuple[MlflowClient, str], predictor: Path, tmp_path: Path
) -> None:
    client, uri = store
    with pytest.raises(FileExistsError, match="choose another folder"):
        registry.download("models:/tiny/1", tmp_path, uri)
    with pytest.raises(MlflowException):
        registry.download("models:/nobody/1", tmp_path / "missing", uri)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    _, model = made(client, broken, 3)
    with pytest.raises(SCRError):
        registry.download(f"models:/{model}", tmp_path / "read", uri)
    assert {path.name for path in tmp_path.iterdir()} == {"broken"}


def test_a_run_ends_with_the_status_and_error_of_its_block(store: tuple[MlflowClient, str]) -> None:
    client, uri = store
    seen = {}
    for error in (None, ValueError("too small"), KeyboardInterrupt(), StopAsyncIteration()):
        run = registry.create_run(client, "fits", "x", {"run.kind": "single"}).info.run_id
        try:
            with registry.recorded(client, run, uri, (KeyboardInterrupt, StopAsyncIteration)):
                if error:
                    raise error
        except (ValueError, KeyboardInterrupt, StopAsyncIteration):
            pass
        found = client.get_run(run)
        seen[found.info.status] = found.data.tags.get("error")
    assert seen == {"FINISHED": None, "FAILED": "ValueError: too small", "KILLED": None}
    assert "command" in found.data.tags


def test_system_metrics_are_logged(store: tuple[MlflowClient, str], monkeypatch: pytest.MonkeyPatch) -> None:
    client, uri = store
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    run = registry.create_run(client, "fits", "x", {}).info.run_id
    with registry.recorded(client, run, uri):
        deadline = time.monotonic() + 30
        while "system/cpu_utilization_percentage" not in client.get_run(run).data.metrics:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_runs_are_found_by_tag_and_status(store: tuple[MlflowClient, str]) -> None:
    client, _ = store
    run = registry.create_run(client, "fits", "x", {"mark": "a"}).info.run_id
    assert registry.find_run(client, "fits", "mark", "a", "FINISHED") is None
    assert registry.find_run(client, "fits", "mark", "b") is None
    client.set_terminated(run, "FINISHED")
    newer = registry.create_run(client, "fits", "x", {"mark": "a"}, parent=run).info.run_id
    assert newer != run
    found = registry.find_run(client, "fits", "mark", "a", "FINISHED")
    assert found is not None and found.info.run_id == run
    assert client.get_run(newer).data.tags["mlflow.parentRunId"] == run


def test_git_is_told_and_not_needed(tmp_path: Path) -> None:
    assert registry.git_tags(tmp_path) == {}

    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=n", "-c", "user.email=e@x", *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "first")
    assert registry.git_tags(tmp_path) == {"mlflow.source.git.commit": git("rev-parse", "HEAD"), "git.dirty": "false"}
    (tmp_path / "file").write_text("2")
    assert registry.git_tags(tmp_path)["git.dirty"] == "true"


def test_a_deleted_experiment_is_told(store: tuple[MlflowClient, str], tmp_path: Path) -> None:
    client, uri = store
    client.delete_experiment(client.create_experiment("gone"))
    with pytest.raises(ValueError, match="'gone' is deleted"):
        registry.connect(uri, ["gone"], tmp_path)


def test_a_server_that_is_not_there_is_told_in_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = time.monotonic()
    with pytest.raises(MlflowException, match=r"127\.0\.0\.1"):
        registry.connect("http://127.0.0.1:9", ["fits"], tmp_path)
    assert time.monotonic() - started < 20
