"""What tells two predictors apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from export.difference import differences
from scr_runtime import PredictorConfig, SCRConfig, SourcePredictor, errors, save_predictor

MODEL = {"family": "llava", "hidden_size": 16, "num_blocks": 4, "embedding_probe": [0.5] * 32}


def saved(folder: Path, seed: int = 0, size: int = 16, **kwargs: Any) -> Path:
    torch.manual_seed(seed)
    predictor = SourcePredictor(PredictorConfig(size, rank=4, width=8))
    scr = SCRConfig(num_sources=4, edit_layers=(0, 1), attention_layers=(1, 2))
    settings: dict[str, Any] = {"model": {**MODEL, "hidden_size": size}} | kwargs
    return save_predictor(folder, predictor, scr=scr, **settings)


def test_equal_folders(tmp_path: Path) -> None:
    rows, sentences = differences(saved(tmp_path / "a"), saved(tmp_path / "b"))
    assert rows == [["key", "first", "second", "change"]]
    assert sentences[0] == "both are for the same model"
    assert sentences[1] == "golden inputs of the first: 100% of 4 sources in common, correlation of scores 1.000"


def test_settings_metrics_and_data(tmp_path: Path) -> None:
    first = saved(tmp_path / "a", metrics={"test/mass": 0.5, "test/iou": 0.3}, provenance={"data_fingerprint": "a"})
    probe = {**MODEL, "embedding_probe": [0.25] * 32}
    second = saved(tmp_path / "b", 1, model=probe, metrics={"test/mass": 0.75}, provenance={"data_fingerprint": "b"})
    rows, sentences = differences(first, second)
    found = {row[0]: row[1:] for row in rows[1:]}
    assert found["metrics.test/mass"] == ["0.5", "0.75", "+0.25"]
    assert found["metrics.test/iou"] == ["0.3", "-", ""]
    assert found["provenance.data_fingerprint"] == ["a", "b", ""]
    assert not {"checksum", "golden_sha256", "scr.num_sources"} & set(found) and "weights_sha256" in found
    assert "different models" in sentences[0]
    assert "100%" not in sentences[1] and len(sentences) == 3


def test_other_sizes_and_damage(tmp_path: Path) -> None:
    first, second = saved(tmp_path / "a"), saved(tmp_path / "b", size=24)
    assert "states of different sizes" in differences(first, second)[1][1]
    (second / "golden.safetensors").unlink()
    with pytest.raises(errors.PredictorCorruptError):
        differences(first, second)
