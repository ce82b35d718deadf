"""Reports a sweep: one row per combination with means over seeds, the same as a figure, and stable metric names.

Means of three seeds or more come with 95 % intervals of Student's t over seeds: they say how much another seed would
move the mean, on these very images. How much other images would move it, the intervals of each child say. Intervals of
shares are computed on Fisher's z of 2 p - 1, so that none reaches beyond 0 or 1.
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
from matplotlib.ticker import MaxNLocator
from scipy import stats

from evaluation.tables import markdown, table
from scr_runtime.files import whole_file, write_file

DPI = 96
"""Of figures that MLflow shows: it shows them at their size, on pages that are some 1,150 pixels wide."""
SEED = "seed"
HEADLINES = {
    "test/recall": ("recall@K", 3, True),
    "test/mass": ("mass@K", 3, True),
    "test/confidence/ece": ("ECE", 3, True),
    "hr_vanilla": ("HR vanilla", 1, False),
    "hr_one_pass": ("HR one-pass", 1, False),
    "eval/one-pass/edit_kept": ("edit kept", 3, False),
    "eval/one-pass/effect_kept": ("effect kept", 3, False),
    "prefill_x": ("prefill", 2, False),
    "predictor/parameters": ("parameters", 0, False),
}
"""What the summary shows, where a run has it: metric -> (column, digits, whether it is a share of 1)."""
NOTE = "Means over seeds; in brackets, from three seeds on, the 95 % interval (Student's t; of shares, on Fisher's z)."
_DRAWN = ("test/mass", "test/recall", "eval/one-pass/edit_kept")
_FEWEST = 3  # seeds of an interval
_SPAN = 0.1  # of an axis, at least; every metric that is drawn is a share
_MARKERS = "osD^vP"  # besides the colours: they can be told apart without them
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#b8860b")  # Okabe and Ito's, without pale ones


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
        low: Lower end of its 95 % interval; nan for fewer than three seeds.
        high: Upper end.
        values: What it is made of.
    """

    value: float
    low: float
    high: float
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
    shown = ((label, metrics[name], digits) for name, (label, digits, _) in HEADLINES.items() if name in metrics)
    return "  ".join(f"{label} {value:,.{digits}f}" for label, value, digits in shown)


def mean_over_seeds(values: Sequence[float], share: bool = False) -> Mean:
    """Mean with its 95 % t interval; that of shares is computed on Fisher's z of 2 p - 1."""
    mean, count = float(np.mean(values)), len(values)
    if count < _FEWEST:
        return Mean(mean, math.nan, math.nan, tuple(values))
    scale = np.arctanh(np.clip(2 * np.asarray(values) - 1, -1 + 1e-9, 1 - 1e-9)) if share else np.asarray(values)
    half = stats.t.ppf(0.975, count - 1) * np.std(scale, ddof=1) / math.sqrt(count)
    ends = (float(np.mean(scale) - half), float(np.mean(scale) + half))
    low, high = ((math.tanh(end) + 1) / 2 for end in ends) if share else ends
    return Mean(mean, low, high, tuple(values))


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
        means = {
            name: mean_over_seeds([trial.metrics[name] for trial in finished], HEADLINES[name][2]) for name in names
        }
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


def summary_table(trials: Sequence[Trial], names: Mapping[str, str]) -> str:
    """The same as text for the terminal."""
    return table(summary_rows(trials, names), lead=max(1, len(_swept(trials))))


def _shown(mean: Mean | None, digits: int) -> str:
    if mean is None:
        return "-"
    if math.isnan(mean.low) or digits == 0:
        return f"{mean.value:,.{digits}f}"
    return f"{mean.value:.{digits}f} [{mean.low:.{digits}f}, {mean.high:.{digits}f}]"


def figure(trials: Sequence[Trial], names: Mapping[str, str], title: str) -> Figure | None:
    """A row per combination, a panel per metric: a small point per seed, and the mean with its interval.

    Returns:
        None if no child has finished.
    """
    found = [cell for cell in cells(trials) if cell.means]
    drawn = [name for name in _DRAWN if any(name in cell.means for cell in found)]
    if not drawn:
        return None
    swept = _swept(trials)
    labels = ["  ".join(f"{names[key]}={cell.choices[key]}" for key in swept) or "as given" for cell in found]
    kinds = list(dict.fromkeys(cell.choices[swept[0]] if swept else "" for cell in found))
    height = max(2.6, 0.36 * len(found) + 1.7)
    result = Figure(figsize=(3.4 * len(drawn) + 0.075 * max(map(len, labels)) + 0.6, height), layout="constrained")
    FigureCanvasAgg(result)
    result.suptitle(title, x=0.01, ha="left", fontsize=12, weight="bold", parse_math=False)
    grid = result.subplots(1, len(drawn), squeeze=False, sharey=True)[0]
    for axes, name in zip(grid, drawn, strict=True):
        for row, cell in enumerate(found):
            if name in cell.means:
                kind = kinds.index(cell.choices[swept[0]] if swept else "") % len(_MARKERS)
                _draw(axes, row, cell.means[name], _COLOURS[kind], _MARKERS[kind])
        low, high = axes.get_xlim()
        wider = max(_SPAN - (high - low), 0) / 2  # a small difference should not look like a large one
        axes.set_xlim(low - wider, high + wider)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_title(HEADLINES[name][0], loc="left", fontsize=10)
        axes.set_yticks(range(len(found)), labels, fontsize=9, parse_math=False)
        axes.set_ylim(len(found) - 0.4, -0.6)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.grid(color="#e5e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
    seeds = max(cell.finished for cell in found)
    note = "small: each seed; large: mean" + ", with its 95 % interval over seeds" * (seeds >= _FEWEST)
    result.supxlabel(note if seeds > 1 else "one seed: no interval", x=0.01, ha="left", fontsize=8.5, color="#4b5563")
    return result


def _draw(axes: Axes, row: int, mean: Mean, colour: str, marker: str) -> None:
    if len(mean.values) > 1:
        axes.plot(mean.values, [row + 0.2] * len(mean.values), marker, color=colour, markersize=3, alpha=0.5)
    if not math.isnan(mean.low):
        axes.plot([mean.low, mean.high], [row, row], "-", color=colour, linewidth=1.8)
    axes.plot([mean.value], [row], marker, color=colour, markersize=7)


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
    write_file(paths[0], markdown_text(trials, names, title, answers).encode())
    write_file(paths[1], _csv(_mean_records(trials)))
    write_file(paths[2], _csv(_child_records(trials)))
    picture = figure(trials, names, title)
    if picture is None:
        return paths[:3]
    with whole_file(paths[3]) as stream:
        picture.savefig(stream, format="png", dpi=DPI)
    return paths


def markdown_text(
    trials: Sequence[Trial], names: Mapping[str, str], title: str = "", answers: Sequence[Sequence[str]] = ()
) -> str:
    """Title if any, table of means, the children that have no result, and a second table of answers."""
    lines = [*([f"# {title}", ""] if title else []), markdown(summary_rows(trials, names))]
    if SEED in trials[0].choices:
        lines += ["", NOTE]
    lost = [[*trial.choices.values(), trial.status, trial.run_id] for trial in trials if trial.status != "FINISHED"]
    if lost:
        lines += ["", "Without a result:", "", markdown([[*trials[0].choices, "status", "run"], *lost])]
    if answers:
        lines += ["", "Answers of each model's best child:", "", markdown(answers)]
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
            elif math.isnan(mean.low):
                record += [mean.value, "", ""]
            else:
                record += [mean.value, mean.low, mean.high]
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
