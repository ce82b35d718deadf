"""The GPU benchmark runs where there is no GPU, and where the packages of the training are not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import prefill_gpu

NOT_NEEDED = (
    *("datasets", "fsspec", "lightning", "matplotlib", "mlflow", "omegaconf", "pydantic", "pytorch_lightning"),
    *("sklearn", "torchmetrics", "webdataset"),
)


def test_the_smoke_test_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "costs.json"
    assert prefill_gpu.main(["--device", "cpu", "--tiny", "--repeats", "2", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())
    modes = [row["mode"] for row in rows]
    assert modes[:4] == ["vanilla", "vanilla again", "two-pass", "one-pass"]
    assert {"auto, 0 % fall back", "auto, 30 %", "auto, 100 %"} < set(modes)
    assert all(row["prefill_ms"] > 0 and row["decode_ms"] > 0 for row in rows)
    table = capsys.readouterr().out
    assert all(mode in table for mode in modes)


@pytest.mark.parametrize(
    ("command", "needed"),
    [
        ("benchmarks.prefill_gpu --device cpu --tiny --repeats 1", set()),
        ("benchmarks.train --device cpu --samples 2 --batch 2 --rounds 1", {"pydantic"}),
    ],
)
def test_it_runs_without_the_packages_of_the_training(command: str, needed: set[str]) -> None:
    module, *arguments = command.split()
    blocked = [name for name in NOT_NEEDED if name not in needed]
    run = f"import runpy, sys; sys.modules.update(dict.fromkeys({blocked!r})); sys.argv[1:] = {arguments!r}; "
    run += f"runpy.run_module({module!r}, run_name='__main__')"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", run], check=True, cwd=Path(__file__).parents[2], env=environment)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert prefill_gpu.main([]) == 1
    assert "--device cpu --tiny" in capsys.readouterr().err


def test_every_shape_has_settings() -> None:
    assert set(prefill_gpu.SETTINGS) == {*prefill_gpu.MODELS, "tiny"}
    assert set(prefill_gpu.LLAVA) == set(prefill_gpu.SETTINGS) - {"qwen2-vl-7b"}
