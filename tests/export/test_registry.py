"""Predictors through a real SQLite store: logged, registered, downloaded and read again."""

from __future__ import annotations

from collections.abc import Iterator
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
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[MlflowClient, str]]:
    former = mlflow.get_tracking_uri()
    folder = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{folder}/mlflow.db"
    mlflow.set_tracking_uri(uri)  # MLflow resolves the address of a LoggedModel there
    client = MlflowClient(uri)
    client.create_experiment("fits", (folder / "artifacts").as_uri())
    yield client, uri
    mlflow.set_tracking_uri(former)


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "predictor"
    torch.manual_seed(0)
    network = SourcePredictor(PredictorConfig(hidden_size=16, rank=4, width=8))
    model = {"family": "llava", "hidden_size": 16, "num_blocks": 4, "embedding_probe": [0.5] * 32}
    scr = SCRConfig(num_sources=2, edit_layers=(0, 1), attention_layers=(1, 2))
    save_predictor(folder, network, scr=scr, model=model)
    return folder


def made(client: MlflowClient, predictor: Path, seed: int) -> tuple[str, str]:
    experiment = client.get_experiment_by_name("fits")
    assert experiment is not None
    run = client.create_run(experiment.experiment_id, run_name=f"seed={seed}").info.run_id
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
