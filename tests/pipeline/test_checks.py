"""What is known before any work is reported before any work, all at once."""

from pathlib import Path

import pytest
import torch

from configs import load_config
from pipeline.checks import check_all
from pipeline.errors import RunError
from scr_runtime import PredictorConfig, SCRConfig, SourcePredictor, save_predictor


def problems(*overrides: str) -> str:
    with pytest.raises(RunError) as caught:
        check_all([load_config(overrides)])
    return " ".join(str(caught.value).split())


def test_the_defaults_have_no_problem(tmp_path: Path) -> None:
    check_all([load_config([f"runs_dir={tmp_path / 'new' / 'runs'}"])])
    assert list(tmp_path.iterdir()) == []  # looked at, not made


def test_all_problems_are_reported_together_and_each_once(tmp_path: Path) -> None:
    overrides = [f"runs_dir={tmp_path}", "predictor.rank=100000", f"evaluation.predictors=[{tmp_path}]"]
    configs = [load_config([*overrides, f"seed={seed}"]) for seed in (0, 1)]
    with pytest.raises(RunError) as caught:
        check_all(configs)
    message = " ".join(str(caught.value).split())
    assert message.startswith("2 problems before the start") and message.count("predictor.rank=100000") == 1
    assert f"{tmp_path} has no config.json; name folders of train.py" in message
    (tmp_path / "predictor").mkdir()
    assert f"did you mean {tmp_path}/predictor?" in problems(f"evaluation.predictors=[{tmp_path}]")
    assert "ends at block 11, but the model has 8 decoder blocks" in problems("model.scr.edit_layers=[0,11]")


def test_predictors_to_compare_that_are_for_another_model(tmp_path: Path) -> None:
    predictor = SourcePredictor(PredictorConfig(64, rank=4)).eval()
    about = {"family": "llava", "hidden_size": 64, "num_blocks": 8, "embedding_probe": [0.0] * 32}
    folder = save_predictor(tmp_path / "other", predictor, scr=SCRConfig.for_depth(8), model=about)
    message = problems(f"runs_dir={tmp_path}", f"evaluation.predictors=[{folder}]")
    assert f"{folder} is for a model of hidden_size 64, not 128: leave it out" in message


def test_more_sources_than_an_image_has_room_for_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configs = [load_config([f"runs_dir={tmp_path}", "model.scr.num_sources=500", f"seed={seed}"]) for seed in (0, 1)]
    check_all(configs)
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("500 sources are asked for, and 50 are used for an image of 12 x 12 = 144 patches") == 1
    check_all([load_config([f"runs_dir={tmp_path}"])])
    assert not capsys.readouterr().out


def test_online_without_a_block_behind_the_map(tmp_path: Path) -> None:
    layers = f"runs_dir={tmp_path}", "model.scr.attention_layers=[5,7]"
    check_all([load_config(layers)])
    assert "none is left behind them" in problems(*layers, "evaluation.methods=[vanilla,online]")


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    message = problems(f"runs_dir={tmp_path}", f"model.hub_id={tmp_path / 'empty'}")
    assert str(tmp_path / "empty") in message and "1 problem before the start" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_devices_that_are_not_there(tmp_path: Path) -> None:
    message = problems(f"runs_dir={tmp_path}", "trainer.accelerator=gpu", "model.device=cuda:0")
    assert "trainer.accelerator=gpu: there is none" in message and "model.device=cuda:0: torch sees no" in message
    assert "use auto or cpu" in message
