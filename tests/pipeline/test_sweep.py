"""A sweep's parent and children have names of their own; its models stand side by side."""

from __future__ import annotations

import itertools
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest

from configs import load_config, load_sweep
from evaluation.sweep_report import HEADLINES, Trial
from pipeline import runs, sweep, tracking
from pipeline.folders import open_run
from pipeline.stages import SELECTED_BY
from pipeline.sweep import compare_models, open_parent

# MLflow's own: its use of SQLAlchemy, and connections that its pool leaves to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning"),
]


@pytest.fixture
def former_store() -> Iterator[None]:
    former = mlflow.get_tracking_uri()
    yield
    mlflow.set_tracking_uri(former)


@pytest.mark.usefixtures("former_store")
def test_models_end_in_one_table_of_their_best_children(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = tracking.connect(uri, ["a", "b"], tmp_path / "artifacts")
    config = load_config([f"runs_dir={tmp_path / 'runs'}", f"tracking.uri={uri}"])
    found, parents, best = {}, [], []
    for model, rate in (("a", 0.25), ("b", 0.5)):
        parents.append(runs.create_run(client, model, "sweep", {}).info.run_id)
        trials = []
        for seed, mass in (("0", 0.5), ("1", 0.75)):
            child = runs.create_run(client, model, f"seed={seed}", {}).info.run_id
            metrics = {SELECTED_BY: mass, "test/mass": mass, "eval/vanilla/adversarial/hr": rate + mass / 10}
            trials.append(Trial({"model": model, "seed": seed}, "FINISHED", metrics, child))
        found[model] = [*trials, Trial({"model": model, "seed": "2"}, "FAILED", {})]
        best.append(trials[1].run_id)
    compare_models(config, found, parents, client)
    printed = capsys.readouterr().out
    assert "0.625" in printed  # mean over the seeds that finished
    assert "32.5 / -" in printed and "57.5 / -" in printed  # the vanilla rates of the best children
    page = urllib.parse.unquote(printed)
    assert all(f'"{run}"' in page for run in best)
    for parent in parents:
        assert {file.path for file in client.list_artifacts(parent, "models")} == {
            "models/summary.md", "models/summary.csv", "models/children.csv", "models/summary.png",
        }  # fmt: skip
    (text,) = (tmp_path / "runs" / "sweeps").glob("models-*/summary.md")
    assert "2 of 3" in text.read_text() and "Answers of each model's best child" in text.read_text()


def test_a_childs_lines_fit_the_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    children = load_sweep(["trainer.learning_rate=0.0003,0.001", "model.scr.strength=1.1,1.2", "seed=0,1"]).children
    run: Any = SimpleNamespace(info=SimpleNamespace(run_id="r"))
    monkeypatch.setattr(sweep, "Work", lambda _: SimpleNamespace(result_id=lambda _: "x"))
    monkeypatch.setattr(sweep, "find_run", lambda *_: run)
    monkeypatch.setattr(sweep, "every_number", lambda *_: dict.fromkeys(HEADLINES, 0.5))
    found = list(sweep.run_children(children, run, run, itertools.count(1), len(children)))
    assert len(found) == 8
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    said = " ".join(lines)
    assert "[child 8/8] trainer.learning_rate=0.001 model.scr.strength=1.2 seed=1 (finished before)" in said
    assert all(head in said for head, _, _ in HEADLINES.values())


@pytest.mark.usefixtures("former_store")
def test_sweeps_of_other_settings_get_other_names(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = tracking.connect(uri, ["scene-llava"], tmp_path / "artifacts")
    names = []
    for changes in ([], ["trainer.max_epochs=3"], []):
        places = [f"runs_dir={tmp_path / 'runs'}", f"tracking.uri={uri}"]
        sweep = load_sweep(["predictor.loss=kl,bce", *places, *changes])
        parent, child = open_parent(sweep.children, sweep, client), sweep.children[0]
        with open_run(child.config) as folder, runs.tracked(child, client, folder, parent) as tracker:
            names += [parent.info.run_name, client.get_run(str(tracker.run_id)).info.run_name]
    first, second = ["sweep: loss (2)", "loss=kl"], ["sweep: loss (2) #2", "loss=kl #2"]
    assert names == [*first, *second, *first]  # the third is the first, continued
    sweep = load_sweep(
        ["predictor.loss=kl,bce", "trainer=quick", f"runs_dir={tmp_path / 'runs'}", f"tracking.uri={uri}"]
    )
    assert open_parent(sweep.children, sweep, client).info.run_name == "sweep: loss (2 trials)"
