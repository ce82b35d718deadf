"""The tracking store in a file: its artifacts move with it."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

_PLACES = {
    "experiments": ("artifact_location",),
    "runs": ("artifact_uri",),
    "logged_models": ("artifact_location",),
    "model_versions": ("source", "storage_location"),
}
"""Columns of MLflow's tables that hold places of artifacts. MLflow makes them absolute, whatever it is given."""


def follow_moved_artifacts(database: Path, artifacts: Path) -> list[str]:
    """Corrects the places of artifacts in a store that was moved or copied together with them.

    An experiment is corrected if the files of one of its runs lie in `artifacts`, or it has no runs.

    Args:
        database: SQLite file of the store.
        artifacts: Folder of the artifacts, beside it.

    Returns:
        The former places.
    """
    if not database.is_file() or not artifacts.is_dir():
        return []
    here, moved = artifacts.absolute().as_uri(), list[str]()
    with contextlib.closing(sqlite3.connect(database)) as store, store:
        tables = {name for (name,) in store.execute("select name from sqlite_master where type = 'table'")}
        if not set(_PLACES) <= tables:
            return []  # of another version of MLflow
        for number, former in store.execute("select experiment_id, artifact_location from experiments").fetchall():
            if former in (None, here, *moved) or not former.startswith("file:") or number == 0:  # 0: MLflow's own
                continue
            runs = store.execute("select run_uuid from runs where experiment_id = ?", (number,)).fetchall()
            if not runs or any((artifacts / run).is_dir() for (run,) in runs):
                moved.append(former)
        for former in moved:
            for table, columns in _PLACES.items():
                for column in columns:
                    store.execute(
                        f"update {table} set {column} = ? || substr({column}, ?) "
                        f"where {column} = ? or substr({column}, 1, ?) = ?",
                        (here, len(former) + 1, former, len(former) + 1, f"{former}/"),
                    )
    return moved
