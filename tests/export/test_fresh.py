"""The new process that reads an exported folder: it has the runtime's dependencies and nothing else."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from export import fresh_child
from export.errors import ExportError
from export.fresh import check_fresh
from scr_runtime import PredictorConfig, SCRConfig, SourcePredictor, load_predictor, save_predictor
from scr_runtime.golden import golden_inputs, golden_outputs

ROOT = Path(__file__).resolve().parents[2]
SCR = SCRConfig(num_sources=4, edit_layers=(0, 1), attention_layers=(1, 2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    predictor = SourcePredictor(PredictorConfig(16, rank=4, width=8, context="both"))
    predictor.set_drift(1.0, 2.0)
    return save_predictor(tmp_path_factory.mktemp("p") / "p", predictor, scr=SCR, model={"family": "llava"})


@pytest.fixture
def answers(folder: Path) -> dict[str, torch.Tensor]:
    predictor = load_predictor(folder)
    return golden_outputs(predictor, golden_inputs(predictor), SCR)


def test_its_dependencies_are_the_wheel_s() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert tuple(one.split(">")[0] for one in project["dependencies"]) == fresh_child.DEPENDENCIES
    names = fresh_child.importable()
    assert {"torch", "transformers", "safetensors", "numpy", "huggingface_hub"} <= names
    assert not {"mlflow", "omegaconf", "pytorch_lightning", "datasets", "onnx", "scr_runtime"} & names


def test_equal_answers_pass_and_others_are_told(folder: Path, answers: dict[str, Any]) -> None:
    check_fresh(folder, answers)
    answers["confidence"] = answers["confidence"] + 0.25
    with pytest.raises(ExportError, match=r"confidence of the golden inputs differ by up to 0\.25"):
        check_fresh(folder, answers)


def test_a_runtime_that_needs_more_than_its_dependencies_is_refused(
    folder: Path, answers: dict[str, Any], tmp_path: Path
) -> None:
    shutil.copytree(ROOT / "scr_runtime", tmp_path / "scr_runtime", ignore=shutil.ignore_patterns("__pycache__"))
    file = tmp_path / "scr_runtime" / "artifact.py"
    file.write_text(file.read_text().replace("import hashlib\n", "import hashlib\nimport omegaconf\n"))
    with pytest.raises(ExportError, match=r"can't use it: (.|\n)*No module named 'omegaconf'"):
        check_fresh(folder, answers, tmp_path)
