"""The whole chain on a few images, through the command that a user types."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image

from export import registry
from scenes.world import render_scene
from scr_runtime import load_predictor

# MLflow's own: its use of SQLAlchemy, and connections that its pool leaves to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning"),
]

ROOT = Path(__file__).parents[1]
SMALL = [
    "harvest.samples=40",
    "harvest.validation=10",
    "harvest.test=10",
    "harvest.shard_size=20",
    "data.world.train=60",
    "data.world.val=8",
    "trainer.max_epochs=2",
    "evaluation.images=4",
    "evaluation.bootstrap=50",
    "evaluation.latency_repeats=2",
]


def run(*arguments: str, cwd: Path = ROOT, program: str = "train.py") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(["-m", program] if not program.endswith(".py") else [str(ROOT / program)])]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "0.3"}
    return subprocess.run(
        [*command, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A folder in which `python train.py` has run, and what it printed."""
    folder = tmp_path_factory.mktemp("chain")
    result = run(*SMALL, "tracking.register=scr-scene-llava", cwd=folder)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder, result


@pytest.mark.slow
def test_the_chain_ends_in_a_predictor_tables_and_where_they_are(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, result = finished
    assert load_predictor(folder / "runs/predictors/scene-llava").info["scr"]["num_sources"] == 8
    for word in ("position", "predictor", "mass@8", "two-pass", "swapped", "make ui", "SCR(model, predictor="):
        assert word in result.stdout
    assert result.stdout.startswith("python train.py: scene-llava on scenes, files in runs\n")
    assert re.search(r"done in [\d.]+ minutes\n\n(.+)\n$", result.stdout)
    report = json.loads((folder / "runs/reports/scene-llava/evaluation.json").read_text())
    assert " ".join(result.stdout.partition(" minutes\n\n")[2].split()) == report["verdict"]["sentence"]
    assert not re.search(r"warn|Traceback", result.stderr, re.IGNORECASE)
    assert "weights_only" not in result.stderr  # a notice of Lightning's
    assert result.stdout.count("scenes: ") == 1  # the world is rendered, and not "reused" in the same run
    page = (folder / "runs/reports/scene-llava/evaluation.html").read_text()
    assert "The predictor on 10 test images, K = 8 (" in page and "<td>position</td>" in page
    assert page.count("data:image/png;base64,") == 2  # maps and reliability
    reports = {path.name for path in (folder / "runs/reports/scene-llava").iterdir()}
    assert reports == {
        "evaluation.html", "evaluation.md", "evaluation.json", "answers.jsonl", "fit.json", "maps.png",
        "reliability.png",
    }  # fmt: skip
    (this,) = [path for path in (folder / "runs/fits/scene-llava").iterdir() if not path.is_symlink()]
    assert (folder / "runs/fits/scene-llava/latest").resolve() == this.resolve()
    assert (folder / "runs/predictors/scene-llava").resolve() == (this / "predictor").resolve()
    assert {path.name for path in this.iterdir()} == {
        "config.yaml", "run.json", "run.lock", "checkpoints", "predictor", "reports",
    }  # fmt: skip
    assert {path.name for path in folder.iterdir()} == {"runs"}  # nothing lies anywhere else


@pytest.mark.slow
def test_mlflow_has_settings_data_metrics_figures_and_the_predictor(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = finished
    with sqlite3.connect(folder / "runs/mlflow.db") as database:
        params = dict(database.execute("select key, value from params"))
        latest = dict(database.execute("select key, value from latest_metrics"))
        steps = database.execute("select count(*) from metrics where key = 'val/mass'").fetchone()[0]
        datasets = database.execute("select name from datasets").fetchall()
        status = database.execute("select status from runs").fetchall()
    database.close()
    assert params["harvest.samples"] == "40"
    assert params["model.scr.edit_layers"] == "[0, 2]"
    written = json.loads((folder / "runs/reports/scene-llava/evaluation.json").read_text())["metrics"]
    assert latest["hr_two_pass"] == pytest.approx(100 * written["eval/two-pass/adversarial/hr"], abs=1e-4)
    fitted = json.loads((folder / "runs/reports/scene-llava/fit.json").read_text())["metrics"]
    assert {"test/mass_low", "test/position/mass", "predictor/parameters"} <= set(fitted)
    assert latest["mass"] == pytest.approx(fitted["test/mass"], abs=1e-4)
    assert latest["best_mass"] > 0 and "system/cpu_utilization_percentage" in latest
    own = {name for name in latest if not name.startswith(("system/", "train/", "val/"))}
    assert own == {
        "recall", "ndcg", "mass", "ece", "best_mass", "hr_vanilla", "hr_two_pass", "hr_one_pass", "edit_kept",
        "prefill_x", "fallback", "auto_error",
    }  # fmt: skip
    assert max(map(len, own)) <= 13  # what the head of a column shows
    assert params["predictor"] == "default"  # the option of the group
    assert not {"runs_dir", "variant", "tracking.uri"} & set(params)  # places, which tell nothing apart
    assert (steps, datasets, status) == (2, [("scene-llava-scenes",)], [("FINISHED",)])
    names = {path.name for path in (folder / "runs/mlflow").rglob("*") if path.is_file()}
    assert {"maps.png", "reliability.png", "evaluation.html", "config.yaml", "model.safetensors"} <= names


def runs_of(folder: Path, kind: str) -> list[Run]:
    """Runs of one kind, oldest first."""
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("scene-llava")
    assert experiment is not None
    wanted = f"tags.`run.kind` = '{kind}'"
    return client.search_runs([experiment.experiment_id], wanted, order_by=["attributes.start_time ASC"])


@pytest.mark.slow
def test_a_run_has_its_origin_its_data_and_its_model(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = finished
    (single,) = runs_of(folder, "single")
    tags = single.data.tags
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert tags["mlflow.source.git.commit"] == commit.strip() and tags["git.dirty"] in ("true", "false")
    assert "evaluation.images=4" in tags["command"]
    assert single.inputs is not None
    (data,) = single.inputs.dataset_inputs
    assert [(tag.key, tag.value) for tag in data.tags] == [("mlflow.data.context", "training")]
    assert data.dataset.digest == tags["data.fingerprint"][:36]
    uri = f"sqlite:///{folder}/runs/mlflow.db"
    model_id = registry.logged_model(MlflowClient(uri), single.info.run_id)
    model = MlflowClient(uri).get_logged_model(str(model_id))
    found = {metric.key: metric.value for metric in model.metrics or []}
    assert found["mass"] == single.data.metrics["mass"]
    assert model.name == re.sub(r"[/:.%]+", "-", f"scene-llava {single.info.run_name}")
    report = json.loads((folder / "runs/reports/scene-llava/evaluation.json").read_text())
    for described in (tags, model.tags):
        assert described["mlflow.note.content"].startswith(f"**{report['verdict']['sentence']}**")
        assert "artifacts/reports/evaluation.html)" in described["mlflow.note.content"]
    fetched = registry.download(f"models:/{model_id}", folder / "runs" / "fetched", uri)
    assert (fetched / "model.safetensors").read_bytes() == (
        folder / "runs/predictors/scene-llava/model.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_the_folder_says_what_was_used_and_how_it_was_judged(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = finished
    place = folder / "runs/predictors/scene-llava"
    record = json.loads((place / "config.json").read_text())
    used = record["provenance"]["used"]
    assert (used["epochs"], used["target_fallback"]) == (2, 0.2) and used["test maps"] == 20
    assert record["metrics"]["test/mass_low"] <= record["metrics"]["test/mass"] <= record["metrics"]["test/mass_high"]
    assert (record["scr"]["num_sources"], record["metrics"]["test/k_max"]) == (8, 8)
    verdict = json.loads((folder / "runs/reports/scene-llava/evaluation.json").read_text())["verdict"]
    card = (place / "README.md").read_text()
    assert f"**{verdict['sentence']}**" in card and "8 sources asked for, 8 used" in card
    for file in place.iterdir():
        content = file.read_bytes()
        assert str(folder).encode() not in content and str(ROOT).encode() not in content, file.name
    uri = f"sqlite:///{folder}/runs/mlflow.db"
    fetched = registry.download("models:/scr-scene-llava/1", folder / "runs" / "registered", uri)
    assert {file.name: file.read_bytes() for file in place.iterdir()} == {
        file.name: file.read_bytes() for file in fetched.iterdir()
    }


FITS = [text for text in SMALL if not text.startswith(("evaluation.images=", "trainer.max_epochs="))]
FITS += ["evaluation.images=0", "trainer.max_epochs=1"]
SWEEP = [*FITS, "predictor.loss=kl,bce", "seed=0,1"]


@pytest.fixture(scope="module")
def swept(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> tuple[Path, subprocess.CompletedProcess[str], dict[str, Any]]:
    """The folder of `finished` after a sweep in it, what the sweep printed, and the plain run's files before it."""
    folder, _ = finished
    before = {path: path.read_bytes() for path in (folder / "runs/predictors/scene-llava").iterdir()}
    result = run(*SWEEP, "tracking.register=tiny", cwd=folder)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder, result, {"before": before}


def parent_best(children: list[Any]) -> float:
    return max(child.data.metrics["best_mass"] for child in children)


@pytest.mark.slow
def test_a_sweep_is_nested_runs_under_a_parent_that_sums_them_up(
    swept: tuple[Path, subprocess.CompletedProcess[str], dict[str, Any]],
) -> None:
    folder, result, kept = swept
    (parent,) = runs_of(folder, "sweep")
    children = runs_of(folder, "child")
    names = [child.info.run_name for child in children]
    assert names == ["loss=kl seed=0", "loss=kl seed=1", "loss=bce seed=0", "loss=bce seed=1"]
    assert {child.data.tags["mlflow.parentRunId"] for child in children} == {parent.info.run_id}
    assert {child.info.status for child in [parent, *children]} == {"FINISHED"}
    assert parent.info.run_name == "sweep: loss x seed (4)"
    assert parent.data.params == {"predictor.loss": "kl,bce", "seed": "0,1"}
    assert {child.data.params["predictor.loss"] for child in children} == {"kl", "bce"}
    mean = sum(child.data.metrics["mass"] for child in children[:2]) / 2
    assert "| kl&ensp;| 2&ensp;|" in parent.data.tags["mlflow.note.content"]
    assert f"path=sweep/summary.png&run_uuid={parent.info.run_id}" in parent.data.tags["mlflow.note.content"]
    for child in children:  # also of one that another command had finished
        link = f"[{child.info.run_name}](#/experiments/{parent.info.experiment_id}/runs/{child.info.run_id})"
        assert link in parent.data.tags["mlflow.note.content"]
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    files = {Path(item.path).name for item in client.list_artifacts(parent.info.run_id, "sweep")}
    assert files == {"sweep.yaml", "summary.md", "summary.csv", "children.csv", "summary.png"}
    best_words = rf"best by val/mass: predictor.loss=\w+ seed=\d \({parent_best(children):.4f}\)"
    assert re.search(best_words, result.stdout) and re.search(best_words, parent.data.tags["mlflow.note.content"])
    for text in ("[child 3/4] predictor.loss=bce seed=0", f" {mean:.3f}"[:5], "compare runs: make ui"):
        assert text in result.stdout
    assert result.stdout.count("[1/5]") == 1 and result.stdout.count("[5/5]") == 0  # one model, no answers
    # every child has files of its own, and the plain run's are as they were
    assert len(list((folder / "runs/sweeps/scene-llava").glob("*/predictor/model.safetensors"))) == 4
    assert {path: path.read_bytes() for path in kept["before"]} == kept["before"]
    best = max(children, key=lambda child: child.data.metrics["best_mass"])
    assert client.get_model_version_by_alias("tiny", registry.ALIAS).run_id == best.info.run_id
    assert parent.data.metrics == {name: best.data.metrics[name] for name in ("recall", "mass")}


@pytest.mark.parametrize(
    "other", ["model.scr.state_layer=1", "model.scr.attention_layers=[3,4]", "harvest.seed=1", "trainer.num_workers=1"]
)
def test_children_share_a_harvest_and_its_reader_only_where_these_are_the_same(other: str) -> None:
    from configs import load_config
    from pipeline.stages import shared_settings

    one = shared_settings(load_config(["model.scr.edit_layers=[1,2]"]))
    assert shared_settings(load_config(["model.scr.edit_layers=[1,2]", "seed=3"])) == one
    assert shared_settings(load_config(["model.scr.edit_layers=[1,2]", other])) != one


@pytest.mark.slow
def test_the_same_sweep_resumes_where_it_was_interrupted(
    swept: tuple[Path, subprocess.CompletedProcess[str], dict[str, Any]],
) -> None:
    folder, _, _ = swept
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    (parent,), children = runs_of(folder, "sweep"), runs_of(folder, "child")
    lost = children[1].info.run_id
    client.set_terminated(lost, "KILLED")
    client.delete_tag(children[2].info.run_id, "config.fingerprint")  # killed behind the fit
    client.set_terminated(children[2].info.run_id, "KILLED")
    client.update_run(parent.info.run_id, status="FAILED")
    again = run(*SWEEP, "tracking.register=tiny", "trainer.cache=none", cwd=folder)
    assert again.returncode == 0, again.stderr[-3000:]
    assert again.stdout.count("(finished before)") == 2
    assert "[child 2/4] predictor.loss=kl seed=1\n" in again.stdout
    ((same,), after) = runs_of(folder, "sweep"), runs_of(folder, "child")
    assert (same.info.run_id, same.info.status) == (parent.info.run_id, "FINISHED")
    assert [run.info.run_id for run in after] == [run.info.run_id for run in children]  # each in its own run
    assert {run.info.status for run in after} == {"FINISHED"}
    for one, other in zip(after, children, strict=True):
        assert one.data.metrics["mass"] == other.data.metrics["mass"]  # the same fit, bit for bit
        assert one.data.tags["config.fingerprint"] and one.data.params["trainer.cache"] == "auto"
    assert " ".join((again.stdout + again.stderr).split()).count("it is not fitted again") == 2


@pytest.mark.slow
def test_a_child_that_fails_does_not_take_the_others_with_it(
    swept: tuple[Path, subprocess.CompletedProcess[str], dict[str, Any]],
) -> None:
    folder, _, _ = swept
    result = run(*FITS, "predictor.width=32", "trainer.train_images=41,30", cwd=folder)  # 40 are harvested
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "error: 1 of 2 children have no result" in result.stderr and "trainer.train_images=41" in result.stderr
    assert "[child 2/2] trainer.train_images=30\n" in result.stdout
    assert re.search(r"^41 +-.*\n30 +0\.\d{3} ", result.stdout, re.MULTILINE)
    assert re.search(r"without a result: trainer.train_images=41 \(FAILED, run \w{32}\)", result.stdout)
    parent = runs_of(folder, "sweep")[-1]
    assert parent.info.status == "FAILED"
    failed, finished = runs_of(folder, "child")[-2:]
    assert failed.info.status == "FAILED" and "train_images" in failed.data.tags["error"]
    assert finished.info.status == "FINISHED" and finished.data.params["trainer.train_images"] == "30"


@pytest.mark.slow
def test_a_second_run_reuses_what_is_finished_and_other_settings_do_not(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = finished
    again = run(*SMALL, cwd=folder)
    assert again.returncode == 0
    said = again.stdout + again.stderr
    assert "reusing the finished world" in said
    assert "reusing the finished harvest" in said
    for program in ("data.harvest", "train.py"):
        other = run(*SMALL, "model.scr.attention_layers=[2,3]", cwd=folder, program=program)
        assert other.returncode != 0
        assert "attention_layers" in other.stdout + other.stderr and "overwrite=true" in other.stdout + other.stderr


@pytest.mark.slow
def test_a_fit_that_was_ended_resumes_in_its_own_run(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = finished
    changed = ("evaluation.images", "trainer.max_epochs")
    settings = [setting for setting in SMALL if not setting.startswith(changed)]
    settings += ["evaluation.images=0", "tracking.experiment=preempted", "trainer.max_epochs=400"]
    command = [sys.executable, str(ROOT / "train.py"), *settings, "trainer.patience=400"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    fits = folder / "runs/fits/scene-llava"
    before_it = set(fits.iterdir())
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as fit:
        while fit.poll() is None and not [p for p in set(fits.iterdir()) - before_it if list(p.rglob("last.ckpt"))]:
            time.sleep(0.05)
        fit.send_signal(signal.SIGTERM)
        assert fit.stderr is not None
        said = fit.stderr.read().decode()
    assert fit.returncode == 143, said[-3000:]
    assert "Run the same command again to resume." in said
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("preempted")
    assert experiment is not None
    (stopped,) = client.search_runs([experiment.experiment_id])
    assert stopped.info.status == "KILLED"
    before = len(client.get_metric_history(stopped.info.run_id, "val/mass"))
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL) as fit:
        time.sleep(1)
        while fit.poll() is None and len(client.get_metric_history(stopped.info.run_id, "val/mass")) < before + 2:
            time.sleep(0.2)
        fit.send_signal(signal.SIGTERM)
    (same,) = client.search_runs([experiment.experiment_id])  # no second run
    assert len(set(fits.iterdir()) - before_it) == 1  # and no second folder
    epochs = [metric.step for metric in client.get_metric_history(same.info.run_id, "val/mass")]
    assert len(epochs) >= before + 2 and epochs == sorted(set(epochs))  # none twice


@pytest.mark.slow
def test_sigterm_behind_the_fit_leaves_a_run_that_is_not_finished(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = finished
    command = [
        sys.executable,
        "-u",
        str(ROOT / "train.py"),
        *SMALL,
        "tracking.experiment=ended",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as chain:
        assert chain.stdout is not None
        for line in chain.stdout:
            if line.startswith("[5/5]"):
                chain.send_signal(signal.SIGTERM)
    assert chain.returncode == 143
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("ended")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "KILLED" and "config.fingerprint" not in run.data.tags


@pytest.mark.slow
def test_the_lines_of_the_guide_to_deployment_run(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    """The first of them is what `finished` has run, with smaller sizes."""
    folder, _ = finished
    guide = (ROOT / "docs" / "deploy.md").read_text()
    shell, code = (re.search(rf"```{kind}\n(.*?)```", guide, re.DOTALL) for kind in ("bash", "python"))
    assert shell is not None and code is not None
    first, *commands = (line.split("#")[0].split() for line in shell[1].splitlines())
    assert first == ["python", "train.py", "tracking.register=scr-scene-llava"] and len(commands) == 2
    printed = []
    for command in commands:
        assert command[:3] == ["python", "-m", "export"]
        done = run(*command[3:], cwd=folder, program="export")
        assert done.returncode == 0, done.stderr[-2000:]
        printed.append(done.stdout)
    assert "the golden inputs give the stored answers" in printed[0]
    assert "models:/scr-scene-llava@champion is version 1: the first champion" in printed[1]
    Image.new("RGB", (96, 96), "green").save(folder / "runs" / "picture.png")
    script = code[1].replace('"picture.png"', '"runs/picture.png"')
    served = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert served.returncode == 0, served.stderr[-2000:]
    assert "<SCRStats: 1 prefill, 1 image (" in served.stdout


@pytest.mark.slow
def test_exported_again_it_has_the_same_bytes(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = finished
    place = folder / "runs/predictors/scene-llava"
    before = {file.name: file.read_bytes() for file in place.iterdir()}
    exported = run(*SMALL, cwd=folder, program="export")
    assert exported.returncode == 0, exported.stderr[-2000:]
    assert {file.name: file.read_bytes() for file in place.iterdir()} == before


@pytest.mark.slow
def test_parts_alone(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = finished
    exported = run(*SMALL, "predictor.target_fallback=0.5", cwd=folder, program="export")
    assert exported.returncode == 0, exported.stderr[-2000:]
    assert "reloaded and equal" in exported.stdout
    compared = run(*SMALL, cwd=folder, program="evaluation")
    assert compared.returncode == 0, compared.stderr[-2000:]
    assert "two-pass" in compared.stdout


def test_the_readmes_file_tree_is_current() -> None:
    readme = (ROOT / "README.md").read_text()
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    top = {name.split("/")[0] for name in tracked}
    for name in top - {".ci", ".gitignore", ".pre-commit-config.yaml", "README.md", "pyproject.toml"}:
        assert name in readme, f"{name} is not in the README"
    for name in tracked:
        if name.startswith("scr_runtime/") and name.endswith(".py") and "__init__" not in name:
            assert Path(name).name in readme, f"{name} is not in the README's file tree"


def test_a_python_without_the_packages_is_told_the_way_in(tmp_path: Path) -> None:
    command = [sys.executable, "-S", str(ROOT / "train.py"), "--help"]  # -S: as outside of the environment
    done = subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and not done.stdout and "Traceback" not in done.stderr
    assert "is not installed in this Python" in done.stderr and "make train" in done.stderr


def test_a_wrong_setting_and_a_wrong_tracking_uri_fail_before_any_work(tmp_path: Path) -> None:
    wrong = run("harvest.sample=3", "modell=scene-llava", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "harvest.samples" in wrong.stderr and "model" in wrong.stderr
    assert list(tmp_path.iterdir()) == []
    unreachable = run(*SMALL, "tracking.uri=nonsense://nowhere", cwd=tmp_path)
    assert unreachable.returncode == 1
    assert "nonsense://nowhere cannot be used" in unreachable.stderr
    assert not (tmp_path / "runs/data").exists()


def test_a_sweep_with_a_wrong_value_or_without_its_server_fails_before_any_work(tmp_path: Path) -> None:
    wrong = run("predictor.loss=kl,bcee", "seed=0,1,1", cwd=tmp_path)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("2 problems") and "Did you mean predictor.loss=bce?" in wrong.stderr
    assert list(tmp_path.iterdir()) == []
    started = time.monotonic()
    unreachable = run(*SMALL, "seed=0,1", "tracking.uri=http://127.0.0.1:9", cwd=tmp_path)  # nobody listens there
    assert unreachable.returncode == 1 and time.monotonic() - started < 60  # MLflow's own patience is minutes
    assert "http://127.0.0.1:9 cannot be used" in unreachable.stderr and "See tracking.uri." in unreachable.stderr
    assert not (tmp_path / "runs/data").exists()


def test_what_can_be_known_is_checked_before_any_work(tmp_path: Path) -> None:
    wrong = run(*SMALL, "model.scr.edit_layers=[0,11]", "trainer.accelerator=gpu,mps", "seed=0", cwd=tmp_path)
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: ") and "problems before the start" in wrong.stderr
    assert "edit_layers ends at block 11, but the model has 8" in wrong.stderr
    assert "trainer.accelerator=mps: there is none on this machine" in wrong.stderr
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "images").mkdir()
    missing = run("data=coco2014", f"data.root={tmp_path}", cwd=tmp_path)
    assert missing.returncode == 1 and "[1/5]" not in missing.stdout
    assert " ".join(missing.stderr.split()).count("does not exist") == 4


@pytest.mark.slow
def test_an_interrupted_comparison_resumes_without_another_fit(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = finished
    settings = [setting for setting in SMALL if not setting.startswith("evaluation.images")]
    settings += ["evaluation.images=8", "evaluation.batch_size=4", "tracking.experiment=resumed"]
    command = [sys.executable, "-u", str(ROOT / "train.py"), *settings]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    logs = set((folder / "runs/cache").glob("answers-*"))
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL) as chain:  # fmt: skip
        while chain.poll() is None:
            fresh = set((folder / "runs/cache").glob("answers-*")) - logs
            if any(len(file.read_bytes().splitlines()) > 8 for place in fresh for file in place.glob("*.jsonl")):
                chain.kill()
            time.sleep(0.05)
    assert chain.returncode == -signal.SIGKILL
    uri = f"sqlite:///{folder}/runs/mlflow.db"
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("resumed")
    assert experiment is not None
    (dead,) = client.search_runs([experiment.experiment_id])
    assert dead.info.status == "RUNNING"
    before = (folder / "runs/predictors/scene-llava").resolve()
    again = run(*settings, cwd=folder)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "resumes the interrupted run in" in again.stdout
    assert "it is not fitted again" in " ".join((again.stdout + again.stderr).split())
    (same,) = client.search_runs([experiment.experiment_id])
    assert (same.info.run_id, same.info.status) == (dead.info.run_id, "FINISHED")
    after = (folder / "runs/predictors/scene-llava").resolve()
    assert after != before and before.is_dir()
    written = json.loads((after.parent / "reports/evaluation.json").read_text())
    assert written["metrics"]["eval/two-pass/adversarial/hr"] >= 0


@pytest.mark.slow
def test_a_folder_of_pictures_without_annotations_gives_a_predictor(tmp_path: Path) -> None:
    for number in range(24):
        place = tmp_path / "pictures" / ("below" if number % 3 else ".") / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(render_scene(0, "val", number).image).save(place)
    (tmp_path / "pictures/notes.txt").write_text("no picture")
    (tmp_path / "pictures/broken.png").write_text("no picture either")
    sizes = ["harvest.samples=15", "harvest.validation=5", "harvest.test=5", "trainer.max_epochs=2"]
    folder = ["data=pictures", f"data.root={tmp_path / 'pictures'}"]
    result = run(*folder, *sizes, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "1 image could not be read and was skipped" in result.stdout
    assert re.search("The predictor on [45] test images", result.stdout)
    assert re.search("Edits and cost on [45] held-out images", result.stdout)
    page = (tmp_path / "runs/reports/scene-llava/evaluation.html").read_text()
    assert "these pictures have no annotations, so there is no hallucination rate" in page
    assert "<td>one-pass</td>" in page and "Describe the image." in page and "data=pictures" in page
    assert "No answers were compared" in result.stdout  # the last line says what is known
    asked, questions = tmp_path / "asked", tmp_path / "questions.json"
    asked.mkdir()
    lines = []
    for number in range(24, 28):
        Image.fromarray(render_scene(0, "val", number).image).save(asked / f"{number}.png")
        for label in ("yes", "no"):
            text = f"Is there a {'cup' if label == 'yes' else 'kite'} in the image?"
            lines.append({"question_id": len(lines), "image": f"{number}.png", "text": text, "label": label})
    questions.write_text("\n".join(map(json.dumps, lines)))
    given = [f"evaluation.pope_files=[{questions}]", f"evaluation.images_dir={asked}"]
    answered = run(*folder, *sizes, *given, cwd=tmp_path)
    assert answered.returncode == 0, answered.stderr[-3000:]
    assert "Answers on 4 held-out images" in answered.stdout and "No answers were compared" not in answered.stdout
    predictor = load_predictor(tmp_path / "runs/predictors/scene-llava")
    assert 0 < predictor.info["metrics"]["test/recall"] <= 1
    refused = run(*folder, *sizes, "harvest.prompts=[present]", cwd=tmp_path)
    assert refused.returncode == 1 and "[1/5]" not in refused.stdout
    assert "present ask about annotated objects, and data=pictures has no annotations" in refused.stderr
    without = run(*folder, *sizes, "evaluation.images=4", cwd=tmp_path)
    assert without.returncode == 2 and "has no annotated images to make questions from" in without.stderr
