"""The summary of a sweep: groups, means with intervals, names, files and the figure."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from evaluation import sweep_report
from evaluation.sweep_report import Trial, cells, mean_over_seeds

NAMES = {"predictor.loss": "loss", "trainer.learning_rate": "learning_rate", "predictor": "predictor", "seed": "seed"}


def trial(loss: str, seed: str, mass: float, status: str = "FINISHED", **more: str) -> Trial:
    metrics = {"test/mass": mass, "test/recall": mass - 0.2, "predictor/parameters": 119_523.0, "val/best_mass": mass}
    return Trial(
        {"predictor.loss": loss, **more, "seed": seed}, status, metrics if status == "FINISHED" else {}, "run"
    )


TRIALS = [
    trial("kl", "0", 0.95),
    trial("kl", "1", 0.94),
    trial("kl", "2", 0.96),
    trial("bce", "0", 0.90),
    trial("bce", "1", 0.0, "FAILED"),
]


def test_means_have_the_t_interval() -> None:
    values = [0.95, 0.94, 0.96]
    mean = mean_over_seeds(values)
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert mean.value == pytest.approx(0.95)
    assert (mean.value - mean.half, mean.value + mean.half) == pytest.approx((low, high), abs=1e-12)
    assert math.isnan(mean_over_seeds([0.5]).half)


@pytest.mark.parametrize("count", [2, 11, 31, 100])
def test_quantiles_are_students(count: int) -> None:
    values = np.arange(count) / 7
    wanted = stats.t.ppf(0.975, count - 1) * stats.sem(values)
    assert mean_over_seeds(list(values)).half == pytest.approx(wanted, rel=1e-12)


def test_seeds_are_one_row_and_a_failed_one_is_counted() -> None:
    found = cells(TRIALS)
    assert [(cell.choices["predictor.loss"], cell.finished, cell.planned) for cell in found] == [
        ("kl", 3, 3),
        ("bce", 1, 2),
    ]
    rows = sweep_report.summary_rows(TRIALS, NAMES)
    assert rows[0] == ["loss", "seeds", "recall@K", "mass@K", "parameters"]
    assert rows[1] == ["kl", "3", "0.750 ± 0.025", "0.950 ± 0.025", "119,523"]
    assert rows[2] == ["bce", "1 of 2", "0.700", "0.900", "119,523"]


def test_without_a_result_there_is_a_dash_and_no_figure() -> None:
    lost = [trial("kl", "0", 0.0, "FAILED"), trial("bce", "0", 0.0, "not run")]
    assert sweep_report.summary_rows(lost, NAMES) == [["loss", "seeds"], ["kl", "0 of 1"], ["bce", "0 of 1"]]
    assert sweep_report.figure(lost, NAMES) is None
    rows = sweep_report.summary_rows([*TRIALS[:3], *lost[1:]], NAMES)
    assert rows[2] == ["bce", "0 of 1", "-", "-", "-"]


def test_seed_alone_is_one_row() -> None:
    trials = [Trial({"seed": str(n)}, "FINISHED", {"test/mass": 0.9 + n / 100}) for n in range(2)]
    assert [row[:2] for row in sweep_report.summary_rows(trials, NAMES)] == [["settings", "seeds"], ["as given", "2"]]
    assert sweep_report.summary_metrics(trials, NAMES)["mean/test/mass"] == pytest.approx(0.905)


def test_metrics_of_the_parent_have_names_that_mlflow_takes() -> None:
    values = sweep_report.summary_metrics(TRIALS, NAMES)
    assert values["mean/test/mass/loss-kl"] == pytest.approx(0.95)
    assert values["mean/test/mass_low/loss-kl"] == pytest.approx(0.95 - 0.02484, abs=1e-4)
    assert "mean/test/mass_low/loss-bce" not in values  # one seed
    assert "mean/predictor/parameters_low/loss-kl" not in values  # a count
    odd = [Trial({"model.scr.edit_layers": "[0,2]", "seed": "0"}, "FINISHED", {"test/mass": 1.0})]
    assert list(sweep_report.summary_metrics(odd, {"model.scr.edit_layers": "edit_layers"})) == [
        "mean/test/mass/edit_layers--0-2-"
    ]


def test_files_hold_every_child_and_every_mean(tmp_path: Path) -> None:
    files = sweep_report.write(tmp_path, TRIALS, NAMES, "losses")
    assert [file.name for file in files] == ["summary.md", "summary.csv", "children.csv", "summary.png"]
    text = files[0].read_text()
    assert "| kl | 3 |" in text and "| bce | 1 | FAILED | run |" in text and "Student's t" in text
    means = list(csv.DictReader(files[1].read_text().splitlines()))
    assert float(means[0]["test/mass"]) == pytest.approx(0.95) and means[1]["test/mass_low"] == ""
    children = list(csv.DictReader(files[2].read_text().splitlines()))
    assert len(children) == 5 and children[4]["status"] == "FAILED" and children[4]["test/mass"] == ""
    assert float(children[2]["test/mass"]) == 0.96


@pytest.mark.parametrize(
    ("keys", "panels", "labels"),
    [
        ({"predictor.loss": ["kl", "bce"]}, 2, 0),
        ({"trainer.learning_rate": ["1e-4", "1e-3", "1e-2"]}, 2, 0),
        ({"predictor.loss": ["kl", "bce", "mse_log"], "predictor": ["default", "paper"]}, 2, 2),
        (
            {"predictor.loss": ["kl", "bce", "x"], "predictor": ["a", "b"], "trainer.learning_rate": ["1", "2"]},
            4,
            2,
        ),
    ],
)
def test_the_figure_shows_one_to_three_keys(keys: dict[str, list[str]], panels: int, labels: int) -> None:
    points: list[dict[str, str]] = [{}]
    for key, values in keys.items():
        points = [{**point, key: value} for point in points for value in values]
    trials = [
        Trial({**point, "seed": str(seed)}, "FINISHED", {"test/mass": 0.9 + 0.01 * seed, "test/recall": 0.7})
        for point in points
        for seed in range(2)
    ]
    figure = sweep_report.figure(trials, NAMES)
    assert figure is not None and len(figure.axes) == panels
    assert sum(len(legend.get_texts()) for legend in figure.legends) == labels
    drawn = figure.axes[0].get_lines()
    seeds = [line for line in drawn if np.size(line.get_ydata()) == 2 and line.get_alpha()]
    shown = len(points) // (panels // 2)
    assert len(seeds) == shown and np.asarray(seeds[0].get_ydata()) == pytest.approx([0.9, 0.91])
    assert (figure.axes[0].get_xscale() == "log") == ("1e-4" in keys.get("trainer.learning_rate", []))
