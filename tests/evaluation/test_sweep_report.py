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
    assert (mean.low, mean.high) == pytest.approx((low, high), abs=1e-12)
    assert math.isnan(mean_over_seeds([0.5, 0.6]).low)  # two seeds: an interval of ± 12.7 standard errors


@pytest.mark.parametrize("count", [3, 11, 31, 100])
def test_quantiles_are_students(count: int) -> None:
    values = np.arange(count) / 7
    wanted = stats.t.ppf(0.975, count - 1) * stats.sem(values)
    mean = mean_over_seeds(list(values))
    assert (mean.high - mean.value, mean.value - mean.low) == pytest.approx((wanted, wanted), rel=1e-12)


@pytest.mark.parametrize("values", [[0.9, 0.99, 0.8], [0.0, 0.1, 0.02], [1.0, 1.0, 0.5]])
def test_the_interval_of_a_share_ends_within_0_and_1(values: list[float]) -> None:
    mean = mean_over_seeds(values, share=True)
    assert 0 <= mean.low < mean.value < mean.high <= 1
    narrow = mean_over_seeds([0.5, 0.51, 0.52], share=True)
    plain = mean_over_seeds([0.5, 0.51, 0.52])
    assert (narrow.low, narrow.high) == pytest.approx((plain.low, plain.high), abs=1e-4)  # the same where it is flat


def test_seeds_are_one_row_and_a_failed_one_is_counted() -> None:
    found = cells(TRIALS)
    assert [(cell.choices["predictor.loss"], cell.finished, cell.planned) for cell in found] == [
        ("kl", 3, 3),
        ("bce", 1, 2),
    ]
    rows = sweep_report.summary_rows(TRIALS, NAMES)
    assert rows[0] == ["loss", "seeds", "recall@K", "mass@K", "parameters"]
    assert rows[1] == ["kl", "3", "0.750 [0.724, 0.774]", "0.950 [0.919, 0.970]", "119,523"]
    assert rows[2] == ["bce", "1 of 2", "0.700", "0.900", "119,523"]


def test_without_a_result_there_is_a_dash_and_no_figure() -> None:
    lost = [trial("kl", "0", 0.0, "FAILED"), trial("bce", "0", 0.0, "not run")]
    assert sweep_report.summary_rows(lost, NAMES) == [["loss", "seeds"], ["kl", "0 of 1"], ["bce", "0 of 1"]]
    assert sweep_report.figure(lost, NAMES, "lost") is None
    rows = sweep_report.summary_rows([*TRIALS[:3], *lost[1:]], NAMES)
    assert rows[2] == ["bce", "0 of 1", "-", "-", "-"]


def test_seed_alone_is_one_row() -> None:
    trials = [Trial({"seed": str(n)}, "FINISHED", {"test/mass": 0.9 + n / 100}) for n in range(2)]
    assert [row[:2] for row in sweep_report.summary_rows(trials, NAMES)] == [["settings", "seeds"], ["as given", "2"]]


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


def test_the_figure_has_a_title_and_a_row_for_each_combination() -> None:
    points = [(loss, predictor) for loss in ("kl", "bce", "mse_log") for predictor in ("default", "paper")]
    trials = [
        Trial(
            {"predictor.loss": loss, "predictor": predictor, "seed": str(seed)},
            "FINISHED",
            {"test/mass": 0.9 + 0.01 * seed, "test/recall": 0.7},
        )
        for loss, predictor in points
        for seed in range(3)
    ]
    figure = sweep_report.figure(trials, NAMES, "scene-llava: losses")
    assert figure is not None and all(np.ptp(axes.get_xlim()) > 0.0999 for axes in figure.axes)
    assert len(figure.axes) == 2 and figure.get_suptitle() == "scene-llava: losses"
    left = figure.axes[0]
    assert [label.get_text() for label in left.get_yticklabels()][:2] == [
        "loss=kl  predictor=default", "loss=kl  predictor=paper",
    ]  # fmt: skip
    lines = left.get_lines()
    seeds = [line for line in lines if line.get_alpha()]
    assert len(seeds) == 6 and np.asarray(seeds[0].get_xdata()) == pytest.approx([0.9, 0.91, 0.92])
    assert len({str(line.get_marker()) for line in seeds}) == 3  # one for each loss, besides its colour
    assert len([line for line in lines if line.get_linestyle() == "-"]) == 6
    two = sweep_report.figure([trial for trial in trials if trial.choices["seed"] != "2"], NAMES, "two seeds")
    assert two is not None and not [line for line in two.axes[0].get_lines() if line.get_linestyle() == "-"]
