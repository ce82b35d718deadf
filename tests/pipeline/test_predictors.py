"""The commands behind `python -m export`: their arguments, and what they print."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import commands, predictors
from pipeline.commands import export as main
from scr_runtime import PredictorConfig, SCRConfig, SourcePredictor, save_predictor

ROOT = Path(__file__).resolve().parents[2]
MODEL = {"family": "llava", "hidden_size": 16, "num_blocks": 4, "embedding_probe": [0.5] * 32}


def saved(folder: Path, seed: int = 0, **kwargs: Any) -> Path:
    torch.manual_seed(seed)
    predictor = SourcePredictor(PredictorConfig(16, rank=4, width=8))
    scr = SCRConfig(num_sources=4, edit_layers=(0, 1), attention_layers=(1, 2))
    return save_predictor(folder, predictor, scr=scr, model=MODEL, **kwargs)


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = main([str(one) for one in arguments])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def test_they_are_found() -> None:
    assert tuple(predictors.COMMANDS) == commands._OF_A_FOLDER


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["verify"], "0 folders are given, expected 1. Usage: python -m export verify FOLDER"),
        (["diff", "a"], "1 folders are given, expected 2"),
        (["card", "a"], "evaluation= is missing"),
        (["push", "a", "repo=", "privat=true"], "repo= is missing; unknown privat="),
        (["push", "a", "repo=a/b", "repo=c/d"], "an option is given twice"),
        (["push", "a", "repo=a/b", "private=yes"], "private=yes: expected true or false"),
        (["pull", "repo=a/b"], "folder= is missing"),
        (["promote", "name=m"], "version= is missing"),
        (["engines", "a", "formats=onnx,tflite"], "formats=tflite: expected onnx or pt2"),
        (["verify", "nowhere"], "predictor folder 'nowhere' does not exist"),
    ],
)
def test_mistakes_are_told(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    code, printed = told(capsys, *arguments)
    assert code == 1 and words in printed and "Traceback" not in printed


@pytest.mark.parametrize("name", predictors.COMMANDS)
def test_each_command_has_help(capsys: pytest.CaptureFixture[str], name: str) -> None:
    code, printed = told(capsys, name, "--help")
    assert code == 0 and printed.startswith(f"usage: python -m export {name} ") and printed.count("\n") == 2


def test_a_misspelt_command_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    code, printed = told(capsys, "verfy", "FOLDER")
    assert code == 2 and "no command verfy. Did you mean verify? Commands: verify, diff" in printed


def test_verify(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = saved(tmp_path / "p")
    code, printed = told(capsys, "verify", folder)
    assert code == 0 and "<SourcePredictor: 772 parameters" in printed and "give the stored answers" in printed
    (folder / "golden.safetensors").unlink()
    code, printed = told(capsys, "verify", folder)
    assert code == 1 and "golden.safetensors: cannot be read" in printed


def test_diff(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    first = saved(tmp_path / "a", metrics={"test/mass": 0.5})
    code, printed = told(capsys, "diff", first, saved(tmp_path / "b", 1, metrics={"test/mass": 0.75}))
    assert code == 0 and "metrics.test/mass" in printed and "+0.25" in printed and "sources in common" in printed
    assert "config.json says the same in both" in told(capsys, "diff", first, first)[1]


def test_card(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder, file = saved(tmp_path / "p"), tmp_path / "evaluation.json"
    file.write_text(json.dumps({"verdict": {"kind": "none", "sentence": "No effect shown.", "reason": "Too few."}}))
    code, _ = told(capsys, "card", folder, f"evaluation={file}")
    assert code == 0 and "**No effect shown.** Too few." in (folder / "README.md").read_text()
    file.write_text("[]")
    code, printed = told(capsys, "card", folder, f"evaluation={file}")
    assert code == 1 and "not what python -m evaluation writes" in " ".join(printed.split())


@pytest.mark.parametrize(
    ("arguments", "spared"),
    [
        (["card", "FOLDER", "evaluation=FILE"], {"pytorch_lightning", "mlflow", "transformers", "onnx"}),
        (["diff", "FOLDER", "FOLDER"], {"pytorch_lightning", "mlflow", "transformers", "huggingface_hub", "onnx"}),
        (["promote", "name=nobody", "version=1", "runs_dir=RUNS"], {"pytorch_lightning", "transformers", "onnx"}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_command_imports_what_it_needs(tmp_path: Path, arguments: list[str], spared: set[str]) -> None:
    file = tmp_path / "evaluation.json"
    file.write_text(json.dumps({"verdict": {"sentence": "No effect shown.", "reason": "Too few."}}))
    places = {"FOLDER": saved(tmp_path / "p"), "FILE": file, "RUNS": tmp_path}
    for name, place in places.items():
        arguments = [one.replace(name, str(place)) for one in arguments]
    code = "import sys; from pipeline.commands import export; export(sys.argv[1:]); print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert not spared & set(run.stdout.splitlines()[-1].split()), run.stdout[:300]


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning")
def test_promote_without_a_registered_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, printed = told(capsys, "promote", "name=nobody", "version=1", f"runs_dir={tmp_path}")
    assert code == 1 and "version 1 of nobody:" in printed and "Traceback" not in printed
    code, printed = told(capsys, "rollback", "name=nobody", f"runs_dir={tmp_path}")
    assert code == 1 and "nobody:" in printed
