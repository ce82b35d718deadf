"""Random small models of the families, and grids that differ from image to image, against the transformers runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scenes import NEXT_CHECKPOINT
from tests.vllm.engines import TILED, Reference, ask, engine, write_checkpoint, write_llava, write_qwen
from tests.vllm.test_exact import assert_same, stats

WRITE: dict[str, Callable[[Path], Path]] = {
    "llava": write_llava,
    "llava-next": lambda folder: write_checkpoint(folder, NEXT_CHECKPOINT),
    "qwen2-vl": lambda folder: write_qwen("qwen2-vl", folder),
    "qwen2.5-vl": lambda folder: write_qwen("qwen2.5-vl", folder),
}
CHUNKED = {"enable_prefix_caching": True, "enable_chunked_prefill": True, "max_num_batched_tokens": 700}
WHOLE = {"enable_prefix_caching": False, "enable_chunked_prefill": False}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind == "qwen2-vl")) for kind in WRITE]
)
def test_a_family_is_edited_as_by_the_runtime(
    kind: str, engines: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines.close()
    reference = Reference(WRITE[kind](tmp_path / "model"))
    question, settings = ("bilinear", WHOLE) if kind == "qwen2-vl" else ("none", CHUNKED)
    folder = reference.predictor(tmp_path / "predictor", question=question)
    expected = [reference.answer(prompt, folder) for prompt in TILED]
    off = [reference.answer(prompt, None) for prompt in TILED]
    monkeypatch.setenv("SCR_PREDICTOR", str(folder))
    llm = engine(tmp_path / "model", max_model_len=1024, **{"max_num_batched_tokens": 4096, **settings})
    try:
        assert_same(ask(llm, reference, TILED), expected)
        assert_same(ask(llm, reference, TILED, one_by_one=True, salt="other"), expected)
        assert_same(ask(llm, reference, TILED, extra={"scr": "off"}), off)
        assert stats(llm)["left_out"] == {}
        assert stats(llm)["images"] == 2 * (10 if kind == "llava-next" else 5)  # a thumbnail, and the tiles
    finally:
        llm.llm_engine.engine_core.shutdown()
    moved = [a.distance(b) > 0.01 for a, b in zip(expected, off, strict=True)]
    assert moved == [bool(prompt.scenes) for prompt in TILED]
