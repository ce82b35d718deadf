"""Figures of a fit: maps and sources over test images, and how far the confidence can be trusted.

They take plain arrays and return `matplotlib.figure.Figure` objects that no pyplot state knows, so they are
safe in any process and need no display.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import ArrayLike

from predictor.calibration import Calibration, ConfidenceRows
from predictor.losses import normalised_target
from predictor.reliability import expected_calibration_error, reliability_bins, risk_coverage
from scr_runtime.rule import SourceRule

_HIT, _MISSED, _EXTRA = "#00a087", "#f2a900", "#d1478f"
_INK, _MUTED = "#222222", "#8a8a8a"


def _map_colours() -> ListedColormap:
    """Colours of a map, from no attention to the largest of a row: what gets less lets more of the picture through."""
    share = np.linspace(0, 1, 512)
    colours = colormaps["inferno"](share**0.6)  # small differences show
    colours[:, 3] = 0.25 + 0.7 * np.sqrt(share)
    return ListedColormap(colours)


_COLOURS = _map_colours()


@dataclass(frozen=True)
class MapExample:
    """One row of `source_maps_figure`."""

    image: np.ndarray
    """[H, W, 3] uint8, exactly the part of the picture that the patch grid covers."""
    true_map: np.ndarray
    """[rows, columns] two-pass attention, summing to 1 over the eligible patches; nan elsewhere."""
    predicted_map: np.ndarray
    """[rows, columns] softmax of the scores over the eligible patches; nan elsewhere."""
    true_sources: np.ndarray
    """[K] patch indices that two-pass chooses."""
    chosen_sources: np.ndarray
    """[K] patch indices that the predictor chooses."""
    title: str
    """The question."""


def map_example(image: ArrayLike, attention: ArrayLike, scores: ArrayLike, rule: SourceRule, title: str) -> MapExample:
    """Builds a `MapExample` from what a batch and a predictor give.

    Args:
        image: [H, W, 3] uint8, the part of the picture that the grid covers.
        attention: [N] true map on any scale.
        scores: [N] of the predictor.
        rule: How sources are chosen on the patch grid.
        title: The question.
    """
    truth = torch.as_tensor(np.asarray(attention, dtype=np.float32))[None]  # [1, N]
    logits = torch.as_tensor(np.asarray(scores, dtype=np.float32))[None]  # [1, N]
    blank = ~rule.eligible[None]
    predicted = logits.masked_fill(blank, -torch.inf).softmax(dim=-1)
    target = normalised_target(truth, rule.eligible)
    return MapExample(
        image=np.asarray(image),
        true_map=target.masked_fill(blank, torch.nan).view(rule.grid).numpy(),
        predicted_map=predicted.masked_fill(blank, torch.nan).view(rule.grid).numpy(),
        true_sources=rule.choose(truth)[0].numpy(),
        chosen_sources=rule.choose(logits)[0].numpy(),
        title=title,
    )


def source_maps_figure(examples: Sequence[MapExample]) -> Figure:
    """Draws, for each example: the image, the two-pass map, the predicted map, and both choices of sources.

    The two maps of a row share one colour scale, which stands below them. Hits are filled, missed two-pass sources are
    framed, sources that two-pass would not choose are crossed out.

    Raises:
        ValueError: No example.
    """
    if not examples:
        raise ValueError("source_maps_figure needs at least one example.")
    figure = Figure(figsize=(11, 3.5 * len(examples) + 0.5), layout="constrained", facecolor="white")
    rows = figure.subfigures(len(examples), 1, squeeze=False, hspace=0.02)[:, 0]
    for subfigure, example in zip(rows, examples, strict=True):
        style: dict[str, Any] = {"fontsize": 12, "color": _INK, "weight": "bold"}
        subfigure.suptitle(example.title, x=0.012, ha="left", parse_math=False, **style)
        axes = subfigure.subplots(1, 4)
        scale = Normalize(0, float(max(np.nanmax(example.true_map), np.nanmax(example.predicted_map))))
        hits = np.intersect1d(example.true_sources, example.chosen_sources)
        mass = example.true_map.flat[example.chosen_sources].sum() / max(
            example.true_map.flat[example.true_sources].sum(), np.finfo(np.float32).tiny
        )
        _show_image(axes[0], example, "image")
        _show_map(axes[1], example, example.true_map, scale, "two-pass map")
        _show_map(axes[2], example, example.predicted_map, scale, "predicted map")
        _show_scale(subfigure, list(axes[1:3]), scale)
        label = f"sources: {len(hits)} of {len(example.true_sources)} hit, {mass:.0%} of the mass"
        _show_image(axes[3], example, label, dim=0.55)
        _mark_sources(axes[3], example)
    border = any(np.isnan(example.true_map).any() for example in examples)
    figure.legend(
        title="The grey border is never a source." if border else None,
        title_fontsize=10,
        handles=[
            Patch(facecolor=_HIT, edgecolor="white", label="hit: both choose it"),
            Patch(facecolor="none", edgecolor=_MISSED, linewidth=2, label="missed: two-pass only"),
            Line2D([], [], color=_EXTRA, marker="x", ls="none", mew=2.5, ms=8, label="extra: predictor only"),
        ],
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=10,
    )
    return figure


def reliability_figure(calibration: Calibration, rows: ConfidenceRows) -> Figure:
    """Draws the reliability diagram and the risk-coverage curve of held-out rows.

    Args:
        calibration: As exported; its threshold is where `auto` falls back to two-pass.
        rows: Rows that it was not fitted on.
    """
    figure = Figure(figsize=(10.5, 4.6), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    _draw_reliability(left, calibration, rows)
    _draw_coverage(right, calibration, rows)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.legend(frameon=False, fontsize=9)
    return figure


def _draw_reliability(axes: Axes, calibration: Calibration, rows: ConfidenceRows) -> None:
    tempered = rows.raw(calibration.temperature)
    axes.plot([0, 1], [0, 1], color=_MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    kinds = (
        (rows.raw(), _MUTED, "s", "raw"),
        (tempered, _MISSED, "^", "temperature"),
        (calibration(tempered), _HIT, "o", "isotonic"),
    )
    for values, colour, marker, name in kinds:
        mean_confidence, mean_recall, _ = reliability_bins(values, rows.recall)
        label = f"{name}, ECE {expected_calibration_error(values, rows.recall):.3f}"
        axes.plot(mean_confidence, mean_recall, f"{marker}-", color=colour, markersize=6, linewidth=1.6, label=label)
    threshold = calibration.threshold
    axes.axvline(threshold, color=_EXTRA, linewidth=1.4, label=f"fallback below {threshold:.2f}")
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="true share of sources (recall)")
    axes.set_aspect("equal")
    axes.set_title("Reliability on held-out maps", loc="left", fontsize=11)


def _draw_coverage(axes: Axes, calibration: Calibration, rows: ConfidenceRows) -> None:
    confidence = calibration(rows.raw(calibration.temperature))
    coverage, risk = risk_coverage(confidence, rows.recall)
    kept, mean = float((confidence >= calibration.threshold).mean()), rows.recall.mean()
    axes.plot(coverage, 1 - risk, color=_HIT, linewidth=2, label="most confident first")
    axes.axhline(mean, color=_MUTED, linewidth=1, linestyle=(0, (4, 3)), label="in random order")
    axes.axvline(kept, color=_EXTRA, linewidth=1.4, label=f"threshold keeps {kept:.0%}")
    low = float(np.floor(10 * min(mean, (1 - risk).min())) / 10)
    axes.set(xlim=(0, 1), ylim=(low - 0.05, 1.02))
    axes.set(xlabel="share of maps that stay one-pass", ylabel="their mean recall")
    axes.set_title("Recall against coverage", loc="left", fontsize=11)


def _show_image(axes: Axes, example: MapExample, title: str, dim: float = 0.0) -> None:
    """The picture in units of patches, mixed with white by `dim`."""
    image = example.image.astype(np.float32) / 255
    rows, columns = example.true_map.shape
    height, width = image.shape[:2]
    axes.imshow(
        image * (1 - dim) + dim,
        extent=(0, columns, rows, 0),
        aspect=(height / rows) / (width / columns),
        interpolation="nearest",
    )
    axes.set(xticks=[], yticks=[], xlim=(0, columns), ylim=(rows, 0))
    axes.set_title(title, fontsize=9.5, color=_INK, loc="left")
    for spine in axes.spines.values():
        spine.set(color="#cccccc", linewidth=0.8)


def _show_map(axes: Axes, example: MapExample, values: np.ndarray, scale: Normalize, title: str) -> None:
    """A map over the grey picture; patches that can be no sources stay grey."""
    _show_image(axes, example, title)
    rows, columns = values.shape
    grey = example.image.astype(np.float32).mean(axis=-1) / 255
    place: dict[str, Any] = {"extent": (0, columns, rows, 0), "aspect": axes.get_aspect(), "interpolation": "nearest"}
    axes.imshow(grey, cmap="gray", vmin=-0.6, vmax=1.6, **place)
    axes.imshow(np.ma.masked_invalid(values), cmap=_COLOURS, norm=scale, **place)


def _show_scale(subfigure: SubFigure, axes: list[Axes], scale: Normalize) -> None:
    """The colours of two maps with their values, over the grey of a picture."""
    bar = subfigure.colorbar(
        ScalarMappable(scale, _COLOURS),
        ax=axes,
        location="bottom",
        shrink=0.62,
        aspect=38,
        pad=0.015,
        ticks=MaxNLocator(4),
        format=FuncFormatter(lambda share, _: f"{100 * share:g} %"),
    )
    bar.ax.set_facecolor("#808080")
    bar.ax.tick_params(labelsize=8, length=2, color=_MUTED)
    bar.set_label("a patch's share of the attention", fontsize=8.5, color=_INK)
    bar.outline.set(edgecolor="#cccccc", linewidth=0.8)


def _mark_sources(axes: Axes, example: MapExample) -> None:
    columns = example.true_map.shape[1]
    true, chosen = set(example.true_sources.tolist()), set(example.chosen_sources.tolist())
    for patch in sorted(true | chosen):
        row, column = divmod(patch, columns)
        if patch in true and patch in chosen:
            hit: dict[str, Any] = {"facecolor": _HIT, "edgecolor": "white", "linewidth": 1, "alpha": 0.85}
            axes.add_patch(Rectangle((column, row), 1, 1, **hit))
        elif patch in true:
            missed: dict[str, Any] = {"fill": False, "edgecolor": _MISSED, "linewidth": 2.2}
            axes.add_patch(Rectangle((column + 0.08, row + 0.08), 0.84, 0.84, **missed))
        else:
            axes.plot(column + 0.5, row + 0.5, "x", color=_EXTRA, markersize=8, markeredgewidth=2.5)
