"""What is known before any work is reported before any work, all at once."""

from pathlib import Path

import pytest
import torch

from configs import load_config
from pipeline import checks
from pipeline.checks import check_all
from pipeline.errors import RunError
from scr_runtime import PredictorConfig, SCRConfig, SourcePredictor, save_predictor


def problems(*overrides: str) -> str:
    with pytest.raises(RunError) as caught:
        check_all([load_config(overrides)])
    return str(caught.value)


def test_the_defaults_have_no_problem(tmp_path: Path) -> None:
    check_all([load_config([f"runs_dir={tmp_path / 'new' / 'runs'}"])])
    assert list(tmp_path.iterdir()) == []  # looked at, not made


def test_all_problems_are_reported_together_and_each_once(tmp_path: Path) -> None:
    overrides = [
        f"runs_dir={tmp_path / 'runs'}", "data=coco2014", f"data.root={tmp_path / 'nowhere'}",
        "model.scr.edit_layers=[0,11]", "predictor.rank=100000",
    ]  # fmt: skip
    configs = [load_config([*overrides, f"seed={seed}"]) for seed in (0, 1)]
    with pytest.raises(RunError) as caught:
        check_all(configs)
    message = str(caught.value)
    assert message.startswith("5 problems before the start")
    assert message.count("data.train_annotations: ") == message.count("data.eval_images: ") == 1
    assert "ends at block 11, but the model has 8 decoder blocks" in message


def test_the_hub_is_not_asked_where_a_path_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "model_config", lambda settings: pytest.fail("the Hub was asked"))
    message = problems(
        f"runs_dir={tmp_path}", "model=llava-1.5-7b", "data=coco2014", f"data.root={tmp_path / 'nowhere'}"
    )
    assert "data.train_images: " in message


def test_a_predictor_that_does_not_exist_is_named_with_those_beside_it(tmp_path: Path) -> None:
    for name in ("scene-llava", "scene-next"):
        (tmp_path / "predictors" / name).mkdir(parents=True)
    message = problems(f"evaluation.predictors=[{tmp_path}/predictors/scene-lava]")
    assert message.endswith("scene-lava does not exist; beside it are scene-llava, scene-next")
    assert problems("evaluation.predictors=[/nowhere/at/all]").endswith("/nowhere/at/all does not exist")


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


@pytest.mark.parametrize("place", ["/proc/nope", "/dev/null/runs"])
def test_a_place_that_takes_no_files(place: str) -> None:
    assert f"runs_dir={place}: /" in problems(f"runs_dir={place}")


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    message = problems(f"runs_dir={tmp_path}", f"model.hub_id={tmp_path / 'empty'}")
    assert str(tmp_path / "empty") in message and "1 problem before the start" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_devices_that_are_not_there(tmp_path: Path) -> None:
    message = problems(f"runs_dir={tmp_path}", "trainer.accelerator=gpu", "model.device=cuda:0")
    assert "trainer.accelerator=gpu: there is none" in message and "model.device=cuda:0: torch sees no" in message
    assert "use auto or cpu" in message
