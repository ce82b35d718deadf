"""`python -m evaluation` as a user types it: short forms, bad inputs, a whole run, ranks, compare and tune."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
from mlflow import MlflowClient

from configs import load_config
from data.settings import VLMSettings
from data.vlm import load_vlm
from evaluation.errors import EvaluationError
from evaluation.settings import EvaluationSettings
from pipeline import runs, tracking
from pipeline.commands import evaluation, long_forms
from pipeline.compare_runs import compare_runs, read_run
from pipeline.errors import RunError
from pipeline.evaluate import evaluation_images, predictor_folders, run, run_of_the_predictor
from pipeline.folders import RunFolder, named_folders
from pipeline.tune import tune
from scenes import CHECKPOINT
from scr_runtime import PredictorConfig, SourcePredictor, describe_model, save_predictor
from scr_runtime.errors import PredictorError

# MLflow's own: its use of SQLAlchemy, and connections that its pool leaves to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning"),
]
ROOT = Path(__file__).parents[2]
SMALL = [
    "data.world.train=20", "data.world.val=6", "harvest.samples=10", "harvest.validation=4", "harvest.test=4",
    "evaluation.images=4", "evaluation.questions_per_image=2", "evaluation.bootstrap=20",
    "evaluation.latency_repeats=1", "evaluation.decoding=margin", "evaluation.prompts=[plain]",
]  # fmt: skip


def test_short_forms_are_written_out() -> None:
    assert long_forms(["benchmarks=pope,chair", "methods=all", "model=scene-llava"]) == [
        "evaluation.benchmarks=[pope, chair]", "evaluation.methods=[all]", "model=scene-llava",
    ]  # fmt: skip
    assert long_forms(["predictor=paper"]) == ["predictor=paper"]  # an option of the group
    assert long_forms(["predictor=/a,runs/b"]) == ["evaluation.predictors=[/a, runs/b]"]
    assert long_forms(["evaluation.pope_files=a.json,b.json", "evaluation.chair_tokens=[8,16]"]) == [
        "evaluation.pope_files=[a.json, b.json]", "evaluation.chair_tokens=[8,16]",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("argument", "problem"),
    [
        ("benchmarks=pope,chir", "has 'chir', which there is not"),
        ("methods=two-pass,onepass", "Did you mean one-pass?"),
        ("methods=two-pass", "lacks vanilla"),
        ("evaluation.prompts=plain,[x]", "evaluation.prompts"),
        ("evaluation.prompts='Is it?'", "texts with {question} in them"),
        ("evaluation.thresholds=1.5", "a confidence lies between 0 and 1"),
        ("evaluation.chair_tokens=0", "a caption has 1 token at least"),
    ],
)
def test_wrong_settings_are_reported(argument: str, problem: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        evaluation([argument])
    assert stop.value.code == 2 and problem in capsys.readouterr().err


def test_command_and_training_have_their_own_defaults() -> None:
    settings = EvaluationSettings()
    assert (settings.for_command.prompts, settings.for_command.decoding) == (["plain", "one-word"], "greedy")
    assert (settings.for_training.prompts, settings.for_training.decoding) == (["plain"], "margin")
    chosen = EvaluationSettings(prompts=["Q: {question}"], decoding="sampled").for_training
    assert (chosen.prompts, chosen.decoding, chosen.templates) == (
        ["Q: {question}"], "sampled", {"template": "Q: {question}"},
    )  # fmt: skip


def test_training_images_are_refused(tmp_path: Path) -> None:
    config = load_config([*SMALL, f"runs_dir={tmp_path}"])
    for changes in (
        {"images_dir": str(config.paths.train_images)},
        {"annotations": str(config.paths.train_annotations)},
    ):
        with pytest.raises(EvaluationError, match="holds the training images of data=scenes"):
            evaluation_images(config, config.evaluation.model_copy(update=changes))


def test_question_files_with_a_folder_need_no_annotations(tmp_path: Path) -> None:
    config = load_config([*SMALL, f"runs_dir={tmp_path}"])
    settings = config.evaluation.model_copy(update={"pope_files": ["a.json"], "images_dir": str(tmp_path)})
    assert evaluation_images(config, settings) is None
    assert list(tmp_path.iterdir()) == []  # no world is rendered


def test_predictor_folders_are_named(tmp_path: Path) -> None:
    config = load_config(SMALL)
    for name in ("one", "two/predictor"):
        (tmp_path / name).mkdir(parents=True)
    places = [str(tmp_path / "one"), str(tmp_path / "two/predictor")]
    found = predictor_folders(config, EvaluationSettings(predictors=places))
    assert list(found) == ["", "two"]
    assert list(named_folders([places[1], places[1]], [""])) == ["two", "two+"]  # beside train.py's own
    with pytest.raises(PredictorError, match="is no folder"):
        predictor_folders(config, EvaluationSettings(predictors=["/nowhere"]))
    assert predictor_folders(config, EvaluationSettings(methods=["vanilla", "two-pass"])) == {}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the command has run, without a predictor."""
    folder = tmp_path_factory.mktemp("evaluated")
    arguments = [
        *SMALL,
        f"runs_dir={folder}",
        "evaluation.methods=[vanilla,two-pass,swapped]",
        "evaluation.benchmarks=[pope]",
    ]
    assert run(load_config(arguments), "python -m evaluation ...") == 0
    return folder


def test_a_run_writes_its_report_and_the_worlds_questions(evaluated: Path) -> None:
    (report,) = (evaluated / "fits/scene-llava/evaluations").iterdir()
    assert {path.name for path in report.iterdir()} == {
        "evaluation.html", "evaluation.md", "evaluation.json", "answers.jsonl",
    }  # fmt: skip
    (questions,) = (evaluated / "cache").glob("pope-*")
    assert {path.name for path in questions.iterdir()} == {
        "pope_random.json", "pope_popular.json", "pope_adversarial.json",
    }  # fmt: skip
    facts = json.loads((report / "evaluation.json").read_text())["facts"]
    assert facts["model_name"] == "scene-llava" and facts["questions"]["random"][1] == 8


def test_official_files_of_the_world_give_the_same_figures(evaluated: Path) -> None:
    (questions,) = (evaluated / "cache").glob("pope-*")
    files = ",".join(str(questions / f"pope_{name}.json") for name in ("random", "popular", "adversarial"))
    images = next((evaluated / "data").glob("scenes*")) / "val"
    arguments = [*SMALL, f"runs_dir={evaluated}", f"evaluation.pope_files=[{files}]",
                 f"evaluation.images_dir={images}",
                 "evaluation.methods=[vanilla,two-pass,swapped]", "evaluation.benchmarks=[pope]"]  # fmt: skip
    assert run(load_config(arguments)) == 0
    made, read = (
        read_run(str(path), "")[1] for path in sorted((evaluated / "fits/scene-llava/evaluations").iterdir())
    )
    for name in ("hr", "accuracy", "auc", "hr_change"):
        assert read.get(f"eval/two-pass/pope_adversarial/{name}") == made.get(f"eval/two-pass/adversarial/{name}")


@pytest.fixture(scope="module")
def store(evaluated: Path) -> Iterator[MlflowClient]:
    """The tracking store that the command looks into."""
    former = mlflow.get_tracking_uri()
    yield tracking.connect(load_config([f"runs_dir={evaluated}"]).tracking_uri, ["fits"], evaluated / "mlflow")
    mlflow.set_tracking_uri(former)


def saved_predictor(folder: Path, run_id: str, **model: Any) -> Path:
    """A random predictor of the embedded model, as one that this run has made."""
    settings = VLMSettings(hub_id=str(CHECKPOINT))
    about = describe_model(*load_vlm(settings)) | model
    predictor = SourcePredictor(PredictorConfig(about["hidden_size"], rank=4)).eval()
    scr, provenance = load_config(SMALL).scr, {"mlflow_run_id": run_id, "data_name": "pictures"}
    return save_predictor(folder, predictor, scr=scr, model=about, provenance=provenance)


def one_pass(evaluated: Path, predictor: Path) -> list[str]:
    return [
        *SMALL, f"runs_dir={evaluated}", f"evaluation.predictors=[{predictor}]",
        "evaluation.methods=[vanilla,one-pass]", "evaluation.benchmarks=[pope]",
    ]  # fmt: skip


def test_it_is_logged_below_the_run_that_made_the_predictor(
    evaluated: Path, store: MlflowClient, tmp_path: Path, capsys: Any
) -> None:
    made, other = (runs.create_run(store, "fits", name, {}).info.run_id for name in ("made", "other"))
    store.log_metric(made, "hr_one_pass", 12.5)
    store.set_terminated(made)
    predictor = saved_predictor(tmp_path / "mine", made)
    assert run(load_config(one_pass(evaluated, predictor))) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"predictor: {os.path.relpath(predictor)}, fitted on data=pictures" in printed
    assert f"below the predictor's run {made}" in printed
    (found,) = store.search_runs([store.get_run(made).info.experiment_id], f"tags.mlflow.parentRunId = '{made}'")
    files = {Path(one.path).name for one in store.list_artifacts(found.info.run_id, "reports")}
    assert files == {"evaluation.html", "evaluation.md", "evaluation.json", "answers.jsonl"}
    numbers = tracking.every_number(store, found)
    assert found.info.start_time == pytest.approx(1000 * psutil.Process().create_time(), abs=1)
    assert found.data.params == {"model.name": "scene-llava", "data": "scenes"}
    assert found.data.metrics["hr_one_pass"] == pytest.approx(100 * numbers["eval/one-pass/adversarial/hr"])
    assert (
        found.info.status == "FINISHED"
        and "artifacts/reports/evaluation.html" in found.data.tags["mlflow.note.content"]
    )
    assert re.fullmatch(r"evaluation: scenes, \d+ images( #2)?", str(found.info.run_name))
    described = store.get_experiment(found.info.experiment_id).tags["mlflow.note.content"]
    assert f"Newest evaluation, [{found.info.run_name}](#/experiments/" in described
    assert f"/#/experiments/{found.info.experiment_id}/runs?" in printed
    assert store.get_run(made).data.metrics == {"hr_one_pass": 12.5} and not store.get_run(other).data.metrics
    assert read_run(found.info.run_id, load_config([f"runs_dir={evaluated}"]).tracking_uri)[0] == "scene-llava"


def test_the_report_goes_to_the_run_of_the_predictor(tmp_path: Path) -> None:
    fits = tmp_path / "fits/scene-llava"
    older, newer = RunFolder(fits / "1"), RunFolder(fits / "2")
    for one in (older, newer):
        one.predictor.mkdir(parents=True)
        one.note(complete=True)
    (fits / "latest").symlink_to("2")
    (tmp_path / "link").symlink_to(older.predictor)
    (tmp_path / "copy/predictor").mkdir(parents=True)
    for named, wanted in (([older.predictor], older), ([tmp_path / "link", newer.predictor], older), ([], newer),
                       ([tmp_path / "copy/predictor"], newer)):  # fmt: skip
        places = f"evaluation.predictors=[{','.join(map(str, named))}]"
        assert run_of_the_predictor(load_config([f"runs_dir={tmp_path}", places])) == wanted.path


def test_a_run_that_can_not_be_logged_on_costs_no_report(
    evaluated: Path, store: MlflowClient, tmp_path: Path, capsys: Any
) -> None:
    place = tmp_path / "no folder"
    place.write_text("as a disk that can't be written to")
    store.create_experiment("elsewhere", place.as_uri())
    made = runs.create_run(store, "elsewhere", "made", {}).info
    for run_id, words in ((made.run_id, "exists|directory"), ("0" * 32, "not found")):
        assert run(load_config(one_pass(evaluated, saved_predictor(tmp_path / run_id, run_id)))) == 0
        printed = " ".join(capsys.readouterr().out.split())  # a long path has a line of its own
        assert re.search(rf"not logged below run {run_id} of .*({words})", printed)
        assert Path(printed.split("report: ")[1].split()[0]).is_file()


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"embedding_probe": [1.0] * 32}, ": the predictor is for another model: .*these are other weights.*or its"),
        ({"num_blocks": 9}, " is for a model of num_blocks 9, not 8"),  # before the model is loaded
    ],
)
def test_a_predictor_of_another_model(evaluated: Path, tmp_path: Path, model: Any, words: str, capsys: Any) -> None:
    folder = saved_predictor(tmp_path / "foreign", "", **model)
    with pytest.raises((PredictorError, RunError)) as caught:
        run(load_config(one_pass(evaluated, folder)))
    assert re.search(f"{folder}{words}", " ".join(str(caught.value).split()))
    assert "ask" not in capsys.readouterr().out  # before any question


def test_evaluations_are_put_beside_the_papers(evaluated: Path, capsys: Any, tmp_path: Path) -> None:
    assert compare_runs([str(evaluated), f"output={tmp_path / 'table.md'}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("scene-llava:")
    assert any(re.match(r"scene-llava +measured, (pope_)?adversarial", line) for line in lines)
    assert any("LLaVA-1.5-7B" in line and "paper" in line and "13.1 / 86.5 / +44" in line for line in lines)
    assert "| LLaVA-1.5-7B | paper |" in (tmp_path / "table.md").read_text()
    with pytest.raises(EvaluationError, match=r"no evaluation\.json below it"):
        compare_runs([str(_empty(tmp_path))])
    with pytest.raises(EvaluationError, match="usage: python -m evaluation compare"):
        compare_runs([])
    with pytest.raises(EvaluationError, match=r"is no folder, and .* has no run of that id"):
        compare_runs(["deadbeef", f"runs_dir={tmp_path}"])


def test_a_runs_own_report_is_compared_and_named(evaluated: Path, capsys: Any, tmp_path: Path) -> None:
    (report, *_) = evaluated.rglob("evaluation.json")
    own, later = tmp_path / "run/reports/evaluation.json", tmp_path / "run/evaluations/1/evaluation.json"
    for place in (own, later):
        place.parent.mkdir(parents=True)
        place.write_bytes(report.read_bytes())
    assert read_run(str(tmp_path / "run"), "")[2].startswith(f"{own} (1 more below ")
    assert read_run(str(later), "")[2] == str(later)
    assert read_run(str(tmp_path / "run/evaluations"), "")[2] == str(later)
    assert compare_runs([str(tmp_path / "run"), str(later)]) == 0
    printed = capsys.readouterr().out
    assert "scene-llava (1):" in printed and re.search(r"scene-llava \(2\) +measured", printed)


def _empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def test_tuning_takes_the_tuning_images_and_writes_a_model(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    with pytest.raises(RunError, match=r"harvest\.tuning=0 keeps too few images"):
        tune(load_config([*SMALL, f"runs_dir={tmp_path}"]))
    (tmp_path / "model").mkdir()
    monkeypatch.setattr("pipeline.places.CONFIGS", tmp_path)
    arguments = [*SMALL, f"runs_dir={tmp_path}", "harvest.tuning=2", "evaluation.tune_strengths=[1.1,2.0]"]
    assert tune(load_config(arguments)) == 0
    printed = capsys.readouterr().out
    assert "2 settings tried on 2 tuning images" in printed and "too few to choose by" in printed
    text = (tmp_path / "model/scene-llava-tuned.yaml").read_text()
    assert "the best of 2 settings" in text and "name: scene-llava-tuned" in text
    (record,) = (tmp_path / "fits/scene-llava/tuning").rglob("tuning.json")
    assert json.loads(record.read_text())["number"] == 2
    with pytest.raises(RunError, match=r"add\s+overwrite=true"):
        tune(load_config(arguments))


@pytest.mark.slow
def test_two_ranks_make_one_report(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "evaluation", *SMALL, f"runs_dir={tmp_path}", "benchmarks=pope",
               "methods=vanilla,two-pass"]  # fmt: skip
    base = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    outputs = [
        subprocess.run(command, cwd=ROOT, env={**base, "RANK": str(rank)}, capture_output=True, text=True, check=True)
        for rank in range(2)
    ]
    reports = list((tmp_path / "fits/scene-llava/evaluations").iterdir())
    assert len(reports) == 1, [one.stdout[-500:] for one in outputs]
