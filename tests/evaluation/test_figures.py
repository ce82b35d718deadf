from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from evaluation.figures import MapExample, map_example, reliability_figure, source_maps_figure
from predictor.calibration import ConfidenceRows, calibrate
from predictor.settings import PredictorSettings
from scr_runtime.config import SCRConfig
from scr_runtime.rule import source_rule

SCR = SCRConfig(num_sources=4)
QUESTION = "Is there a $5 note in the image? It costs $5."


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=40)
    return buffer.getvalue()


def _example(rows: int = 6, columns: int = 8, seed: int = 0, scr: SCRConfig = SCR) -> MapExample:
    generator = np.random.default_rng(seed)
    image = generator.integers(0, 255, (60, 90, 3), dtype=np.uint8)
    attention = generator.random(rows * columns)
    attention[0] = 1e5  # a sink on the border
    scores = np.log(attention) + generator.normal(size=rows * columns)
    return map_example(image, attention, scores, source_rule(scr, (rows, columns)), QUESTION)


def test_example_keeps_the_border_out() -> None:
    example = _example()
    assert example.true_map.shape == example.predicted_map.shape == (6, 8)
    assert np.isnan(example.true_map[0]).all() and np.isnan(example.predicted_map[:, -1]).all()
    assert np.nansum(example.true_map) == pytest.approx(1, abs=1e-5)
    assert np.nansum(example.predicted_map) == pytest.approx(1, abs=1e-5)
    assert len(example.true_sources) == len(example.chosen_sources) == 4
    assert example.true_sources[0] == np.nanargmax(example.true_map)
    assert example.chosen_sources[0] == np.nanargmax(example.predicted_map)


def test_sources_are_those_of_the_rule() -> None:
    for scr in (SCRConfig(source_fraction=0.2), SCRConfig(num_sources=6, suppress_claimed=True)):
        example, rule = _example(scr=scr), source_rule(scr, (6, 8))
        scores = torch.from_numpy(example.predicted_map).view(1, -1).nan_to_num(0.0)
        assert example.chosen_sources.tolist() == rule.choose(scores)[0].tolist()
        assert len(example.true_sources) == rule.k


@pytest.mark.parametrize("count", [1, 4])
def test_source_maps(count: int) -> None:
    figure = source_maps_figure([_example(seed=seed) for seed in range(count)])
    assert _png(figure).startswith(b"\x89PNG")
    titles = [subfigure.get_suptitle() for subfigure in figure.subfigs]
    assert titles == [QUESTION] * count
    assert all(len(subfigure.axes) == 5 for subfigure in figure.subfigs)  # four panels and a scale


def test_hits_misses_and_extras_are_marked() -> None:
    example = _example()
    axes = source_maps_figure([example]).subfigs[0].axes[3]
    true, chosen = set(example.true_sources.tolist()), set(example.chosen_sources.tolist())
    assert true != chosen and true & chosen
    assert sum(patch.get_fill() for patch in axes.patches) == len(true & chosen)
    assert sum(not patch.get_fill() for patch in axes.patches) == len(true - chosen)
    assert len(axes.lines) == len(chosen - true)
    assert f"{len(true & chosen)} of 4 hit" in axes.get_title(loc="left")


def test_each_row_has_a_scale_with_values_for_both_of_its_maps() -> None:
    examples = [_example(seed=seed) for seed in range(2)]
    figure = source_maps_figure(examples)
    _png(figure)
    for subfigure, example in zip(figure.subfigs, examples, strict=True):
        *panels, scale = subfigure.axes
        top = max(np.nanmax(example.true_map), np.nanmax(example.predicted_map))
        assert scale.get_xlim() == pytest.approx((0, top))
        assert scale.get_xlabel() == "a patch's share of the attention"
        assert all(text.get_text().endswith("%") for text in scale.get_xticklabels()) and len(scale.get_xticks()) > 2
        for axes, values in ((panels[1], example.true_map), (panels[2], example.predicted_map)):
            drawn: Any = axes.images[-1]
            assert drawn.norm.vmax == pytest.approx(top)
            assert drawn.get_array().count() == np.isfinite(values).sum()


def test_the_figure_says_what_the_grey_border_is() -> None:
    for scr, border in ((SCR, True), (SCRConfig(num_sources=4, exclude_border=False), False)):
        (legend,) = source_maps_figure([_example(scr=scr)]).legends
        assert ("grey border is never a source" in legend.get_title().get_text()) == border


def test_source_maps_need_an_example() -> None:
    with pytest.raises(ValueError, match="at least one"):
        source_maps_figure([])


def test_reliability() -> None:
    generator = np.random.default_rng(0)
    gaps = generator.gamma(1.0, 0.2, (200, 8))
    hits = (generator.random((200, 8)) < 1 / (1 + np.exp(-10 * gaps))).astype(float)
    rows = ConfidenceRows(gaps, hits)
    figure = reliability_figure(calibrate(rows, PredictorSettings()), rows)
    assert _png(figure).startswith(b"\x89PNG")
    assert len(figure.axes) == 2
    curves = [line for line in figure.axes[0].lines if "ECE" in str(line.get_label())]
    assert len({str(line.get_marker()) for line in curves}) == 3  # told apart without colours


def test_leaves_pyplot_and_mlflow_alone() -> None:
    code = """
import sys
import numpy as np
import evaluation.report, evaluation.sweep_report, predictor.baselines, predictor.module
from evaluation.figures import reliability_figure
from predictor.calibration import ConfidenceRows, calibrate
from predictor.settings import PredictorSettings
rows = ConfidenceRows(np.random.rand(40, 8), np.random.rand(40, 8).round())
reliability_figure(calibrate(rows, PredictorSettings()), rows)
from matplotlib import pyplot
print(pyplot.get_fignums(), "mlflow" in sys.modules)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] False"
