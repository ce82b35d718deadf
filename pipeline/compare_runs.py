"""The command `python -m evaluation compare RUN RUN ...`: finished evaluations in one table, the paper's beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from configs import load_config
from configs.cli import HELP
from evaluation.errors import EvaluationError
from evaluation.tables import bullets, markdown, paragraph, table
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
    found = [read_run(name, config.tracking_uri) for name in names]
    models = [model for model, _, _ in found]
    several = len(set(models)) < len(models)
    told = [f"{model} ({number})" if several else model for number, model in enumerate(models, 1)]
    rows = table_rows([*(row_of(name, metrics) for name, (_, metrics, _) in zip(told, found, strict=True)), *PAPER])
    print("\n".join(paragraph(f"{name}: {place}") for name, (_, _, place) in zip(told, found, strict=True)))
    print("\n" + table(rows))
    notes = [
        "The paper's rows are arXiv 2602.22469's own (POPE adversarial, A100, fp16); its prompt and decoding are not "
        "known.",
        "Rates of different prompts or decodings must not be compared: see each run's evaluation.html.",
    ]
    print("\n" + bullets(notes))
    if "output" in options:
        write_file(Path(options["output"]), (markdown(rows) + "\n").encode())
    return 0


def read_run(name: str, uri: str) -> tuple[str, Mapping[str, float], str]:
    """Model and metrics of an evaluation, and where they were read.

    Args:
        name: A file evaluation.json; a folder, whose own reports/evaluation.json is taken, else the newest below it;
            or the id of an MLflow run.
        uri: The tracking store.

    Raises:
        EvaluationError: There is none, or it cannot be read.
    """
    place = Path(name).expanduser()
    if place.exists():
        file, others = _report(place)
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            facts = content["facts"]
            words = f"{file} ({others} more below {place}: name a file to take another)" if others else str(file)
            return str(facts.get("model_name") or facts["model"]["hub_id"]), dict(content["metrics"]), words
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise EvaluationError(f"{file} cannot be read: it is not what python -m evaluation writes") from error
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
    return str(run.data.params.get("model.name") or run.info.run_name), numbers, f"{run.info.run_name}, {name}"


def _report(place: Path) -> tuple[Path, int]:
    """The report that a path stands for, and how many others lie below it."""
    if place.is_file():
        return place, 0
    files = sorted(place.rglob(_FILE), key=lambda file: file.stat().st_mtime)
    if not files:
        raise EvaluationError(f"{place}: no {_FILE} below it; run python -m evaluation first")
    own = place / "reports" / _FILE
    return own if own in files else files[-1], len(files) - 1
