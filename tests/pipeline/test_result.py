"""What a run prints at its end fits the terminal."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from configs import load_config
from pipeline.folders import RunFolder
from pipeline.result import fit_table, last_line, print_result
from pipeline.stages import Fit, Packed, Result
from predictor.batch import SourceCount
from predictor.metrics import METRICS, Interval
from scr_runtime.config import SCRConfig

NOTHING: Any = None


def result(asked: int) -> Result:
    intervals = dict.fromkeys(METRICS, Interval(0.5, 0.4, 0.6))
    sources = SourceCount.of([(8, 8)], SCRConfig(num_sources=asked))
    fit = Fit(NOTHING, sources, intervals, {"other prompts (reference)": intervals})
    exported: Any = SimpleNamespace(predictor=SimpleNamespace(count_parameters=lambda: 123_456))
    confidence = {"ece": 0.01, "ece_temperature": 0.02, "ece_raw": 0.03, "fallback": 0.2}
    return Result(fit, Packed(exported, NOTHING, confidence), None)


@pytest.mark.parametrize("width", [80, 100])
def test_every_line_fits_and_the_link_is_whole(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    config = load_config(["runs_dir=runs", "model.scr.num_sources=100"])
    print_result(config, RunFolder(Path("runs/fits/scene-llava/20261122-040000")), result(100), "1")
    lines = capsys.readouterr().out.splitlines()
    link = "http://127.0.0.1:5000/#/experiments/1/runs?workflowType=machine_learning&viewStateShareKey=scr"
    assert link in lines and all(len(line) <= width for line in lines if line != link)
    assert "num_sources=100 was asked: at most half of a grid's eligible patches are used." in lines
    assert any("(123,456 parameters)" in line for line in lines)


def test_the_last_line_says_that_it_is_a_trials() -> None:
    found = result(6)
    found.fit.floors["position"] = dict.fromkeys(METRICS, Interval(0.1, 0.1, 0.2))
    verdict = "No answers were compared; the predictor beats a map of positions (0.500 of the attention recovered, "
    assert last_line(load_config(), found) == f"{verdict}against 0.100)."
    assert last_line(load_config(["trainer=quick"]), found).endswith("(A trial: fit the whole before you decide.)")


def test_the_table_of_the_fit_is_the_same_for_terminal_and_report() -> None:
    table = fit_table(load_config(["model.scr.num_sources=6", "harvest.test=7"]), result(6))
    assert table.title == "The predictor on 7 test images, K = 6 (16.7% of the eligible patches)."
    assert [row[0] for row in table.rows] == ["scores from", "other prompts (reference)", "predictor"]
    assert len(table.notes) == 1 and "20% of the maps under auto's threshold" in table.confidence
