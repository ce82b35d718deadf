"""What a run found is logged before the comparison, and K is reported as it was used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from configs import load_config
from data.datamodule import ShardDataModule
from evaluation.errors import EvaluationError
from pipeline import sweep
from pipeline.result import source_rows
from pipeline.stages import Fit, check_grids, has_unlabelled
from predictor.batch import SourceCount
from predictor.errors import FitError
from predictor.metrics import METRICS, Interval
from scr_runtime.config import SCRConfig
from tests.predictor.fitting import write_harvest


def test_what_a_fit_found_is_logged_before_the_comparison_which_may_fail(monkeypatch: pytest.MonkeyPatch):
    called: list[str] = []

    def stage(name: str, result: Any = None) -> Callable[..., Any]:
        return lambda *_: called.append(name) or result

    def fails(*_: Any) -> None:
        called.append("compare_answers")
        raise EvaluationError("the questions ended")

    monkeypatch.setattr(sweep.runs, "log_data", stage("log_data"))
    monkeypatch.setattr(sweep, "fit_predictor", stage("fit_predictor"))
    monkeypatch.setattr(sweep, "export", stage("export", SimpleNamespace(exported=None)))
    monkeypatch.setattr(sweep, "log_fit", stage("log_fit", "m-1"))
    monkeypatch.setattr(sweep, "compare_answers", fails)
    tracker: Any = SimpleNamespace(experiment=None, run_id="r")
    nothing: Any = SimpleNamespace(harvested=None)
    with pytest.raises(EvaluationError, match="the questions ended"):
        sweep.chain(nothing, nothing, nothing, tracker)
    assert called == ["log_data", "fit_predictor", "export", "log_fit", "compare_answers"]


def test_pictures_without_annotations_are_compared_unless_nothing_of_it_is_wanted():
    pictures = ["data=pictures", "data.root=/pictures"]
    assert has_unlabelled(load_config(pictures))
    for other in ("evaluation.benchmarks=[pope]", "harvest.test=1", "data.train_annotations=instances.json"):
        assert not has_unlabelled(load_config([*pictures, other]))
    assert not has_unlabelled(load_config(["evaluation.images=0"]))


def test_a_grid_without_inner_patches_ends_a_fit_before_it_begins(tmp_path: Path):
    """Harvests of before pictures like that were left out, and families with one grid for all images."""
    for name in ("shards", "narrow"):
        (tmp_path / name).mkdir()
    data = ShardDataModule(write_harvest(tmp_path / "shards"))  # grids of 4 x 4 and 3 x 4
    config = load_config(["model.scr.num_sources=1"])
    check_grids(config, data)
    narrow = ShardDataModule(write_harvest(tmp_path / "narrow", grids=((4, 4), (2, 6))))
    reason = r"image 3 of .*narrow: a grid of 2 x 6 patches.*model\.scr\.exclude_border=false.*harvest\.name"
    with pytest.raises(FitError, match=reason):
        check_grids(config, narrow)
    check_grids(load_config(["model.scr.num_sources=1", "model.scr.exclude_border=false"]), narrow)


@pytest.mark.parametrize(
    ("grids", "head"),
    [([(8, 8), (9, 7)], ["recall@6", "ndcg@6", "mass@6"]), ([(8, 8), (4, 4)], ["recall@K", "ndcg@K", "mass@K"])],
)
def test_the_table_names_k_where_it_is_one_number(grids: list[tuple[int, int]], head: list[str]):
    intervals = dict.fromkeys(METRICS, Interval(0.5, 0.4, 0.6))
    module: Any = None
    fit = Fit(module, SourceCount.of(grids, SCRConfig(num_sources=6)), intervals, {"random": intervals})
    rows = source_rows(fit)
    assert rows[0] == ["scores from", *head] and [row[0] for row in rows] == ["scores from", "random", "predictor"]
