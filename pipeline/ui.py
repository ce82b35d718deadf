"""The command behind `make ui`: prints the link to each experiment's runs, and runs MLflow's server.

python -m pipeline.ui --backend-store-uri sqlite:///runs/mlflow.db --port 5001
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.store import follow_moved_artifacts
from scr_runtime.terminal import filled

_SQLITE = "sqlite:///"
_LOGGING = ("--uvicorn-opts", "--gunicorn-opts", "--dev")
"""Options of MLflow that say themselves what its server logs."""


def main() -> None:
    """Runs the server; other options are MLflow's own."""
    parser = argparse.ArgumentParser(
        "python -m pipeline.ui",
        add_help=False,  # -h is MLflow's --host
        description="Prints the link to each experiment's table of runs, and starts MLflow's server.",
        epilog="Every other option is MLflow's own: `mlflow ui --help` lists them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--help", action="help", help="print this text", default=argparse.SUPPRESS)
    parser.add_argument("--backend-store-uri", default="sqlite:///runs/mlflow.db", metavar="URI", help="the runs")
    parser.add_argument("--host", "-h", default="127.0.0.1", help="address to listen at")
    parser.add_argument("--port", "-p", type=int, help="port to listen at (default: 5000, or the next that is free)")
    options, others = parser.parse_known_args()
    port = options.port or free_port(options.host)
    uri = options.backend_store_uri
    if uri.startswith(_SQLITE):
        database = Path(uri.removeprefix(_SQLITE))
        if not database.is_file():
            raise SystemExit(f"error: {database} does not exist: run train.py first, or name another file with URI=")
        for former in follow_moved_artifacts(database, database.with_name("mlflow")):
            print(filled(f"artifacts were at {former}: they are taken from {database.with_name('mlflow')} now"))
    print("Open in about 10 seconds (Ctrl-C ends the server):")
    for link in links(uri, f"http://{options.host}:{port}"):
        print(filled(link, "  ", "    "))
    sys.stdout.flush()
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # Starlette's, about itself
    # Each of its four workers and of its job queue's seven processes imports MLflow: without them the first page comes
    # after 8 to 11 s instead of 21 on two cores. The queue serves judges of language models.
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    given = ["--backend-store-uri", uri, "--host", options.host, "--port", str(port), "--workers", "1"]
    if not any(other.partition("=")[0] in _LOGGING for other in others):
        given += ["--uvicorn-opts", "--log-level warning"]  # else each request of a page is a line below the link
    sys.exit(serve([sys.executable, "-m", "mlflow", "ui", *given, *others]))


def serve(command: Sequence[str]) -> int:
    """Runs a server until it ends, or until Ctrl-C or SIGTERM; returns its exit code, or 0 if it was stopped.

    It has a session of its own: a Ctrl-C inside uvicorn would end in two tracebacks, SIGTERM ends it without a word.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with subprocess.Popen(command, start_new_session=True) as server:
        try:
            return server.wait()
        except KeyboardInterrupt:
            os.killpg(server.pid, signal.SIGTERM)
            print("\nStopped.", flush=True)
            return 0


def free_port(host: str) -> int:
    """Port 5000, where the links of train.py lead, or the next that nobody listens at."""
    for port in range(5000, 5100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise SystemExit(f"error: --host {host}: {error.strerror}") from None
                continue
        if port != 5000:
            print(f"port 5000 is taken: this is {port}")
        return port
    raise SystemExit("error: ports 5000 to 5099 are taken: name one with --port")


def links(uri: str, server: str) -> list[str]:
    """One line for each experiment that has a view; the server's own address where there is none."""
    from mlflow import MlflowClient  # takes seconds
    from mlflow.exceptions import MlflowException

    from pipeline.pages import VIEW, runs_page

    try:
        found = MlflowClient(uri).search_experiments()
    except MlflowException:
        found = []  # the server will say why
    known = [one for one in found if f"mlflow.sharedViewState.{VIEW}" in one.tags]
    return [f"{one.name}: {server}{runs_page(one.experiment_id)}" for one in known] or [server]


if __name__ == "__main__":
    main()
