"""The command behind `make ui`: prints the link to each experiment's runs, and starts MLflow's server.

python -m pipeline.ui --backend-store-uri sqlite:///runs/mlflow.db --port 5001
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from pipeline.store import follow_moved_artifacts
from scr_runtime.terminal import filled

_SQLITE = "sqlite:///"


def main() -> None:
    """Becomes the server; other options are MLflow's own."""
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
    parser.add_argument("--port", "-p", default="5000", help="port to listen at")
    options, _ = parser.parse_known_args()
    uri = options.backend_store_uri
    if uri.startswith(_SQLITE):
        database = Path(uri.removeprefix(_SQLITE))
        if not database.is_file():
            raise SystemExit(f"error: {database} does not exist: run train.py first, or name another file with URI=")
        for former in follow_moved_artifacts(database, database.with_name("mlflow")):
            print(filled(f"artifacts were at {former}: they are taken from {database.with_name('mlflow')} now"))
    print("Open in a few seconds:")
    for link in links(uri, f"http://{options.host}:{options.port}"):
        print(filled(link, "  ", "    "))
    sys.stdout.flush()
    os.environ.setdefault("PYTHONWARNINGS", "ignore::DeprecationWarning")  # Starlette's, about itself
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", "ui", *sys.argv[1:]])


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
