"""Reports a sweep: one row per combination with means over seeds, the same as a figure, and stable metric names.

Means come with 95 % intervals of Student's t over seeds: they say how much another seed would move the mean, on these
very images. How much other images would move it, the intervals of each child say.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats

from evaluation.tables import markdown
from scr_runtime.files import whole_file, write_file

SEED = "seed"
HEADLINES = {
    "test/recall": ("recall@K", 3),
    "test/ndcg": ("NDCG@K", 3),
    "test/mass": ("mass@K", 3),
    "test/spearman": ("Spearman", 3),
    "test/iou": ("IoU", 3),
    "test/confidence/ece": ("ECE", 3),
    "eval/one-pass/edit_kept": ("edit kept", 3),
    "eval/one-pass/effect_kept": ("effect kept", 3),
    "eval/auto/fallback": ("fallback", 3),
    "eval/auto_30/error": ("distance at 30 % fallback", 3),
    "predictor/parameters": ("parameters", 0),
}
"""What the summary shows, where a run has it: metric -> (column, digits)."""
NOTE = "Means over seeds, ± half of the 95 % interval (Student's t)."
_DRAWN = ("test/mass", "test/recall", "eval/one-pass/edit_kept")
_COLOURS = ("#1d4ed8", "#059669", "#d97706", "#b91c1c", "#7c3aed", "#0891b2", "#be185d", "#4b5563")


@dataclass(frozen=True)
class Trial:
    """One child of a sweep, as far as it came.

    Attributes:
        choices: Swept key -> value, as typed.
        status: FINISHED, FAILED, or "not run".
        metrics: Its numbers; empty unless it finished.
        run_id: Its MLflow run, if it has one.
    """

    choices: Mapping[str, str]
    status: str
    metrics: Mapping[str, float]
    run_id: str = ""


@dataclass(frozen=True)
class Mean:
    """A mean over seeds.

    Attributes:
        value: The mean.
        half: Half the width of its 95 % interval; nan for a single seed.
        values: What it is made of.
    """

    value: float
    half: float
    values: tuple[float, ...]


@dataclass(frozen=True)
class Cell:
    """All seeds of one combination of the other keys."""

    choices: Mapping[str, str]
    finished: int
    planned: int
    means: Mapping[str, Mean]


def headline(metrics: Mapping[str, float]) -> str:
    """The headline numbers of one child, in one line."""
    shown = ((label, metrics[name], digits) for name, (label, digits) in HEADLINES.items() if name in metrics)
    return "  ".join(f"{label} {value:,.{digits}f}" for label, value, digits in shown)


def mean_over_seeds(values: Sequence[float]) -> Mean:
    """Mean with the half-width of its 95 % t interval."""
    count = len(values)
    if count < 2:
        return Mean(float(values[0]), math.nan, tuple(values))
    half = stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / math.sqrt(count)
    return Mean(float(np.mean(values)), float(half), tuple(values))


def cells(trials: Sequence[Trial]) -> list[Cell]:
    """Groups trials that differ in their seed only, in order of appearance."""
    groups: dict[tuple[tuple[str, str], ...], list[Trial]] = {}
    for trial in trials:
        key = tuple((name, value) for name, value in trial.choices.items() if name != SEED)
        groups.setdefault(key, []).append(trial)
    result = []
    for key, members in groups.items():
        finished = [trial for trial in members if trial.status == "FINISHED"]
        names = [name for name in HEADLINES if finished and all(name in trial.metrics for trial in finished)]
        means = {name: mean_over_seeds([trial.metrics[name] for trial in finished]) for name in names}
        result.append(Cell(dict(key), len(finished), len(members), means))
    return result


def summary_rows(trials: Sequence[Trial], names: Mapping[str, str]) -> list[list[str]]:
    """Header, and one row per combination with its means.

    Args:
        trials: All children.
        names: Swept key -> how the column is called.
    """
    found = cells(trials)
    swept = _swept(trials)
    seeds = SEED in trials[0].choices
    shown = _headlines(found)
    header = [names[key] for key in swept] or ["settings"]
    rows = [[*header, *(["seeds"] if seeds else []), *(HEADLINES[name][0] for name in shown)]]
    for cell in found:
        row = [cell.choices[key] for key in swept] or ["as given"]
        if seeds:
            row.append(f"{cell.finished}" if cell.finished == cell.planned else f"{cell.finished} of {cell.planned}")
        rows.append(row + [_shown(cell.means.get(name), HEADLINES[name][1]) for name in shown])
    return rows


def _shown(mean: Mean | None, digits: int) -> str:
    if mean is None:
        return "-"
    if math.isnan(mean.half) or digits == 0:
        return f"{mean.value:,.{digits}f}"
    return f"{mean.value:.{digits}f} ± {mean.half:.{digits}f}"


def summary_metrics(trials: Sequence[Trial], names: Mapping[str, str]) -> dict[str, float]:
    """Means over seeds under ``mean/<metric>/<key-value ...>``, with ``_low`` and ``_high`` if there are several."""
    values = {}
    for cell in cells(trials):
        place = " ".join(f"{names[key]}-{value}" for key, value in cell.choices.items())
        suffix = "/" + "".join(c if c.isalnum() or c in "-_. " else "-" for c in place) if place else ""
        for name, mean in cell.means.items():
            values[f"mean/{name}{suffix}"] = mean.value
            if not math.isnan(mean.half) and HEADLINES[name][1]:  # counts have no interval
                values[f"mean/{name}_low{suffix}"] = mean.value - mean.half
                values[f"mean/{name}_high{suffix}"] = mean.value + mean.half
    return values


def figure(trials: Sequence[Trial], names: Mapping[str, str]) -> Figure | None:
    """Metric against swept value: a small point per seed, the mean with its interval beside it.

    The key with most values is the axis, the next one the colour, a third one the columns; further keys are in the
    colour's label. Numbers lie to scale, on a logarithmic axis if they span a factor of 20.

    Returns:
        None if no child has finished.
    """
    found = [cell for cell in cells(trials) if cell.means]
    drawn = [name for name in _DRAWN if any(name in cell.means for cell in found)]
    if not drawn:
        return None
    swept = _swept(trials)
    options = {key: list(dict.fromkeys(cell.choices[key] for cell in found)) for key in swept}
    order = sorted(swept, key=lambda key: -len(options[key]))  # stable: of equals, the first that was typed
    axis, facet = (order[0] if order else None), (order[2] if len(order) > 2 else None)
    rest = [key for key in order[1:] if key != facet]
    facets = options[facet] if facet else [""]
    lines = list(dict.fromkeys(tuple(cell.choices[key] for key in rest) for cell in found))
    ticks = options[axis] if axis else ["as given"]
    places, numeric = _places(ticks)
    result = Figure(
        figsize=(max(4.2, 0.9 * len(ticks) + 2.6) * len(facets) + 0.6, 2.9 * len(drawn)), layout="constrained"
    )
    FigureCanvasAgg(result)
    grid = result.subplots(len(drawn), len(facets), squeeze=False, sharex=True, sharey="row")
    for row, name in enumerate(drawn):
        for column, option in enumerate(facets):
            axes: Axes = grid[row][column]
            members = [cell for cell in found if name in cell.means and (not facet or cell.choices[facet] == option)]
            for number, line in enumerate(lines):
                own = [cell for cell in members if tuple(cell.choices[key] for key in rest) == line]
                shift = 0.0 if numeric or len(lines) == 1 else 0.5 * (number / (len(lines) - 1) - 0.5)
                at = [places[cell.choices[axis] if axis else ticks[0]] + shift for cell in own]
                label = " ".join(f"{names[key]}={value}" for key, value in zip(rest, line, strict=True))
                _draw(axes, at, [cell.means[name] for cell in own], _COLOURS[number % 8], label, numeric)
            _mark(axes, places, numeric)
            if row == len(drawn) - 1:
                axes.set_xlabel(names[axis] if axis else "")
            if row == 0 and facet:
                axes.set_title(f"{names[facet]}={option}", loc="left", fontsize=10)
            if column == 0:
                axes.set_ylabel(HEADLINES[name][0])
    if len(lines) > 1:
        handles, labels = grid[0][0].get_legend_handles_labels()
        result.legend(handles, labels, loc="outside lower center", ncols=min(len(lines), 4), frameon=False, fontsize=9)
    return result


def write(
    folder: Path,
    trials: Sequence[Trial],
    names: Mapping[str, str],
    title: str,
    answers: Sequence[Sequence[str]] = (),
) -> list[Path]:
    """Writes summary.md, summary.csv (means), children.csv (every number of every child) and, if any, summary.png.

    Args:
        folder: Where to; made as needed.
        trials: All children.
        names: Swept key -> how the column is called.
        title: Headline of the text.
        answers: Rows of a second table for the text.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in ("summary.md", "summary.csv", "children.csv", "summary.png")]
    second = f"\nAnswers of each model's best child:\n\n{markdown(answers)}\n" if answers else ""
    write_file(paths[0], (_summary_text(trials, names, title) + second).encode())
    write_file(paths[1], _csv(_mean_records(trials)))
    write_file(paths[2], _csv(_child_records(trials)))
    picture = figure(trials, names)
    if picture is None:
        return paths[:3]
    with whole_file(paths[3]) as stream:
        picture.savefig(stream, format="png", dpi=130)
    return paths


def _summary_text(trials: Sequence[Trial], names: Mapping[str, str], title: str) -> str:
    lines = [f"# {title}", "", markdown(summary_rows(trials, names))]
    if SEED in trials[0].choices:
        lines += ["", NOTE]
    lost = [[*trial.choices.values(), trial.status, trial.run_id] for trial in trials if trial.status != "FINISHED"]
    if lost:
        lines += ["", "Without a result:", "", markdown([[*trials[0].choices, "status", "run"], *lost])]
    return "\n".join([*lines, ""])


def _csv(records: Iterable[Sequence[Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(records)
    return text.getvalue().encode()


def _mean_records(trials: Sequence[Trial]) -> list[list[Any]]:
    """Header, and the means of each combination with the ends of their intervals; empty where there are none."""
    found, swept = cells(trials), _swept(trials)
    shown = _headlines(found)
    records: list[list[Any]] = [
        [*swept, "finished", "planned", *(f"{name}{end}" for name in shown for end in ("", "_low", "_high"))]
    ]
    for cell in found:
        record: list[Any] = [*(cell.choices[key] for key in swept), cell.finished, cell.planned]
        for name in shown:
            mean = cell.means.get(name)
            if mean is None:
                record += ["", "", ""]
            elif math.isnan(mean.half):
                record += [mean.value, "", ""]
            else:
                record += [mean.value, mean.value - mean.half, mean.value + mean.half]
        records.append(record)
    return records


def _child_records(trials: Sequence[Trial]) -> list[list[Any]]:
    """Header, and every number of every child."""
    columns = sorted({name for trial in trials for name in trial.metrics if not name.startswith("system/")})
    records: list[list[Any]] = [[*trials[0].choices, "status", "run", *columns]]
    for trial in trials:
        numbers = [trial.metrics.get(name, "") for name in columns]
        records.append([*trial.choices.values(), trial.status, trial.run_id, *numbers])
    return records


def _swept(trials: Sequence[Trial]) -> list[str]:
    """The swept keys but the seed."""
    return [key for key in trials[0].choices if key != SEED]


def _headlines(found: Sequence[Cell]) -> list[str]:
    """The headline metrics that some combination has."""
    return [name for name in HEADLINES if any(name in cell.means for cell in found)]


def _places(ticks: Sequence[str]) -> tuple[dict[str, float], bool]:
    """Value -> where it stands on the axis, and whether the values are numbers."""
    try:
        numbers = [float(tick) for tick in ticks]
    except ValueError:
        numbers = []
    if len(numbers) < 2 or not np.isfinite(numbers).all():
        return {tick: float(place) for place, tick in enumerate(ticks)}, False
    return dict(zip(ticks, numbers, strict=True)), True


def _mark(axes: Axes, places: Mapping[str, float], numeric: bool) -> None:
    """Ticks where the values are, and nothing that is not needed."""
    if numeric and min(places.values()) > 0 and max(places.values()) / min(places.values()) >= 20:
        axes.set_xscale("log")
    axes.set_xticks(list(places.values()), list(places))
    axes.minorticks_off()
    if not numeric:
        axes.set_xlim(-0.6, len(places) - 0.4)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)


def _draw(axes: Axes, at: Sequence[float], means: Sequence[Mean], colour: str, label: str, numeric: bool) -> None:
    """A small point per seed, and the means with their intervals; numbers are joined by a line."""
    beside = 0.0 if numeric else -0.06
    for place, mean in zip(at, means, strict=True):
        if len(mean.values) > 1:
            axes.plot([place + beside] * len(mean.values), mean.values, "o", color=colour, markersize=3.5, alpha=0.4)
    axes.errorbar(
        at,
        [mean.value for mean in means],
        yerr=[0 if math.isnan(mean.half) else mean.half for mean in means],
        fmt="o-" if numeric else "o",
        color=colour,
        markersize=6,
        linewidth=1.4,
        capsize=4,
        label=label,
    )
