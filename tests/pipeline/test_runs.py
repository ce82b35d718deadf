"""The life of a run in a real SQLite store: its status, its origin, its metrics, and how it is found again."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import mlflow
import pytest
from mlflow import MlflowClient

from configs import load_config
from pipeline import pages, runs, tracking
from pipeline.exits import STOPS
from pipeline.pages import NOTE
from pipeline.stages import Work, fit_predictor
from predictor.fit import Preempted

# MLflow's own: its use of SQLAlchemy, and connections that its pool leaves to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning"),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[MlflowClient, str]]:
    former = mlflow.get_tracking_uri()
    folder = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{folder}/mlflow.db"
    yield tracking.connect(uri, ["fits"], folder / "artifacts"), uri
    mlflow.set_tracking_uri(former)


def test_a_run_ends_with_the_status_and_error_of_its_block(store: tuple[MlflowClient, str]) -> None:
    client, uri = store
    seen = {}
    for error in (None, ValueError("too small"), KeyboardInterrupt(), StopAsyncIteration()):
        run = runs.create_run(client, "fits", "x", {"run.kind": "single"}).info.run_id
        try:
            with runs.recorded(client, run, uri, (KeyboardInterrupt, StopAsyncIteration)):
                if error:
                    raise error
        except (ValueError, KeyboardInterrupt, StopAsyncIteration):
            pass
        found = client.get_run(run)
        seen[found.info.status] = found.data.tags.get("error")
    assert seen == {"FINISHED": None, "FAILED": "ValueError: too small", "KILLED": None}
    assert "command" in found.data.tags


def test_a_stopped_run_says_what_ended_it_until_it_is_resumed(store: tuple[MlflowClient, str]) -> None:
    client, uri = store
    config, work = load_config(), Mock(spec=Work)
    for stop, words in (
        (KeyboardInterrupt(), "stopped by Ctrl-C in the fit; run the same command again to resume"),
        (Preempted(), "stopped by SIGTERM in the fit; run the same command again to resume"),
    ):
        run = runs.create_run(client, "fits", "x", {}).info.run_id
        work.data.side_effect = stop
        with pytest.raises(type(stop)), runs.recorded(client, run, uri, STOPS):
            fit_predictor(config, work, Mock(), Mock())
        assert client.get_run(run).data.tags[NOTE] == words
        client.set_tag(run, "error", "of an earlier end")
        assert runs.reopen_run(client, run) is not None
        assert not {NOTE, "error"} & set(client.get_run(run).data.tags)
    with pytest.raises(KeyboardInterrupt), runs.recorded(client, run, uri, STOPS):
        raise KeyboardInterrupt
    assert client.get_run(run).data.tags[NOTE] == "stopped by Ctrl-C; run the same command again to resume"


def test_a_stopped_run_says_so_where_the_same_command_would_not_resume_it(store: tuple[MlflowClient, str]) -> None:
    client, uri = store
    run = runs.create_run(client, "fits", "x", {}).info.run_id
    with pytest.raises(KeyboardInterrupt), runs.recorded(client, run, uri, STOPS, resumes=False):
        raise KeyboardInterrupt
    note = client.get_run(run).data.tags[NOTE]
    assert note.startswith("stopped by Ctrl-C; run it with trainer.resume=true to resume; the same command begins")


def test_a_description_that_a_user_wrote_stays_when_a_run_is_stopped_and_resumed(
    store: tuple[MlflowClient, str],
) -> None:
    client, uri = store
    run = runs.create_run(client, "fits", "x", {}).info.run_id
    pages.describe_run(client, run, "the verdict")
    for words in ("mine", "the verdict, and what I think of it"):
        client.set_tag(run, NOTE, words)
        with pytest.raises(KeyboardInterrupt), runs.recorded(client, run, uri, STOPS):
            raise KeyboardInterrupt
        assert runs.reopen_run(client, run) is not None
        pages.describe_run(client, run, "another verdict")
        assert client.get_run(run).data.tags[NOTE] == words
    client.set_tag(run, NOTE, "")  # cleared by hand
    pages.describe_run(client, run, "another verdict")
    pages.describe_run(client, run, "the last verdict")  # over its own
    assert client.get_run(run).data.tags[NOTE] == "the last verdict"


def test_system_metrics_are_logged(store: tuple[MlflowClient, str], monkeypatch: pytest.MonkeyPatch) -> None:
    client, uri = store
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    run = runs.create_run(client, "fits", "x", {}).info.run_id
    with runs.recorded(client, run, uri):
        deadline = time.monotonic() + 30
        while "system/cpu_utilization_percentage" not in client.get_run(run).data.metrics:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    started: list[object] = []
    monkeypatch.setattr(runs.SystemMetricsMonitor, "start", lambda monitor: started.append(monitor))
    with runs.recorded(client, run, uri):
        assert not started
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")
    with runs.recorded(client, run, uri):
        assert started


def test_runs_are_found_by_tag_and_status(store: tuple[MlflowClient, str]) -> None:
    client, _ = store
    run = runs.create_run(client, "fits", "x", {"mark": "a"}).info.run_id
    assert tracking.find_run(client, "fits", "mark", "a", "FINISHED") is None
    assert tracking.find_run(client, "fits", "mark", "b") is None
    client.set_terminated(run, "FINISHED")
    newer = runs.create_run(client, "fits", "x", {"mark": "a"}, parent=run).info.run_id
    assert newer != run
    found = tracking.find_run(client, "fits", "mark", "a", "FINISHED")
    assert found is not None and found.info.run_id == run
    assert client.get_run(newer).data.tags["mlflow.parentRunId"] == run


def test_git_is_recorded_and_not_needed(tmp_path: Path) -> None:
    assert runs.git_tags(tmp_path) == {}

    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=n", "-c", "user.email=e@x", *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "first")
    assert runs.git_tags(tmp_path) == {"mlflow.source.git.commit": git("rev-parse", "HEAD"), "git.dirty": "false"}
    (tmp_path / "file").write_text("2")
    assert runs.git_tags(tmp_path)["git.dirty"] == "true"


def test_a_deleted_experiment_is_named(store: tuple[MlflowClient, str], tmp_path: Path) -> None:
    client, uri = store
    client.delete_experiment(client.create_experiment("gone"))
    with pytest.raises(tracking.TrackingError, match="'gone' is deleted"):
        tracking.connect(uri, ["gone"], tmp_path)


def test_a_server_that_is_not_there_is_reported_in_seconds(tmp_path: Path) -> None:
    former, started = mlflow.get_tracking_uri(), time.monotonic()
    with pytest.raises(tracking.TrackingError, match=r"127\.0\.0\.1"):
        tracking.connect("http://127.0.0.1:9", ["fits"], tmp_path)
    assert time.monotonic() - started < 20
    mlflow.set_tracking_uri(former)


def test_metrics_reach_the_run_in_batches(store: tuple[MlflowClient, str]) -> None:
    client, _ = store
    run = runs.create_run(client, "fits", "x", {}).info.run_id
    values = {f"test/{number}": number / 2 for number in range(501)}
    runs.log_metrics(client, run, values)
    assert client.get_run(run).data.metrics == values


def test_steps_that_a_killed_fit_has_logged_are_not_logged_again(store: tuple[MlflowClient, str]) -> None:
    client, uri = store
    config = load_config(["tracking.experiment=fits", f"tracking.uri={uri}"])
    run = runs.create_run(client, "fits", "x", {})
    first = runs.ResumedLogger(client, run, config)
    for step, mass in ((7, 0.25), (15, 0.5)):
        first.log_metrics({"val/mass": mass, "epoch": step // 8}, step)
    resumed = runs.ResumedLogger(client, client.get_run(run.info.run_id), config)
    for step, mass in ((15, 0.5), (23, 0.75)):  # killed before the checkpoint of step 15's epoch was written
        resumed.log_metrics({"val/mass": mass, "val/loss": mass}, step)
    history = client.get_metric_history(run.info.run_id, "val/mass")
    assert [(metric.step, metric.value) for metric in history] == [(7, 0.25), (15, 0.5), (23, 0.75)]
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "val/loss")] == [15, 23]


def test_the_end_of_a_fit_does_not_finish_its_run(store: tuple[MlflowClient, str]) -> None:
    """A process that is killed right behind its fit must not leave a run that looks complete."""
    client, uri = store
    config = load_config(["tracking.experiment=fits", f"tracking.uri={uri}"])
    run = runs.create_run(client, "fits", "x", {})
    logger = runs.ResumedLogger(client, run, config)
    logger.log_metrics({"val/mass": 0.5}, 1)
    logger.finalize("success")
    assert client.get_run(run.info.run_id).info.status == "RUNNING"
