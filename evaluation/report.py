"""Reports a comparison: its table, what the numbers show and what they don't, figure, files, metrics."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from data.questions import STRATEGIES
from evaluation.compare import METHODS, Comparison
from evaluation.methods import AUTO, DESCRIPTIONS, ONE_PASS, SHIFT, SWAPPED, TWO_PASS, UNIFORM, VANILLA
from evaluation.tables import markdown
from predictor.metrics import Interval
from scr_runtime.files import whole_file, write_file

_COLOURS = {
    VANILLA: "#6b7280",
    TWO_PASS: "#1d4ed8",
    ONE_PASS: "#059669",
    AUTO: "#0891b2",
    UNIFORM: "#d97706",
    SWAPPED: "#b45309",
    SHIFT: "#9ca3af",
}
_REPORTED_SHARES = (0.1, 0.2, 0.3, 0.5)  # of the questions, handed to the diagnostic run


def answer_rows(comparison: Comparison) -> list[list[str]]:
    """Header and one row per method: hallucination rates, answers, fidelity and cost."""
    header = ["method", *(f"HR {split[:3]}" for split in STRATEGIES), "change of HR adv [95 %]", "TPR", "acc adv"]
    header += ["AUC adv", "shift r", "flips kept", "prefill"]
    rows = [header]
    for method in METHODS:
        scores = [comparison.scores[method, split] for split in STRATEGIES]
        last = scores[-1]
        follow, cost = comparison.fidelity.get(method), comparison.costs.get(method)
        rows.append(
            [
                method,
                *(f"{100 * item.hr:.1f}" for item in scores),
                "-" if last.hr_change is None else _points(last.hr_change),
                f"{100 * last.tpr:.1f}",
                f"{100 * last.accuracy:.1f}",
                f"{last.auc:.3f}",
                "1" if method == TWO_PASS else _number(follow.shift_correlation if follow else None, 2),
                "1" if method == TWO_PASS else _number(follow.flips_followed if follow else None, 2),
                "-" if cost is None else f"{cost.ratio:.2f}x",
            ]
        )
    return rows


def hr_kept(comparison: Comparison, method: str) -> float:
    """Share of two-pass's change of the adversarial hallucination rate that a method has too; NaN if there is none."""
    target, mine = (comparison.scores[name, STRATEGIES[-1]].hr_change for name in (TWO_PASS, method))
    return mine.mean / target.mean if mine is not None and target is not None and target.mean else float("nan")


def reading(comparison: Comparison, *, embedded: bool) -> list[str]:
    """What the numbers show and what they do not, sentence by sentence."""
    split = STRATEGIES[-1]
    questions = len(comparison.answers.splits[split])
    change = {name: comparison.scores[name, split].hr_change for name in METHODS if name != VANILLA}
    two, swapped, uniform, shift = (change[name] for name in (TWO_PASS, SWAPPED, UNIFORM, SHIFT))
    assert two is not None and swapped is not None and uniform is not None and shift is not None
    one, auto = comparison.fidelity[ONE_PASS], comparison.fidelity[AUTO]
    beyond_noise = two.high < 0 or two.low > 0
    points = [point for point in comparison.curve if point.share in _REPORTED_SHARES]
    lines = [
        f"{comparison.images} held-out images, {questions} {split} questions; HR, TPR and accuracy in percent, "
        "changes in percentage points against vanilla.",
        f"Two-pass changes adversarial HR by {_points(two)}: "
        + ("an effect beyond noise." if beyond_noise else "not distinguishable from none."),
        f"The same dose in the wrong places (swapped) changes it by {_points(swapped)}, random sources by "
        f"{_points(uniform)}, a constant shift of the margin by {_points(shift)}: only what two-pass gains beyond "
        "these comes from where its sources are.",
        f"One-pass follows two-pass's margin shifts with r = {one.shift_correlation:.2f} and "
        f"{_share(one.flips_followed)} of its {one.flips} flipped answers; auto with r = {auto.shift_correlation:.2f} "
        f"and {_share(auto.flips_followed)}, handing {comparison.answers.fallback:.0%} of the questions to the "
        f"diagnostic run. (Doing nothing agrees with two-pass on {one.agreement_of_vanilla:.1%} of all answers, so "
        "plain agreement says nothing.)",
        f"Of two-pass's change of the adversarial HR one-pass keeps {_share(hr_kept(comparison, ONE_PASS))}"
        + ("." if beyond_noise else ", which says nothing while that change is not distinguishable from none."),
        "With more fallback, auto follows with "
        + ", ".join(f"r = {point.shift_correlation:.2f} at {point.share:.0%}" for point in points)
        + "; of the same shares drawn at random, "
        + ", ".join(f"{point.shift_correlation_random:.2f}" for point in points)
        + ".",
        f"Credit entropy against vanilla's hallucination rate, over images: r = {comparison.entropy_correlation:.2f}.",
    ]
    if embedded:
        lines.append(
            "This small world shows that the chain works: harvest, fit, export, the edit, and how closely one-pass "
            "follows two-pass. It does not show that SCR lowers hallucination in real models; for that, run it on "
            "COCO and POPE. Prefill ratios here are dominated by Python overhead on so small a model; "
            "benchmarks/prefill.py measures them at a size that means something."
        )
    return lines


def figure(comparison: Comparison) -> Figure:
    """Change of HR by split with intervals; margin shifts of one-pass against two-pass; fidelity by fallback share."""
    result = Figure(figsize=(15.5, 4.4), layout="constrained")
    FigureCanvasAgg(result)
    left, middle, right = result.subplots(1, 3, width_ratios=(1.35, 1, 1.1))
    _draw_rates(left, comparison)
    _draw_shifts(middle, comparison)
    _draw_fallback(right, comparison)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    return result


def _draw_rates(axes: Axes, comparison: Comparison) -> None:
    names = [name for name in METHODS if name != VANILLA]
    for place, name in enumerate(names):
        offset = (place - (len(names) - 1) / 2) * 0.13
        for column, split in enumerate(STRATEGIES):
            change = comparison.scores[name, split].hr_change
            assert change is not None
            axes.errorbar(
                column + offset,
                100 * change.mean,
                yerr=[[100 * (change.mean - change.low)], [100 * (change.high - change.mean)]],
                fmt="o",
                color=_COLOURS[name],
                markersize=5,
                linewidth=1.6,
                label=name if column == 0 else None,
            )
    axes.axhline(0, color="#111827", linewidth=0.8)
    axes.set_xticks(range(len(STRATEGIES)), STRATEGIES)
    axes.set_ylabel("change of hallucination rate\nagainst vanilla (points, 95 %)")
    axes.set_title("Hallucination rate", loc="left")
    axes.legend(ncols=3, fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.1))


def _draw_shifts(axes: Axes, comparison: Comparison) -> None:
    margins = comparison.answers.margins
    wanted = margins[TWO_PASS] - margins[VANILLA]
    mine = margins[ONE_PASS] - margins[VANILLA]
    bound = float(np.quantile(np.abs(np.r_[wanted, mine]), 0.999)) or 1.0
    axes.plot([-bound, bound], [-bound, bound], color="#9ca3af", linewidth=1)
    axes.scatter(wanted, mine, s=5, alpha=0.35, color=_COLOURS[ONE_PASS], linewidths=0)
    axes.set_xlim(-bound, bound)
    axes.set_ylim(-bound, bound)
    axes.set_aspect("equal")
    axes.set_xlabel("two-pass: shift of the yes margin (logits)")
    axes.set_ylabel("one-pass")
    axes.set_title(f"Fidelity, r = {comparison.fidelity[ONE_PASS].shift_correlation:.2f}", loc="left")


def _draw_fallback(axes: Axes, comparison: Comparison) -> None:
    share = [100 * point.share for point in comparison.curve]
    axes.plot(
        share, [p.shift_correlation for p in comparison.curve], color=_COLOURS[AUTO], label="least confident first"
    )
    at_random = [point.shift_correlation_random for point in comparison.curve]
    axes.plot(share, at_random, color=_COLOURS[SHIFT], linestyle=(0, (4, 3)), label="drawn at random")
    chosen = 100 * comparison.answers.fallback
    axes.axvline(chosen, color=_COLOURS[UNIFORM], linewidth=1.2, label=f"auto's threshold: {chosen:.0f} %")
    axes.set(
        xlim=(0, 100),
        xlabel="questions handed to the diagnostic run (%)",
        ylabel="r of the margin shifts with two-pass's",
    )
    axes.set_title("auto: fidelity and cost", loc="left")
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    cost = axes.secondary_xaxis("top", functions=_cost_axis(comparison))
    cost.set_xlabel("cost of a prefill against vanilla", fontsize=8, loc="right")
    cost.tick_params(labelsize=8)


def prefill_cost(comparison: Comparison, share: float) -> float:
    """Mean prefill of ``auto`` over vanilla's if it hands this share over: one-pass, and now and then a diagnostic."""
    return comparison.costs[ONE_PASS].ratio + share * (comparison.costs[TWO_PASS].ratio - 1)


def _cost_axis(comparison: Comparison) -> tuple[Any, Any]:
    """Maps percent handed over to cost, and back; strictly rising, as an axis has to be."""
    start = prefill_cost(comparison, 0)
    slope = max((prefill_cost(comparison, 1) - start) / 100, 1e-6)
    return lambda percent: start + slope * percent, lambda cost: (cost - start) / slope


def metrics(comparison: Comparison) -> dict[str, float]:
    """Every number under a stable name, as MLflow and evaluation.json hold it."""
    values: dict[str, float] = {
        "eval/entropy_correlation": comparison.entropy_correlation,
        "eval/auto/fallback": comparison.answers.fallback,
    }
    for (method, split), item in comparison.scores.items():
        prefix = f"eval/{method}/{split}"
        values |= {f"{prefix}/{key}": getattr(item, key) for key in ("hr", "tpr", "accuracy", "auc")}
        if item.hr_change is not None:
            values |= {f"{prefix}/hr_change{end}": value for end, value in _ends(item.hr_change)}
    for method, item in comparison.fidelity.items():
        values |= {f"eval/{method}/{key}": float(value) for key, value in dataclasses.asdict(item).items()}
    for point in comparison.curve:
        prefix = f"eval/auto_{round(100 * point.share)}"
        values |= {
            f"{prefix}/shift_correlation": point.shift_correlation,
            f"{prefix}/flips_followed": point.flips_followed,
        }
    for method in (ONE_PASS, AUTO):
        values[f"eval/{method}/hr_kept"] = hr_kept(comparison, method)
    for method, cost in comparison.costs.items():
        values[f"eval/{method}/prefill_ratio"] = cost.ratio
    return {key: value for key, value in values.items() if np.isfinite(value)}


def write(folder: Path, comparison: Comparison, *, embedded: bool) -> dict[str, Path]:
    """Writes evaluation.md, evaluation.json and evaluation.png into a folder.

    Returns:
        Kind -> path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {kind: folder / f"evaluation.{kind}" for kind in ("md", "json", "png")}
    methods = [["method", "what it is"], *([name, DESCRIPTIONS[name]] for name in METHODS)]
    text = [markdown(answer_rows(comparison)), "", *(f"- {line}" for line in reading(comparison, embedded=embedded))]
    write_file(paths["md"], "\n".join(["# Comparison", "", *text, "", markdown(methods), ""]).encode())
    write_file(paths["json"], (json.dumps(metrics(comparison), indent=1) + "\n").encode())
    with whole_file(paths["png"]) as stream:
        figure(comparison).savefig(stream, format="png", dpi=130)
    return paths


def _ends(interval: Interval) -> list[tuple[str, float]]:
    return [("", interval.mean), ("_low", interval.low), ("_high", interval.high)]


def _points(interval: Interval) -> str:
    return f"{100 * interval.mean:+.1f} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"


def _share(value: float) -> str:
    return f"{value:.0%}" if np.isfinite(value) else "none"


def _number(value: Any, digits: int) -> str:
    return "-" if value is None or not np.isfinite(value) else f"{value:.{digits}f}"
