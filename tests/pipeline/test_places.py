"""Folders and files that a command names are looked for before anything else, and reported all at once."""

import subprocess
import sys
from pathlib import Path

import pytest

from configs import load_config
from pipeline import commands
from pipeline.errors import RunError
from pipeline.places import check_places


def problems(*overrides: str) -> str:
    with pytest.raises(RunError) as caught:
        check_places([load_config([*overrides, f"seed={seed}"]) for seed in (0, 1)], ["harvest", "evaluation"])
    return " ".join(str(caught.value).split())


def test_the_defaults_have_no_problem(tmp_path: Path) -> None:
    check_places([load_config([f"runs_dir={tmp_path / 'new' / 'runs'}"])], ["harvest", "evaluation"])
    assert list(tmp_path.iterdir()) == []  # looked at, not made


def test_all_problems_are_reported_together_and_each_once(tmp_path: Path) -> None:
    message = problems(f"runs_dir={tmp_path / 'runs'}", "data=coco2014", f"data.root={tmp_path}")
    assert message.startswith("4 problems before the start")
    assert message.count("data.train_annotations: ") == message.count("data.eval_images: ") == 1


@pytest.mark.parametrize("data", ["coco2014", "pictures"])
def test_a_root_that_does_not_exist_is_one_problem(tmp_path: Path, data: str) -> None:
    (tmp_path / "coco").mkdir()
    message = problems(f"runs_dir={tmp_path / 'runs'}", f"data={data}", f"data.root={tmp_path / 'cocoa'}")
    assert message.startswith(
        f"1 problem before the start data.root: {tmp_path / 'cocoa'} does not exist; beside it: "
    )
    assert message.endswith(f"coco; set it to the folder of data={data}")


def test_a_command_looks_at_what_it_uses(tmp_path: Path) -> None:
    config = load_config([f"runs_dir={tmp_path}", "data=coco2014", f"data.root={tmp_path}"])
    check_places([config], [])
    with pytest.raises(RunError, match="2 problems") as caught:
        check_places([config], ["evaluation"])
    assert "data.train_images" not in str(caught.value)


@pytest.mark.parametrize("place", ["/proc/nope", "/dev/null/runs"])
def test_a_place_that_takes_no_files(place: str) -> None:
    assert f"runs_dir={place}: /" in problems(f"runs_dir={place}")


def test_a_predictor_that_does_not_exist_is_named_with_those_beside_it(tmp_path: Path) -> None:
    for name in ("scene-llava", "scene-next"):
        (tmp_path / "predictors" / name).mkdir(parents=True)
    message = problems(f"evaluation.predictors=[{tmp_path}/predictors/scene-lava]")
    assert message.endswith("scene-lava does not exist; beside it: scene-llava, scene-next")
    assert problems("evaluation.predictors=[/nowhere/at/all]").endswith("/nowhere/at/all does not exist")


def test_what_tuning_needs_is_known_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.places.CONFIGS", tmp_path)
    with pytest.raises(RunError, match=r"harvest\.tuning=0 keeps too few images"):
        check_places([load_config([f"runs_dir={tmp_path}"])], ["tuning"])
    settings = [f"runs_dir={tmp_path}", "harvest.tuning=200"]
    check_places([load_config(settings)], ["tuning"])
    (tmp_path / "model").mkdir()
    (tmp_path / "model/scene-llava-tuned.yaml").touch()
    with pytest.raises(RunError, match=r"scene-llava-tuned\.yaml is\s+there"):
        check_places([load_config(settings)], ["tuning"])
    check_places([load_config([*settings, "overwrite=true"])], ["tuning"])


def test_a_command_that_takes_a_run_when_there_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (commands.export, commands.evaluation):
        assert command([f"runs_dir={tmp_path}"]) == 1
        said = " ".join(capsys.readouterr().err.split())
        assert said.endswith(f"no complete run at {tmp_path}/fits/scene-llava/latest: run train.py first")


def test_a_wrong_place_costs_no_import_of_torch_and_asks_no_hub(tmp_path: Path) -> None:
    code = """
import sys
from train import main
assert main(sys.argv[1:]) == 1
assert not {"torch", "transformers", "mlflow", "pytorch_lightning"} & set(sys.modules)
"""
    given = ["model=llava-1.5-7b", "data=coco2014", f"data.root={tmp_path}/nowhere", f"runs_dir={tmp_path}"]
    done = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("error: 1 problem before the start\n  data.root: ")
