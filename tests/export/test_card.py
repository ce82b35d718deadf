"""The model card: metadata that the Hub reads, tables from config.json, lines that run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from export.card import model_card, write_card
from scenes import CHECKPOINT
from scr_runtime import PredictorConfig, SCRConfig, SourcePredictor, describe_model, load_predictor, save_predictor

ROOT = Path(__file__).resolve().parents[2]
METRICS = {
    "test/recall": 0.83, "test/recall_low": 0.81, "test/recall_high": 0.85, "test/mass": 0.97, "test/mass_low": 0.96,
    "test/mass_high": 0.98, "test/position/recall": 0.4, "test/position/mass": 0.7, "test/k_min": 6, "test/k_max": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For the embedded model, as it is loaded from its folder."""
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT).eval()
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    torch.manual_seed(0)
    predictor = SourcePredictor(PredictorConfig(model.config.text_config.hidden_size))
    scr = SCRConfig(num_sources=8, edit_layers=(0, 2), attention_layers=(2, 4))
    path = save_predictor(
        tmp_path_factory.mktemp("card") / "p", predictor, scr=scr, model=describe_model(model, processor),
        metrics=METRICS, provenance={"data_name": "scenes", "data_fingerprint": "f00", "used": {"epochs": 7}},
    )  # fmt: skip
    write_card(path, None)
    return path


def record_of(folder: Path, **model: Any) -> dict[str, Any]:
    record = json.loads((folder / "config.json").read_text())
    return record | {"model": record["model"] | model}


def test_a_local_model_has_a_name_and_no_path(folder: Path) -> None:
    name = load_predictor(folder).info["model"]["name"]
    assert re.fullmatch(rf"{CHECKPOINT.name}-[0-9a-f]{{8}}", name)
    text = (folder / "README.md").read_text()
    assert f"# One-pass SCR source predictor for {name}\n" in text
    assert str(CHECKPOINT.parent) not in text + (folder / "config.json").read_text()


def test_the_hub_can_read_the_metadata(folder: Path) -> None:
    data: Any = ModelCard(model_card(record_of(folder, name="llava-hf/llava-1.5-7b-hf", revision="a" * 40))).data
    assert (data.license, data.base_model, data.datasets) == ("apache-2.0", "llava-hf/llava-1.5-7b-hf", ["scenes"])
    assert data.library_name == "scr-runtime" and "hallucination" in (data.tags or []) and "llava" in (data.tags or [])
    results = {result.metric_name: result.metric_value for result in data.eval_results or []}
    assert results == {"test/recall": 0.83, "test/mass": 0.97}
    local: Any = ModelCard((folder / "README.md").read_text()).data
    assert local.base_model is None  # it is not on the Hub


def test_the_tables_say_what_was_measured_and_used(folder: Path) -> None:
    text = (folder / "README.md").read_text()
    assert "| scores from | recall | mass |" in text
    assert "| this predictor | 0.830 [0.810, 0.850] | 0.970 [0.960, 0.980] |" in text
    assert "| position | 0.400 | 0.700 |" in text
    assert "- sources: 8 sources asked for, 6 to 8 used" in text and "- epochs: 7" in text
    assert "- data fingerprint: f00" in text
    assert "Not evaluated" in text
    judged = model_card(record_of(folder), {"sentence": "No effect shown: don't deploy.", "reason": "Too few."})
    assert "**No effect shown: don't deploy.** Too few." in judged and "Not evaluated" not in judged


def test_a_new_card_changes_nothing_else(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write_card(folder, {"sentence": "s", "reason": "r"})
    assert {name for name, content in before.items() if (folder / name).read_bytes() != content} == {"README.md"}
    write_card(folder, None)
    assert (folder / "README.md").read_bytes() == before["README.md"]


def test_its_lines_run(folder: Path, tmp_path: Path) -> None:
    """As they are printed, where the places that they name exist."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 14
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / CHECKPOINT.name).symlink_to(CHECKPOINT)
    (tmp_path / "this").mkdir()
    (tmp_path / "this" / "folder").symlink_to(folder)
    Image.new("RGB", (96, 96), "green").save(tmp_path / "picture.png")
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    run = subprocess.run(
        [sys.executable, "-c", start + code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "<ImageReport, row 0 image 0 grid 0: one-pass, 8 sources of" in run.stdout
