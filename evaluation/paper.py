"""The paper's figures, to stand beside ours: arXiv 2602.22469, POPE adversarial on an A100 in fp16."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from evaluation.methods import ONE_PASS, TWO_PASS, UNIFORM, VANILLA


@dataclass(frozen=True)
class Row:
    """One model in the shape of the paper's Table 4: rates in percent, added milliseconds per prefill.

    Attributes:
        name: The model.
        source: Where the figures come from.
        rates: Method -> (HR, accuracy or NaN, added ms or NaN).
    """

    name: str
    source: str
    rates: Mapping[str, tuple[float, float, float]]


_NAN = float("nan")


def _row(name: str, vanilla: tuple[float, float], two: tuple[float, float, float], one: tuple[float, float, float],
         uniform: float) -> Row:  # fmt: skip
    rates = {VANILLA: (*vanilla, 0.0), TWO_PASS: two, ONE_PASS: one, UNIFORM: (uniform, _NAN, _NAN)}
    return Row(name, "paper", rates)


PAPER = (
    _row("Chameleon-7B", (19.5, 80.2), (13.5, 86.2, 45), (14.9, 84.8, 7), 16.1),
    _row("Chameleon-30B", (18.2, 81.5), (12.6, 87.1, 56), (13.9, 85.8, 11), 15.6),
    _row("LLaVA-1.5-7B", (18.8, 80.9), (13.1, 86.5, 44), (14.4, 85.3, 6), 15.8),
    _row("LLaVA-1.5-13B", (17.5, 82.2), (12.8, 87.4, 54), (14.0, 85.7, 9), 14.9),
    _row("Qwen-VL", (18.5, 81.2), (12.9, 86.8, 46), (14.2, 85.4, 7), 15.3),
    _row("Qwen2-VL-7B", (17.0, 82.7), (11.4, 88.2, 43), (12.7, 86.9, 6), 14.0),
)


def row_of(name: str, metrics: Mapping[str, float]) -> Row:
    """The same figures of one of our evaluations, under its first prompt."""
    splits = [key.split("/")[2] for key in metrics if key.startswith(f"eval/{VANILLA}/") and key.endswith("/hr")]
    split = next((name for name in splits if "adversarial" in name), splits[-1] if splits else "")
    base = metrics.get(f"eval/{VANILLA}/prefill_ms", _NAN)
    rates = {
        method: (
            100 * metrics.get(f"eval/{method}/{split}/hr", _NAN),
            100 * metrics.get(f"eval/{method}/{split}/accuracy", _NAN),
            metrics.get(f"eval/{method}/prefill_ms", _NAN) - base,
        )
        for method in (VANILLA, TWO_PASS, ONE_PASS, UNIFORM)
    }
    return Row(name, f"measured, {split}" if split else "measured", rates)


def table_rows(rows: list[Row]) -> list[list[str]]:
    """Header and one row per model."""
    header = [
        "model",
        "figures",
        "vanilla HR/acc",
        "two-pass HR/acc/+ms",
        "one-pass HR/acc/+ms",
        "uniform HR",
        "HR kept",
    ]
    found = [header]
    for row in rows:
        cells = [_cells(row.rates[VANILLA][:2]), _cells(row.rates[TWO_PASS]), _cells(row.rates[ONE_PASS])]
        two, one = (row.rates[VANILLA][0] - row.rates[name][0] for name in (TWO_PASS, ONE_PASS))
        kept = f"{100 * one / two:.0f} %" if two > 0.5 and one == one else "-"  # of less than half a point: no share
        found.append([row.name, row.source, *cells, _cells(row.rates[UNIFORM][:1]), kept])
    return found


def _cells(values: tuple[float, ...]) -> str:
    texts = [f"{value:.1f}" if value == value else "-" for value in values[:2]]
    return " / ".join(texts + [f"{value:+.0f}" if value == value else "-" for value in values[2:]])
