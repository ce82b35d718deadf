"""From `python train.py` to an engine: predictors fitted in the environment of training, served in that of vLLM."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.engines import MIXED, Reference, ask
from tests.vllm.test_exact import ASKING, FREE, assert_same, stats

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv/bin/python"
PIL = {"backend": "pil"}
"""Images resized as in the fit, whose environment has no torchvision."""


@pytest.fixture(scope="module")
def fit(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Fits a predictor that reads the question in some way; the world and the harvest are made once."""
    runs = tmp_path_factory.mktemp("runs")

    def run(question: str) -> Path:
        settings = ("trainer=quick", "evaluation.images=0", f"predictor.question={question}", f"runs_dir={runs}")
        done = subprocess.run([PYTHON, "train.py", *settings], cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        return (runs / "predictors/scene-llava").resolve()

    return run


@pytest.mark.parametrize(
    ("question", "settings"), [("none", FREE), pytest.param("bilinear", ASKING, marks=pytest.mark.slow)]
)
def test_a_trained_predictor_edits_as_in_the_runtime(
    question: str, settings: dict[str, Any], fit: Callable[[str], Path], checkpoint: Path, engines: Any
) -> None:
    folder, reference = fit(question), Reference(checkpoint, **PIL)
    expected = [reference.answer(prompt, folder, config=None) for prompt in MIXED]
    llm = engines(folder, **settings, mm_processor_kwargs=PIL)
    assert_same(ask(llm, reference, MIXED), expected)
    assert_same(ask(llm, reference, MIXED, one_by_one=True, salt="again"), expected)
    after = stats(llm)
    assert after["left_out"] == {} and after["images"] == 2 * 10
    off = ask(llm, reference, MIXED, extra={"scr": "off"})
    moved = [a.distance(b) > 1e-3 for a, b in zip(expected, off, strict=True)]
    assert moved == [bool(prompt.scenes) for prompt in MIXED]
