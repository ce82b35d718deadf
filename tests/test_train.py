"""The whole chain on a few images, through the command that a user types."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from scr_runtime import load_predictor

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
    return subprocess.run(
        [*command, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A folder in which `python train.py` has run, and what it printed."""
    folder = tmp_path_factory.mktemp("chain")
    result = run(*SMALL, cwd=folder)
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
    assert re.search(r"done in [\d.]+ minutes\n$", result.stdout)
    assert not re.search(r"warn|Traceback", result.stderr, re.IGNORECASE)
    reports = {path.name for path in (folder / "runs/reports/scene-llava").iterdir()}
    assert reports == {
        "config.yaml", "evaluation.md", "evaluation.json", "evaluation.png", "maps.png", "reliability.png",
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
    written = json.loads((folder / "runs/reports/scene-llava/evaluation.json").read_text())
    assert latest["eval/two-pass/adversarial/hr"] == written["eval/two-pass/adversarial/hr"]
    assert {"test/mass", "test/mass_low", "test/position/mass", "train/loss", "predictor/parameters"} <= set(latest)
    assert (steps, datasets, status) == (2, [("scene-llava-scenes",)], [("FINISHED",)])
    names = {path.name for path in (folder / "runs/mlflow").rglob("*") if path.is_file()}
    assert {"maps.png", "reliability.png", "evaluation.png", "config.yaml", "model.safetensors"} <= names


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
    other = run(*SMALL, "model.scr.attention_layers=[2,3]", cwd=folder, program="data.harvest")
    assert other.returncode != 0
    assert "attention_layers" in other.stdout + other.stderr


@pytest.mark.slow
def test_parts_alone(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = finished
    exported = run(*SMALL, "predictor.target_fallback=0.5", cwd=folder, program="export")
    assert exported.returncode == 0, exported.stderr[-2000:]
    assert "reloaded and equal" in exported.stdout
    compared = run(*SMALL, cwd=folder, program="evaluation")
    assert compared.returncode == 0, compared.stderr[-2000:]
    assert "two-pass" in compared.stdout


@pytest.mark.slow
def test_the_readmes_python_runs(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    """Each Python block of the README, with the scene model as `model` and `inputs`."""
    folder, _ = finished
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    prelude = (
        "from data.vlm import load_vlm, chat_inputs\nfrom PIL import Image\nfrom scenes import CHECKPOINT\n"
        "model, processor = load_vlm(str(CHECKPOINT), device='cpu')\n"
        "inputs = chat_inputs(processor, [Image.new('RGB', (96, 96))], ['Is there a dog in the image?'])\n"
    )
    for block in blocks:
        block = block.replace("(0, 11)", "(0, 2)").replace("(8, 16)", "(2, 4)")  # the scene model has 8 blocks
        script = folder / "readme.py"
        script.write_text(prelude + block)
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        result = subprocess.run(
            [sys.executable, str(script)], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        script.unlink()
        assert result.returncode == 0, result.stderr[-2000:]


def test_the_readmes_file_tree_is_current() -> None:
    readme = (ROOT / "README.md").read_text()
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    top = {name.split("/")[0] for name in tracked}
    for name in top - {".ci", ".gitignore", ".pre-commit-config.yaml", "README.md", "pyproject.toml"}:
        assert name in readme, f"{name} is not in the README"
    for name in tracked:
        if name.startswith("scr_runtime/") and name.endswith(".py") and "__init__" not in name:
            assert Path(name).name in readme, f"{name} is not in the README's file tree"


def test_a_wrong_setting_and_a_wrong_tracking_uri_fail_before_any_work(tmp_path: Path) -> None:
    wrong = run("harvest.sample=3", "modell=scene-llava", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "harvest.samples" in wrong.stderr and "model" in wrong.stderr
    assert list(tmp_path.iterdir()) == []
    unreachable = run(*SMALL, "tracking.uri=nonsense://nowhere", cwd=tmp_path)
    assert unreachable.returncode == 1
    assert "nonsense://nowhere cannot be used" in unreachable.stderr
    assert not (tmp_path / "runs/data").exists()
