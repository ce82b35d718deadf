"""The GPU benchmark runs where there is no GPU, and needs nothing but its three dependencies."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import prefill_gpu


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


def test_it_needs_torch_transformers_and_the_runtime_alone() -> None:
    allowed = {"torch", "transformers", "scr_runtime"} | sys.stdlib_module_names
    tree = ast.parse(Path(prefill_gpu.__file__ or "").read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name.partition(".")[0] for name in names} - allowed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert prefill_gpu.main([]) == 1
    assert "--device cpu --tiny" in capsys.readouterr().err


def test_every_shape_has_settings() -> None:
    assert set(prefill_gpu.SETTINGS) == {*prefill_gpu.MODELS, "tiny"}


def test_the_real_shapes_can_be_built() -> None:
    sizes = {}
    for name, shape in prefill_gpu.LLAVA.items():
        model, _ = prefill_gpu.build_llava(shape, 24, "meta", torch.bfloat16)
        sizes[name] = round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 1)
    try:
        model, inputs = prefill_gpu.build_qwen("meta", torch.bfloat16)
        sizes["qwen2-vl-7b"] = round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 1)
        assert inputs["input_ids"].shape == (1, 640)
    except prefill_gpu.Skipped as error:
        pytest.skip(str(error))
    assert sizes == {"llava-1.5-7b": 7.1, "llava-1.5-13b": 13.4, "qwen2-vl-7b": 8.3}
