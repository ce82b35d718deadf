"""Charts as SVG text, coloured by the page's own style: one row per method, a marker for each besides its colour."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from predictor.metrics import Interval

_MARKS = ("circle", "square", "diamond", "up", "down", "cross", "plus", "ring", "frame", "bar")
_ORDER = (
    "vanilla", "two-pass", "one-pass", "auto", "uniform", "swapped", "shift", "position", "dose-matched", "norm",
    "least", "noise", "4-connected", "radius-2", "vanilla-sampled", "online",
)  # fmt: skip
_ROW = 26
_WIDTH = 760

Points = Sequence[tuple[float, float]] | NDArray[np.float64]


def mark(name: str) -> tuple[str, str]:
    """Colour class and shape of a method, the same in every chart of every report."""
    base = name.split(":")[0].split("@")[0]
    place = _ORDER.index(base) if base in _ORDER else len(_ORDER)
    further = len(name) - len(base) and 1 + len(name) % 2
    return f"c{min(place, 7)}", _MARKS[(place + 3 * further) % len(_MARKS)]


def symbol(name: str, x: float, y: float, size: float = 5.0) -> str:
    """A method's marker."""
    colour, shape = mark(name)
    if shape in ("circle", "ring"):
        kind = "hollow" if shape == "ring" else "full"
        return f'<circle class="{colour} {kind}" cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}"/>'
    if shape in ("cross", "plus", "bar"):
        d, e = size, size * 0.9
        path = {"cross": f"M{x - e:.1f} {y - e:.1f}l{2 * e:.1f} {2 * e:.1f}m0 {-2 * e:.1f}l{-2 * e:.1f} {2 * e:.1f}",
                "plus": f"M{x - d:.1f} {y:.1f}H{x + d:.1f}M{x:.1f} {y - d:.1f}V{y + d:.1f}",
                "bar": f"M{x:.1f} {y - 1.3 * d:.1f}V{y + 1.3 * d:.1f}"}[shape]  # fmt: skip
        return f'<path class="{colour} line" d="{path}"/>'
    corners = {
        "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
        "frame": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
        "diamond": ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
        "up": ((0, -1.2), (1.15, 0.9), (-1.15, 0.9)),
        "down": ((0, 1.2), (1.15, -0.9), (-1.15, -0.9)),
    }[shape]
    points = " ".join(f"{x + size * dx:.1f},{y + size * dy:.1f}" for dx, dy in corners)
    return f'<polygon class="{colour} {"hollow" if shape == "frame" else "full"}" points="{points}"/>'


def forest(rows: Mapping[str, Interval], label: str, *, zero: bool, absolute: Mapping[str, str] | None = None) -> str:
    """A row per method: marker, interval, and its figures in words.

    Args:
        rows: Method -> value with interval, in percent points times 1/100.
        label: Of the axis.
        zero: Whether 0 is on the axis and drawn.
        absolute: Method -> a figure beside its label.
    """
    values = [100 * end for interval in rows.values() for end in interval if math.isfinite(end)] + [0.0] * zero
    ticks = nice_ticks(min(values, default=0.0), max(values, default=1.0))
    left, right, height = 178, 158, _ROW * len(rows) + 46
    span = _WIDTH - left - right

    def at(value: float) -> float:
        return left + span * (value - ticks[0]) / (ticks[-1] - ticks[0])

    parts = [_grid_x(ticks, at, 8, height - 36)]
    if zero:
        parts.append(f'<path class="zero" d="M{at(0):.1f} 4V{height - 36}"/>')
    for place, (name, interval) in enumerate(rows.items()):
        y = 8 + _ROW * (place + 0.5)
        shown = html.escape(name) + (f" ({absolute[name]})" if absolute and name in absolute else "")
        parts.append(f'<text class="name" x="{left - 14}" y="{y + 4:.1f}">{shown}</text>')
        if not math.isfinite(interval.mean):
            continue
        low, high, mean = (at(100 * end) for end in (interval.low, interval.high, interval.mean))
        parts.append(f'<path class="{mark(name)[0]} line" d="M{low:.1f} {y:.1f}H{high:.1f}"/>')
        parts.append(symbol(name, mean, y))
        sign = "+" if zero else ""
        figures = f"{100 * interval.mean:{sign}.1f} [{100 * interval.low:{sign}.1f}, {100 * interval.high:{sign}.1f}]"
        parts.append(f'<text class="figure" x="{_WIDTH - right + 12}" y="{y + 4:.1f}">{figures}</text>')
    parts.append(f'<text class="axis" x="{left + span / 2:.0f}" y="{height - 4}">{html.escape(label)}</text>')
    return _svg(_WIDTH, height, parts, label)


def scatter(points: Mapping[str, tuple[float, Interval]], x_label: str, y_label: str) -> str:
    """One marker per method with its interval of y, and a legend."""
    finite = {name: (x, y.mean) for name, (x, y) in points.items() if all(map(math.isfinite, (x, *y)))}
    if not finite:
        return ""
    width, height, left, top, right = 560, 340, 64, 14, 126
    xs, ys = ([points[name][0] for name in finite], [end for name in finite for end in points[name][1]])
    x_ticks, y_ticks = nice_ticks(min(xs), max(xs)), nice_ticks(min(ys), max(ys))

    def across(value: float) -> float:
        return left + (width - left - right) * (value - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])

    def up(value: float) -> float:
        return top + (height - top - 50) * (1 - (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]))

    parts = [_grid_x(x_ticks, across, top, height - 50), _grid_y(y_ticks, up, left, width - right)]
    for place, (name, (x, y)) in enumerate(finite.items()):
        low, high = (up(end) for end in points[name][1][1:])
        parts.append(f'<path class="{mark(name)[0]} line thin" d="M{across(x):.1f} {low:.1f}V{high:.1f}"/>')
        parts += [symbol(name, across(x), up(y), 6), _legend(name, width - right, top, place)]
    return _svg(
        width, height, [*parts, *_axes(x_label, y_label, left, width - right, height)], f"{y_label} against {x_label}"
    )


def _legend(name: str, left: float, top: float, place: int) -> str:
    """A line of a legend beside a chart that ends at `left`."""
    y = top + 12 + 20 * place
    return (
        symbol(name, left + 18, y - 4, 4.5) + f'<text class="note" x="{left + 30}" y="{y}">{html.escape(name)}</text>'
    )


def curves(lines: Mapping[str, Points], x_label: str, y_label: str, *, unit: bool) -> str:
    """Lines with a legend; each carries its method's marker at a few places. Lines that coincide share the stroke.

    Args:
        lines: Name -> points (x, y).
        x_label: Of the axis.
        y_label: Of the axis.
        unit: Whether both axes run from 0 to 1, with the diagonal.
    """
    height, left, top = 400 if unit else 320, 64, 14
    right = max(150, 40 + 8 * max(map(len, lines), default=0))
    width = 410 + right
    listed = {name: [(float(x), float(y)) for x, y in points] for name, points in lines.items()}
    every = [point for points in listed.values() for point in points if all(map(math.isfinite, point))]
    if not every:
        return ""
    x_ticks = nice_ticks(0, 1) if unit else nice_ticks(min(x for x, _ in every), max(x for x, _ in every))
    y_ticks = nice_ticks(0, 1) if unit else nice_ticks(min(0.0, *(y for _, y in every)), max(y for _, y in every))

    def across(value: float) -> float:
        return left + (width - left - right) * (value - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])

    def up(value: float) -> float:
        return top + (height - top - 50) * (1 - (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]))

    parts = [_grid_x(x_ticks, across, top, height - 50), _grid_y(y_ticks, up, left, width - right)]
    if unit:
        parts.append(f'<path class="zero dashed" d="M{across(0):.1f} {up(0):.1f}L{across(1):.1f} {up(1):.1f}"/>')
    drawn = {
        name: [(across(x), up(y)) for x, y in _thinned([point for point in points if all(map(math.isfinite, point))])]
        for name, points in listed.items()
    }
    for place, (name, kept) in enumerate(drawn.items()):
        alike = [other for other in drawn if _coincide(drawn[other], kept)]
        number = alike.index(name) if kept else 0
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in kept)
        dashes = f' style="stroke-dasharray:9 {9 * (len(alike) - 1)};stroke-dashoffset:{-9 * number}"' * (number > 0)
        parts.append(f'<path class="{mark(name)[0]} line thin butt"{dashes} d="M{path}"/>')
        step = max(len(kept) // 5, len(alike), 1)
        parts += [symbol(name, x, y, 3.5) for x, y in kept[number * step // max(len(alike), 1) :: step]]
        parts.append(_legend(name, width - right, top, place))
    if any("stroke-dasharray" in part for part in parts):
        y = top + 12 + 20 * len(drawn)
        parts.append(f'<text class="note" x="{width - right + 12}" y="{y}">dashed: equal lines</text>')
    return _svg(
        width, height, [*parts, *_axes(x_label, y_label, left, width - right, height)], f"{y_label} against {x_label}"
    )


def _coincide(one: Points, other: Points, most: float = 2.0) -> bool:
    """Whether two lines lie less than `most` pixels apart on average, at equal shares of their lengths."""
    if len(one) == 0 or len(other) == 0:
        return False
    places: list[NDArray[np.float64]] = []
    for line in (np.asarray(one), np.asarray(other)):
        lengths = np.concatenate([[0.0], np.hypot(*np.diff(line, axis=0).T).cumsum()])
        at = np.linspace(0, lengths[-1], 100)
        places.append(np.stack([np.interp(at, lengths, line[:, axis]) for axis in (0, 1)]))
    return bool(np.hypot(*(places[0] - places[1])).mean() < most)


def _thinned(points: list[tuple[float, float]], most: int = 160) -> list[tuple[float, float]]:
    step = max(len(points) // most, 1)
    return points[::step] + (points[-1:] if (len(points) - 1) % step else [])


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from at most `low` to at least `high`."""
    if not high > low:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(size * power for size in (1, 2, 2.5, 5, 10) if size * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 10) for number in range(first, max(last, first + 1) + 1)]


def _grid_x(ticks: Sequence[float], at: Callable[[float], float], top: float, bottom: float) -> str:
    places = [at(tick) for tick in ticks]
    lines = "".join(f"M{place:.1f} {top}V{bottom}" for place in places)
    texts = "".join(
        f'<text class="tick" x="{place:.1f}" y="{bottom + 16}">{tick:g}</text>'
        for tick, place in zip(ticks, places, strict=True)
    )
    return f'<path class="grid" d="{lines}"/>{texts}'


def _grid_y(ticks: Sequence[float], at: Callable[[float], float], left: float, right: float) -> str:
    places = [at(tick) for tick in ticks]
    lines = "".join(f"M{left} {place:.1f}H{right}" for place in places)
    texts = "".join(
        f'<text class="tick end" x="{left - 8}" y="{place + 4:.1f}">{tick:g}</text>'
        for tick, place in zip(ticks, places, strict=True)
    )
    return f'<path class="grid" d="{lines}"/>{texts}'


def _axes(x_label: str, y_label: str, left: float, right: float, height: float) -> list[str]:
    middle = (height - 50) / 2
    return [
        f'<text class="axis" x="{(left + right) / 2:.0f}" y="{height - 8}">{html.escape(x_label)}</text>',
        f'<text class="axis" transform="translate(14 {middle:.0f}) rotate(-90)">{html.escape(y_label)}</text>',
    ]


def _svg(width: int, height: int, parts: Sequence[str], title: str) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}" '
        f'style="max-width:{width}px">{"".join(parts)}</svg>'
    )
