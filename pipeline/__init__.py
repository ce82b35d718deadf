"""Joins the rooms: the commands, their stages, MLflow runs, sweeps. Here configuration objects end.

Only train.py imports this package; `python -m data.harvest`, `python -m export` and `python -m evaluation` name it.
"""

import os

# Before torch starts its threads: threads that spin while they wait made a machine with busy cores 8 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # for files of some kilobytes
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # hides a page of database migrations at the first run
