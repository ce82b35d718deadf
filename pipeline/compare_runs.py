"""The command `python -m evaluation compare RUN RUN ...`: finished evaluations in one table, the paper's beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from configs import load_config
from configs.cli import HELP
from evaluation.errors import EvaluationError
from evaluation.tables import bullets, markdown, table
from scr_runtime.files import write_file

_FILE = "evaluation.json"
_USAGE = (
    "usage: python -m evaluation compare RUN RUN ... [output=FILE] [tracking.uri=URI] [runs_dir=FOLDER]\n"
    "where RUN is a folder with evaluation.json below it, or the id of an MLflow run"
)


def compare_runs(arguments: Sequence[str]) -> int:
    """Prints the table; `output=FILE` writes it as Markdown, `tracking.uri=URI` names the store of MLflow ids."""
    if HELP & set(arguments):
        print(_USAGE)
        return 0
    names = [text for text in arguments if "=" not in text]
    options = dict(text.split("=", 1) for text in arguments if "=" in text)
    unknown = sorted(set(options) - {"output", "tracking.uri", "runs_dir"})
    if unknown or not names:
        raise EvaluationError(f"unknown {', '.join(unknown)}: " * bool(unknown) + _USAGE)
    from evaluation.paper import PAPER, row_of, table_rows  # takes seconds: the methods need torch

    config = load_config([f"{key}={value}" for key, value in options.items() if key != "output"])
    rows = table_rows([*(row_of(*read_run(name, config.tracking_uri)) for name in names), *PAPER])
    print(table(rows))
    notes = [
        "The paper's rows are arXiv 2602.22469's own (POPE adversarial, A100, fp16); its prompt and decoding are not "
        "known.",
        "Rates of different prompts or decodings must not be compared: see each run's evaluation.html.",
    ]
    print("\n" + bullets(notes))
    if "output" in options:
        write_file(Path(options["output"]), (markdown(rows) + "\n").encode())
    return 0


def read_run(name: str, uri: str) -> tuple[str, Mapping[str, float]]:
    """Name and metrics of an evaluation.

    Args:
        name: A folder, whose newest evaluation.json is taken, that file, or the id of an MLflow run.
        uri: The tracking store.

    Raises:
        EvaluationError: There is none, or it cannot be read.
    """
    place = Path(name).expanduser()
    if place.exists():
        files = [place] if place.is_file() else sorted(place.rglob(_FILE), key=lambda file: file.stat().st_mtime)
        if not files:
            raise EvaluationError(f"{place}: no {_FILE} below it; run python -m evaluation first")
        try:
            content = json.loads(files[-1].read_text(encoding="utf-8"))
            facts = content["facts"]
            return str(facts.get("model_name") or facts["model"]["hub_id"]), dict(content["metrics"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise EvaluationError(f"{files[-1]} cannot be read: it is not what python -m evaluation writes") from error
    from mlflow import MlflowClient  # which takes seconds to import, and folders need none
    from mlflow.exceptions import MlflowException

    from pipeline.tracking import every_number

    try:
        client = MlflowClient(uri)
        run = client.get_run(name)
    except MlflowException as error:
        raise EvaluationError(f"{name} is no folder, and {uri} has no run of that id") from error
    numbers = every_number(client, run)
    if not any(key.startswith("eval/") for key in numbers):
        raise EvaluationError(f"the run {name} has no evaluation: run python -m evaluation first")
    return str(run.data.params.get("model.name") or run.info.run_name), numbers
