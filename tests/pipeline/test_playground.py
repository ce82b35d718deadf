"""The playground's start: what can be known is checked before the model is loaded and a world is rendered."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs import load_config
from pipeline import playground
from pipeline.errors import RunError
from scr_runtime import PredictorConfig, SCRConfig, SourcePredictor, save_predictor


@pytest.fixture(autouse=True)
def _nothing_is_loaded_or_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("load_vlm", "held_out_images"):
        monkeypatch.setattr(playground, name, lambda *_, name=name: pytest.fail(f"{name} was called"))


def test_a_predictor_of_another_model_is_refused_first(tmp_path: Path) -> None:
    about = {"family": "llava", "hidden_size": 64, "num_blocks": 8, "embedding_probe": [0.0] * 32}
    scr = SCRConfig(num_sources=8, edit_layers=(0, 2), attention_layers=(2, 4))
    folder = save_predictor(tmp_path / "p", SourcePredictor(PredictorConfig(64, rank=4)).eval(), scr=scr, model=about)
    config = load_config([f"runs_dir={tmp_path / 'runs'}", f"evaluation.predictors=[{folder}]"])
    with pytest.raises(RunError) as caught:
        playground.open_place(config)
    assert "is for a model of hidden_size 64, not 128" in " ".join(str(caught.value).split())


def test_a_folder_that_holds_no_predictor_is_named_first(tmp_path: Path) -> None:
    config = load_config([f"runs_dir={tmp_path / 'runs'}", f"evaluation.predictors=[{tmp_path}]"])
    with pytest.raises(RunError, match=r"config\.json"):
        playground.open_place(config)
    assert list(tmp_path.iterdir()) == []
