"""Predictors through a real SQLite store: logged, registered, downloaded and read again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from export import registry
from export.errors import PublishError
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


# -- promote and rollback --------------------------------------------------------------------------------------------

METRICS = {"test/mass": 0.9, "test/recall": 0.8}


def registered(
    store: tuple[MlflowClient, str], folder: Path, name: str, metrics: dict[str, float], data: str | None = "d"
) -> str:
    """Another version of a registered model, with these metrics."""
    client, _ = store
    torch.manual_seed(0)
    network = SourcePredictor(PredictorConfig(hidden_size=16, rank=4, width=8))
    model = {"family": "llava", "hidden_size": 16, "num_blocks": 4, "embedding_probe": [0.5] * 32}
    scr = SCRConfig(num_sources=2, edit_layers=(0, 1), attention_layers=(1, 2))
    place = folder / f"{len(list(folder.iterdir()))}"
    save_predictor(place, network, scr=scr, model=model, metrics=metrics, provenance={"data_fingerprint": data},
                   card="---\nlicense: x\n---\n\n# A card\n")  # fmt: skip
    run, logged = made(client, place, 0)
    return registry.register(client, logged, name, run)


def champion(store: tuple[MlflowClient, str], name: str) -> str:
    return str(store[0].get_registered_model(name).aliases[registry.CHAMPION])


def test_only_a_better_predictor_is_promoted(store: tuple[MlflowClient, str], tmp_path: Path) -> None:
    client, uri = store
    order = registry.Order("ada", "weekly fit")
    first = registered(store, tmp_path, "race", METRICS)
    assert registry.promote(client, uri, "race", first, order) == "the first champion"
    assert champion(store, "race") == first
    with pytest.raises(PublishError, match="is the champion already"):
        registry.promote(client, uri, "race", first, order)
    for metrics, data, words in (
        (METRICS, "d", r"test/mass 0\.9000 against 0\.9000"),
        ({"test/mass": 0.95, "test/recall": 0.79}, "d", r"test/recall 0\.7900 against 0\.8000"),
        ({"test/mass": 0.95}, "d", "test/recall is None and 0.8"),
        ({"test/mass": 0.99, "test/recall": 0.99}, "e", "their data differs .*e and d"),
        ({"test/mass": 0.99, "test/recall": 0.99}, None, "their data differs"),
    ):
        version = registered(store, tmp_path, "race", metrics, data)
        with pytest.raises(PublishError, match=f"not promoted over version {first}: .*{words}"):
            registry.promote(client, uri, "race", version, order)
        assert champion(store, "race") == first
    better = registered(store, tmp_path, "race", {"test/mass": 0.91, "test/recall": 0.8})
    assert "0.9100 against 0.9000" in registry.promote(client, uri, "race", better, order)
    assert champion(store, "race") == better
    tags = client.get_model_version("race", better).tags
    assert (tags["champion.who"], tags["champion.before"], tags["champion.forced"]) == ("ada", first, "false")


def test_force_and_rollback_are_recorded(store: tuple[MlflowClient, str], tmp_path: Path) -> None:
    client, uri = store
    order = registry.Order("ada")
    with pytest.raises(MlflowException):
        registry.rollback(client, "forced", order)
    first = registered(store, tmp_path, "forced", METRICS)
    with pytest.raises(PublishError, match="promote a version first"):
        registry.rollback(client, "forced", order)
    registry.promote(client, uri, "forced", first, order)
    with pytest.raises(PublishError, match="none to go back to"):
        registry.rollback(client, "forced", order)
    worse = registered(store, tmp_path, "forced", {"test/mass": 0.1, "test/recall": 0.1})
    with pytest.raises(PublishError, match="force=true needs a reason"):
        registry.promote(client, uri, "forced", worse, registry.Order("ada", force=True))
    registry.promote(client, uri, "forced", worse, registry.Order("ada", "a demo", force=True))
    tags = client.get_model_version("forced", worse).tags
    assert (champion(store, "forced"), tags["champion.why"], tags["champion.forced"]) == (worse, "a demo", "true")
    assert "0.1000 against 0.9000" in tags["champion.compared"]
    assert registry.rollback(client, "forced", registry.Order("bob", "the demo is over")) == (worse, first)
    assert champion(store, "forced") == first
    assert json.loads(client.get_model_version("forced", worse).tags["rolled_back"])["who"] == "bob"


def test_a_candidate_that_is_damaged_is_not_promoted(
    store: tuple[MlflowClient, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, uri = store
    version = registered(store, tmp_path, "damaged", METRICS)
    monkeypatch.setattr("torch.nn.functional.gelu", torch.nn.functional.relu)
    with pytest.raises(SCRError, match="scores of the golden inputs differ"):
        registry.promote(client, uri, "damaged", version, registry.Order("ada", "x", force=True))
    assert registry.CHAMPION not in client.get_registered_model("damaged").aliases


def test_descriptions_are_filled_and_the_card_can_be_replaced(store: tuple[MlflowClient, str], tmp_path: Path) -> None:
    client, uri = store
    version = registered(store, tmp_path, "described", METRICS)
    assert "@champion is the version in service" in str(client.get_registered_model("described").description)
    found = client.get_model_version("described", version)
    assert found.description == "# A card"
    (tmp_path / "README.md").write_text("# Another\n")
    registry.log_card(client, str(registry.logged_model(client, str(found.run_id))), tmp_path / "README.md")
    folder = registry.download(f"models:/described/{version}", tmp_path / "fetched", uri)
    assert (folder / "README.md").read_text() == "# Another\n"


def test_the_runtime_fetches_the_champion(store: tuple[MlflowClient, str], tmp_path: Path) -> None:
    client, uri = store
    version = registered(store, tmp_path, "served", METRICS)
    registry.promote(client, uri, "served", version, registry.Order("ada"))
    former = mlflow.get_tracking_uri()
    try:
        mlflow.set_tracking_uri(uri)
        assert load_predictor("models:/served@champion", verify=True).info["metrics"] == METRICS
        with pytest.raises(SCRError, match=r"models:/served@nobody.*ORG/NAME"):
            load_predictor("models:/served@nobody")
    finally:
        mlflow.set_tracking_uri(former)
