"""What MLflow's pages show: the view, descriptions, names of runs, and places that follow a moved folder."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import url2pathname

import mlflow
import psutil
import pytest
from mlflow import MlflowClient

from configs import load_config, load_sweep, save_config
from pipeline import pages, runs, tracking
from pipeline.store import follow_moved_artifacts
from pipeline.ui import free_port, links, main

# MLflow's own: its use of SQLAlchemy, and connections that its pool leaves to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a store, its artifacts, and one run that has a file."""
    former = mlflow.get_tracking_uri()
    place = tmp_path_factory.mktemp("first") / "runs"
    place.mkdir()
    client = tracking.connect(f"sqlite:///{place / 'mlflow.db'}", ["fits"], place / "mlflow")
    run = runs.create_run(client, "fits", "defaults", {}).info.run_id
    client.log_dict(run, {"metrics": {"test/mass": 0.9}}, "reports/fit.json")
    client.log_metric(run, "mass", 0.9)
    client.log_metric(run, "system/cpu", 0.1)
    yield place
    mlflow.set_tracking_uri(former)


def open_store(place: Path) -> MlflowClient:
    return tracking.connect(f"sqlite:///{place / 'mlflow.db'}", ["fits"], place / "mlflow")


def test_an_experiment_has_the_view_that_the_link_opens(folder: Path) -> None:
    client = open_store(folder)
    experiment = client.get_experiment_by_name("fits")
    assert experiment is not None
    view = json.loads(experiment.tags["mlflow.sharedViewState.scr"])
    assert {"metrics.`recall`", "metrics.`hr_one_pass`", "params.`data`", "params.`seed`"} <= set(
        view["selectedColumns"]
    )
    assert view["columnOrder"] == view["selectedColumns"]
    (link,) = links(f"sqlite:///{folder / 'mlflow.db'}", "http://127.0.0.1:5000")
    place = f"/#/experiments/{experiment.experiment_id}/runs?workflowType=machine_learning&viewStateShareKey=scr"
    assert link == f"fits: http://127.0.0.1:5000{place}"
    assert (
        pages.where_runs_are(load_config(), experiment.experiment_id) == f"make ui, then http://127.0.0.1:5000{place}"
    )
    server = load_config(["tracking.uri=https://host/"])
    assert pages.where_runs_are(server, experiment.experiment_id) == f"https://host{place}"


def test_descriptions_are_cut_between_lines(folder: Path) -> None:
    client = open_store(folder)
    run = client.search_runs([tracking.experiment_id(client, "fits")])[0].info
    pages.describe_run(client, run.run_id, "\n".join(f"line {number}" for number in range(1000)))
    text = client.get_run(run.run_id).data.tags["mlflow.note.content"]
    assert len(text) <= 5000 and text.endswith("\n...") and text.splitlines()[-2].startswith("line ")
    pages.describe_experiment(client, run.experiment_id, "run", "newest " * 900)
    pages.describe_experiment(client, run.experiment_id, "run", pages.run_link(run))
    experiment = client.get_experiment(run.experiment_id)
    assert experiment.tags["mlflow.note.content"].startswith("Newest run, [defaults](#/experiments/")
    for kind in ("trial", "sweep"):  # neither hides the newest run, whose line is the one that MLflow shows
        pages.describe_experiment(client, run.experiment_id, kind, f"[a {kind}](#)")
    lines = client.get_experiment(run.experiment_id).tags[pages.NOTE].splitlines()
    assert lines[:5:2] == [
        f"Newest run, {pages.run_link(run)}",
        "Newest sweep, [a sweep](#)",
        "Newest trial, [a trial](#)",
    ]
    client.set_experiment_tag(run.experiment_id, pages.NOTE, "What we want to know.")
    pages.describe_experiment(client, run.experiment_id, "run", "x")
    assert client.get_experiment(run.experiment_id).tags[pages.NOTE] == "What we want to know."


def test_tables_of_a_description_have_room_between_their_columns(folder: Path) -> None:
    client = open_store(folder)
    run = client.search_runs([tracking.experiment_id(client, "fits")])[0].info
    for _ in range(2):
        pages.describe_run(client, run.run_id, "| a | b |\n|---|---|\n| 1 | 2 |")
    assert client.get_run(run.run_id).data.tags[pages.NOTE].splitlines()[2] == "| 1&ensp;| 2 |"


def test_every_number_is_found_in_the_files_of_a_run(folder: Path) -> None:
    client = open_store(folder)
    (run,) = client.search_runs([tracking.experiment_id(client, "fits")], "attributes.run_name = 'defaults'")
    assert tracking.every_number(client, run) == {"mass": 0.9, "test/mass": 0.9}


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ([], "defaults"),
        (["model=scene-next", "runs_dir=/tmp/x", "tracking.experiment=e", "variant=v"], "defaults"),
        (["predictor=paper", "seed=1", "trainer.max_epochs=3"], "predictor=paper seed=1 max_epochs=3"),
        (["trainer.batch_size=8", "harvest.batch_size=4"], "trainer.batch_size=8 harvest.batch_size=4"),
        ([f"harvest.prompts=[{'present, ' * 30}random]"], "prompts=[" + "present, " * 7 + "presen..."),
    ],
)
def test_a_run_is_named_after_what_it_was_given(given: list[str], name: str) -> None:
    (child,) = load_sweep(given).children
    found = runs.run_name(child)
    assert len(found) <= 80 and found[:70] == name[:70]


def test_a_run_from_saved_settings_is_named_after_them(tmp_path: Path) -> None:
    (tmp_path / "20260102-030405").mkdir()
    save_config(load_config(), tmp_path / "20260102-030405/config.yaml")
    (tmp_path / "latest").symlink_to("20260102-030405")
    for place in (tmp_path, tmp_path / "latest", tmp_path / "latest/config.yaml"):
        (child,) = load_sweep([f"--config={place}", "seed=1"]).children
        assert runs.run_name(child) == "as 20260102-030405 seed=1"


def test_equal_names_are_numbered(folder: Path) -> None:
    client = open_store(folder)
    assert runs.unused_name(client, "fits", "seed=1") == "seed=1"
    assert runs.unused_name(client, "fits", "defaults") == "defaults #2"
    runs.create_run(client, "fits", "defaults #2", {})
    assert runs.unused_name(client, "fits", "defaults") == "defaults #3"


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_artifacts_are_found_in_a_folder_that_was_moved_or_copied(folder: Path, tmp_path: Path, how: str) -> None:
    first, second = tmp_path / "first" / "runs", tmp_path / "the second" / "runs"
    shutil.copytree(folder, first)
    assert follow_moved_artifacts(first / "mlflow.db", first / "mlflow") == [(folder / "mlflow").as_uri()]
    second.parent.mkdir()
    if how == "moved":
        first.rename(second)
    else:
        shutil.copytree(first, second)
    client = open_store(second)
    (run,) = client.search_runs([tracking.experiment_id(client, "fits")], "attributes.run_name = 'defaults'")
    assert run.info.artifact_uri == f"{(second / 'mlflow').as_uri()}/{run.info.run_id}/artifacts"
    assert (Path(url2pathname(str(run.info.artifact_uri).removeprefix("file://"))) / "reports/fit.json").is_file()
    fresh = runs.create_run(client, "fits", "later", {}).info.run_id
    client.log_text(fresh, "new", "new.txt")
    assert (second / "mlflow" / fresh / "artifacts/new.txt").is_file() and not list(first.rglob("new.txt"))
    assert follow_moved_artifacts(second / "mlflow.db", second / "mlflow") == []  # once is enough


def test_artifacts_that_lie_elsewhere_on_purpose_stay_there(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "mlflow.db", tmp_path / "mlflow.db")
    assert follow_moved_artifacts(tmp_path / "mlflow.db", tmp_path / "mlflow") == []  # no artifacts beside it
    (tmp_path / "mlflow").mkdir()
    assert follow_moved_artifacts(tmp_path / "mlflow.db", tmp_path / "mlflow") == []  # and none of these runs


def test_one_worker_serves_the_pages_without_a_line_for_each_request(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []
    monkeypatch.setenv("PYTHONWARNINGS", "")
    monkeypatch.setenv("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "true")  # what is set stays
    monkeypatch.setattr("pipeline.ui.serve", lambda command: started.append(command) or 0)
    typed = ["ui", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--port", "5001"]
    for others in ([], ["--workers", "3", "--dev"]):
        monkeypatch.setattr("sys.argv", [*typed, *others])
        with pytest.raises(SystemExit):
            main()
    quiet = ["--uvicorn-opts", "--log-level warning"]
    ends = [["1", *quiet], ["1", "--workers", "3", "--dev"]]
    assert [command[command.index("--workers") + 1 :] for command in started] == ends
    assert os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "true"


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_server_and_its_processes_end_without_a_traceback(tmp_path: Path, stop: signal.Signals) -> None:
    child = "import subprocess, sys, time; subprocess.Popen(['sleep', '60']); open(sys.argv[1], 'w'); time.sleep(60)"
    command = [sys.executable, "-c", child, str(tmp_path / "up")]
    code = f"import signal, sys; from pipeline.ui import serve; sys.exit(serve({command!r}))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as ui:
        deadline = time.monotonic() + 60
        while not (tmp_path / "up").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (server,) = psutil.Process(ui.pid).children()
        processes = [server, *server.children()]
        ui.send_signal(stop)
        said, errors = ui.communicate(timeout=60)
    assert (ui.returncode, said, errors) == (0, "\nStopped.\n", "") and len(processes) == 2
    assert not psutil.wait_procs(processes, timeout=30)[1]


def test_the_server_takes_the_next_port_where_5000_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):  # another process has it
            other.bind(("127.0.0.1", 5000))
            other.listen()
        assert 5000 < (port := free_port("127.0.0.1")) < 5100
    assert f"port 5000 is taken: this is {port}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"error: --host 192\.0\.2\.1: "):
        free_port("192.0.2.1")  # no address of this machine
