"""MLflow's pages as a user finds them: columns of the table of runs, descriptions with verdict and tables, links."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from mlflow import MlflowClient
from mlflow.entities import Run, RunInfo, RunTag

from configs import TrainConfig

VIEW = "scr"
"""Key of the view that every experiment has: the table of runs with the columns that matter."""
NOTE = "mlflow.note.content"
WRITTEN = "note.sha256"
"""Tag with the checksum of the description that was last put there: another description is a user's, and stays."""
_METRICS = ("recall", "mass", "hr_vanilla", "hr_two_pass", "hr_one_pass", "edit_kept", "prefill_x")
_COLUMNS = (
    *(f"metrics.`{name}`" for name in _METRICS),
    "params.`data`", "params.`predictor.loss`", "params.`seed`", "attributes.`Duration`",
)  # fmt: skip
_NEWEST = ("Newest run", "Newest evaluation", "Newest sweep", "Newest trial")
_WIDTH = 98  # pixels of a column
_OWN = "sqlite:///runs/mlflow.db"
_FOLDED = " (open *Show more* first)"
_LONGEST_NOTE = 5000  # letters; MLflow takes no longer tag of an experiment
_LEGEND = """
Columns: **recall**, **mass** of the test split at K; **hr_...** hallucination rate in percent, on adversarial
questions or the last split; **edit_kept** share of two-pass's edit that one-pass keeps; **prefill_x** cost of a
prefill against vanilla. A sweep's own row has the values of its best child. Compare runs of the same data and
questions. Every other number is in the artifacts of each run: `reports/fit.json` and `reports/evaluation.json`.
"""


def columns(metrics: Mapping[str, float]) -> dict[str, float]:
    """Those metrics of a run that have a column in the table of runs."""
    return {name: metrics[name] for name in _METRICS if name in metrics}


def add_view(client: MlflowClient, experiment_id: str) -> None:
    """Gives an experiment the view that `runs_page` opens."""
    view = {"selectedColumns": _COLUMNS, "columnOrder": _COLUMNS, "columnWidths": dict.fromkeys(_COLUMNS, _WIDTH)}
    view |= {"orderByKey": "attributes.start_time", "orderByAsc": False}
    client.set_experiment_tag(experiment_id, f"mlflow.sharedViewState.{VIEW}", json.dumps(view))


def describe_experiment(client: MlflowClient, experiment_id: str, kind: str, newest: str) -> None:
    """Puts the newest of each kind, and what the columns mean, above the table of runs, unless a user has written it.

    Args:
        client: Of the tracking store.
        experiment_id: Of the experiment.
        kind: run, evaluation, sweep or trial. MLflow shows the first line, which is a run's: nothing hides it.
        newest: What to say of it.
    """
    tags = client.get_experiment(experiment_id).tags
    if by_user(tags):
        return
    lines = {words: line for line in tags.get(NOTE, "").splitlines() for words in _NEWEST if line.startswith(words)}
    lines[f"Newest {kind}"] = f"Newest {kind}, {newest}"
    text = "\n\n".join(lines[words] for words in _NEWEST if words in lines)
    for key, value in _note(f"{text}\n{_LEGEND}").items():
        client.set_experiment_tag(experiment_id, key, value)


def describe_run(client: MlflowClient, run_id: str, text: str, model_id: str | None = None) -> None:
    """Puts a text on the page of a run, unless a user has written there, and of its model."""
    if not by_user(client.get_run(run_id).data.tags):
        client.log_batch(run_id, tags=[RunTag(key, value) for key, value in _note(text).items()])
    if model_id is not None:
        client.set_logged_model_tags(model_id, {NOTE: _note(text.replace(_FOLDED, ""))[NOTE]})


def by_user(tags: Mapping[str, str]) -> bool:
    """Whether a user has written the description of a run or an experiment, or has changed it."""
    note = tags.get(NOTE, "")
    return bool(note) and tags.get(WRITTEN) != _checksum(note)


def _spaced(text: str) -> str:
    """A text whose tables have room between their columns, which MLflow's pages give them none."""
    return text.replace(" | ", "&ensp;| ")  # as an entity: MLflow trims the cells


def _note(text: str) -> dict[str, str]:
    text = cut(_spaced(text))
    return {NOTE: text, WRITTEN: _checksum(text)}


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def cut(text: str) -> str:
    """A text that MLflow takes: without its last lines if it is too long."""
    if len(text) <= _LONGEST_NOTE:
        return text
    shorter = text[: _LONGEST_NOTE - 4]
    return (shorter.rpartition("\n")[0] or shorter) + "\n..."


def runs_page(experiment_id: str) -> str:
    """The table of runs, behind the address of a server."""
    return f"/#/experiments/{experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={VIEW}"


def run_link(info: RunInfo) -> str:
    """A link to a run, in a description."""
    return f"[{info.run_name}]({_place(info.experiment_id, info.run_id)})"


def _place(experiment_id: str, run_id: str) -> str:
    return f"#/experiments/{experiment_id}/runs/{run_id}"


def artifact_link(info: RunInfo, file: str, name: str) -> str:
    """A link to a file of a run, in a description."""
    return f"[{name}]({_place(info.experiment_id, info.run_id)}/artifacts/{file})"


def artifact_links(info: RunInfo, files: Mapping[str, str], model_id: str | None = None) -> str:
    """Links to files of a run, by their names, and to the predictor that it logged.

    MLflow folds a description, and then nothing in it can be clicked.
    """
    links = [artifact_link(info, file, name) for file, name in files.items()]
    if model_id is not None:
        links.append(f"[predictor](#/experiments/{info.experiment_id}/models/{model_id})")
    return " · ".join(links) + _FOLDED


def picture(info: RunInfo, file: str, width: int = 880) -> str:
    """A picture that is a file of a run, in a description."""
    return f'<img src="get-artifact?path={file}&run_uuid={info.run_id}" width="{width}">'


def describe_sweep(client: MlflowClient, parent: Run, text: str, children: Mapping[str, str], best: str) -> None:
    """Puts a sweep's table and figure on the page of its parent run, and names it as the newest.

    Args:
        client: Of the tracking store.
        parent: The sweep's own run.
        text: Its table.
        children: Name of each child -> its run, which lies elsewhere if another command had finished it.
        best: Which of them is best, and by what.
    """
    info = parent.info
    files = {"sweep/summary.md": "table", "sweep/children.csv": "every number of every child"}
    runs = " · ".join(f"[{name}]({_place(info.experiment_id, run)})" for name, run in children.items())
    own = f"Children: {runs}. " + f"This run's metrics are those of its {best}." * bool(best)
    parts = [artifact_links(info, files), text, own, picture(info, "sweep/summary.png")]
    describe_run(client, info.run_id, "\n\n".join(parts))
    describe_experiment(client, info.experiment_id, "sweep", run_link(info))


def describe_models(client: MlflowClient, parent: Run, title: str) -> None:
    """Adds the comparison of models to the page of a sweep's parent."""
    info, text = parent.info, parent.data.tags.get(NOTE, "")
    link = artifact_link(info, "models/summary.md", title)
    describe_run(client, info.run_id, f"{text}\n\n{link}\n\n{picture(info, 'models/summary.png')}")


def server(config: TrainConfig) -> str:
    """What to type, or to open, for MLflow's pages."""
    uri = config.tracking_uri
    if "sql" not in uri:
        return uri.rstrip("/")
    return f"{'make ui' if uri == _OWN else f'make ui URI={uri}'}, then http://127.0.0.1:5000"


def where_runs_are(config: TrainConfig, experiment_id: str) -> str:
    """What to type, or to open, for the table of runs."""
    return server(config) + runs_page(experiment_id) * (not config.tracking_uri.startswith("databricks"))
