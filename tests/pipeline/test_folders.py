"""A run has its own folder, resumes in it, and never takes another's."""

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from configs import TrainConfig, load_config
from data.locks import exclusively
from pipeline.errors import RunError
from pipeline.folders import RunFolder, finish_run, latest_run, open_run


def config_in(folder: Path, *overrides: str) -> TrainConfig:
    return load_config([f"runs_dir={folder}", *overrides])


def complete(config: TrainConfig, mark: str) -> RunFolder:
    """A run that wrote a predictor and came to its end."""
    with open_run(config) as folder:
        folder.predictor.mkdir(exist_ok=True)
        (folder.predictor / "mark").write_text(mark)
        assert all("run before stays" in note for note in finish_run(folder, config))
    return folder


def test_a_second_run_of_the_same_command_leaves_the_first_as_it_was(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    first, second = complete(config, "one"), complete(config, "two")
    assert first.path != second.path
    assert (first.predictor / "mark").read_text() == "one"
    assert (config.paths.predictor / "mark").read_text() == "two"
    assert latest_run(config).path == second.path.resolve()


def test_a_run_that_takes_the_link_over_says_whose_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = config_in(Path("runs"))
    with open_run(config) as first:
        assert finish_run(first, config) == []
    with open_run(config) as second:
        assert finish_run(second, config) == [
            f"{config.paths.predictor} is this run's now; that of the run before stays at "
            f"{first.path.resolve() / 'predictor'} (ln -sfn {first.path.name} {config.paths.latest} gives it the link "
            "again)"
        ]
        assert finish_run(second, config) == []  # resumed behind its end


def test_a_trial_takes_the_links_from_trials_alone(tmp_path: Path) -> None:
    trial, serious = config_in(tmp_path, "trainer=quick"), config_in(tmp_path)
    complete(trial, "first trial")
    assert (serious.paths.predictor / "mark").read_text() == "first trial"
    complete(trial, "second trial")
    assert (serious.paths.predictor / "mark").read_text() == "second trial"
    kept = complete(serious, "serious")
    with open_run(trial) as folder:
        (note,) = finish_run(folder, trial)
    assert "stays at" in note and str(folder.predictor) in note and str(kept.predictor) in note
    assert (serious.paths.predictor / "mark").read_text() == "serious"
    assert latest_run(trial).path == kept.path.resolve()


def test_a_run_on_other_data_leaves_the_links(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    scenes = config_in(tmp_path)
    pictures = config_in(tmp_path, "data=pictures", f"data.root={tmp_path / 'photos'}")
    kept = complete(scenes, "scenes")
    with open_run(pictures) as folder:
        (note,) = finish_run(folder, pictures)
    assert note.startswith("data=pictures, and the run before data=scenes: ") and str(kept.predictor) in note
    assert (scenes.paths.predictor / "mark").read_text() == "scenes"
    assert f"ln -sfn {folder.path.name} {scenes.paths.latest}" in note
    complete(scenes, "scenes again")
    assert (scenes.paths.predictor / "mark").read_text() == "scenes again"


def test_the_link_moves_only_when_a_run_is_complete(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    complete(config, "one")
    with pytest.raises(RuntimeError), open_run(config) as folder:
        folder.predictor.mkdir()
        (folder.predictor / "mark").write_text("half")
        raise RuntimeError
    assert (config.paths.predictor / "mark").read_text() == "one"
    assert not folder.complete


def test_an_interrupted_run_is_resumed_by_the_same_settings_alone(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    with open_run(config) as interrupted:
        interrupted.note(mlflow_run_id="abc")
    with open_run(config_in(tmp_path, "seed=1")) as other:
        assert other.path != interrupted.path
    with open_run(config_in(tmp_path, "trainer.cache=none", "tracking.experiment=x")) as again:
        assert again.path == interrupted.path and again.record["mlflow_run_id"] == "abc"
    with open_run(config_in(tmp_path, "trainer.resume=false")) as fresh:
        assert fresh.path != interrupted.path


def _hold(folder: str, ready: object, done: object) -> None:
    with open_run(config_in(Path(folder))):
        ready.set()  # type: ignore[attr-defined]
        done.wait(30)  # type: ignore[attr-defined]


def test_two_commands_at_once_have_two_folders(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(str(tmp_path), ready, done))
    other.start()
    try:
        assert ready.wait(60)
        (theirs,) = (tmp_path / "fits/scene-llava").iterdir()
        with open_run(config_in(tmp_path)) as mine:
            assert mine.path != theirs
    finally:
        done.set()
        other.join()
    assert other.exitcode == 0


def test_a_variant_that_another_process_works_in_is_refused(tmp_path: Path) -> None:
    config = config_in(tmp_path, "variant=mine")
    lock = tmp_path / "sweeps/scene-llava/mine/run.lock"
    with (
        exclusively(lock, 0.0, "testing"),
        pytest.raises(RunError, match="another process works in"),
        open_run(config),
    ):
        pass


def test_a_variant_of_other_settings_is_refused_and_kept(tmp_path: Path) -> None:
    folder = complete(config_in(tmp_path, "variant=mine"), "one")
    with (
        pytest.raises(RunError, match=r"complete run of other settings.*overwrite=true"),
        open_run(config_in(tmp_path, "variant=mine", "seed=1")),
    ):
        pass
    assert (folder.predictor / "mark").read_text() == "one"
    with open_run(config_in(tmp_path, "variant=mine", "seed=1", "overwrite=true")) as again:
        assert again.path == folder.path and not again.complete
    assert (folder.path / "predictor.former-1/mark").read_text() == "one"  # even then


def test_a_folder_of_an_earlier_version_stays_and_is_named(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    config.paths.predictor.mkdir(parents=True)
    (config.paths.predictor / "mark").write_text("old")
    with open_run(config) as folder:
        folder.predictor.mkdir()
        (note,) = finish_run(folder, config)
    assert "made by an earlier version and stays" in note and str(folder.predictor) in note
    assert (config.paths.predictor / "mark").read_text() == "old"


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"null", b"[" * 100_000, b"\xff\xfe"])
def test_a_damaged_record_is_no_run_to_resume(tmp_path: Path, content: bytes) -> None:
    config = config_in(tmp_path)
    with open_run(config) as folder:
        pass
    (folder.path / "run.json").write_bytes(content)
    assert folder.record == {} and not folder.complete
    with open_run(config) as other:
        assert other.path != folder.path


def test_without_a_complete_run_there_is_no_latest(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no complete run at .*run train.py first"):
        latest_run(config_in(tmp_path))


def test_the_configuration_lies_in_the_folder(tmp_path: Path) -> None:
    config = config_in(tmp_path, "seed=7")
    with open_run(config) as folder:
        assert "seed: 7" in folder.config.read_text()
        assert json.loads((folder.path / "run.json").read_text())["complete"] is False
        assert os.access(folder.reports, os.W_OK)
