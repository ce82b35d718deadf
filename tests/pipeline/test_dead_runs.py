"""Runs that say RUNNING although their process died are closed; those of living processes are left alone."""

import socket
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from pipeline.runs import create_run
from pipeline.tracking import close_dead_runs, connect

pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning"),
]


@pytest.fixture
def client(tmp_path: Path) -> MlflowClient:
    return connect(f"sqlite:///{tmp_path}/mlflow.db", ["runs"], tmp_path / "artifacts")


@pytest.mark.parametrize(
    ("host", "process", "status"),
    [
        (socket.gethostname(), "{own}", "RUNNING"),
        (socket.gethostname(), "{pid} 12.00", "KILLED"),  # the number was given to another process
        (socket.gethostname(), "999999999 12.00", "KILLED"),
        (socket.gethostname(), "nonsense", "KILLED"),
        ("another-machine", "999999999 12.00", "RUNNING"),  # it can't be known here
    ],
)
def test_only_runs_of_dead_processes_of_this_machine_are_closed(
    client: MlflowClient, host: str, process: str, status: str
) -> None:
    run = create_run(client, "runs", "one", {})
    own = run.data.tags["process.id"]
    client.set_tag(run.info.run_id, "process.host", host)
    client.set_tag(run.info.run_id, "process.id", process.format(own=own, pid=psutil.Process().pid))
    assert close_dead_runs(client, ["runs"]) == (status == "KILLED")
    assert client.get_run(run.info.run_id).info.status == status


def test_a_new_command_closes_them(client: MlflowClient, tmp_path: Path) -> None:
    run = create_run(client, "runs", "one", {})
    client.set_tag(run.info.run_id, "process.id", "999999999 12.00")
    again = connect(f"sqlite:///{tmp_path}/mlflow.db", ["runs"], tmp_path / "artifacts")
    found = again.get_run(run.info.run_id)
    assert found.info.status == "KILLED" and "died" in found.data.tags["error"]
    assert "run the same command again to resume" in found.data.tags["mlflow.note.content"]
