"""How good the predictor gets with more images, and what still more would bring.

    python train.py tracking.experiment=learning-curve evaluation.images=0 trainer.patience=1000 seed=0,1,2 \
        trainer.train_images=500 trainer.max_epochs=80                    # for each size, at an equal number of steps
    python -m benchmarks.learning_curve runs/sweeps/scene-llava --out runs/learning-curve.png

Reads the children of those sweeps, prints mean and range over seeds for each number of images, and fits
``1 - recall = floor + a * images ** -b`` to them by least squares, the floor and b over a grid. An extrapolation is as
good as that form: the last size is left out once, to see how well the others predict it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.add_argument("folder", type=Path, help="the children of sweeps: runs/sweeps/<model>")
PARSER.add_argument("--experiment", default="learning-curve", help="their tracking.experiment")
PARSER.add_argument("--metric", default="test/recall")
PARSER.add_argument("--out", type=Path, help="PNG to write")
if __name__ == "__main__":
    PARSER.parse_args()  # before the imports below, which take seconds

import numpy as np
import yaml
from matplotlib.figure import Figure

from evaluation.sweep_report import HEADLINES

Curve = tuple[float, float, float]  # floor, a, b


def read(folder: Path, experiment: str, metric: str) -> dict[int, list[float]]:
    """Images to fit to -> the metric of each seed, of all finished children of an experiment."""
    found: dict[int, list[float]] = {}
    for predictor in sorted(folder.glob("*/predictor/config.json")):
        config = yaml.safe_load((predictor.parents[1] / "reports/config.yaml").read_text())
        if config["tracking"]["experiment"] == experiment:
            images = config["trainer"]["train_images"] or config["harvest"]["samples"]
            found.setdefault(images, []).append(json.loads(predictor.read_text())["metrics"][metric])
    return dict(sorted(found.items()))


def fit(points: dict[int, list[float]]) -> Curve:
    """Least squares of ``1 - metric = floor + a * images ** -b`` over the means of the seeds."""
    images = np.array(list(points), dtype=float)
    missed = np.array([1 - np.mean(values) for values in points.values()])
    best: tuple[float, Curve] | None = None
    for floor in np.linspace(0, missed.min(), 200, endpoint=False):
        for exponent in np.linspace(0.05, 2, 196):
            power = images**-exponent
            scale = float(power @ (missed - floor) / (power @ power))
            error = float(np.square(floor + scale * power - missed).sum())
            if best is None or error < best[0]:
                best = error, (float(floor), scale, float(exponent))
    assert best is not None
    return best[1]


def predict(curve: Curve, images: Any) -> Any:
    """The metric at a number of images, or at each of an array of them."""
    floor, scale, exponent = curve
    return 1 - floor - scale * images**-exponent


def figure(points: dict[int, list[float]], curve: Curve, label: str) -> Figure:
    """Seeds, and the fitted curve beyond them."""
    result = Figure(figsize=(6.4, 4), layout="constrained")
    axes = result.subplots()
    sizes = np.geomspace(min(points), 4 * max(points), 200)
    inside = sizes <= max(points)
    axes.plot(sizes[inside], predict(curve, sizes[inside]), color="#059669", linewidth=2, label="fitted")
    axes.plot(sizes[~inside], predict(curve, sizes[~inside]), color="#059669", linestyle=":", label="extrapolated")
    for number, (images, values) in enumerate(points.items()):
        axes.plot([images] * len(values), values, "o", color="#111827", ms=5, label=None if number else "a seed each")
    axes.set(xscale="log", xlabel="images to fit to (log scale), two prompts each", ylabel=label)
    ticks = [*points, 2 * max(points), 4 * max(points)]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    arguments = PARSER.parse_args(argv)
    points = read(arguments.folder, arguments.experiment, arguments.metric)
    if len(points) < 4:
        PARSER.error(
            f"{arguments.folder} has children of experiment {arguments.experiment!r} at {len(points)} numbers of "
            "images; 4 are needed: see --help"
        )
    print(f"images  seeds  {arguments.metric} (mean, range)")
    for images, values in points.items():
        print(f"{images:6,}  {len(values):5}  {np.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})")
    curve, last = fit(points), max(points)
    print(f"fitted: 1 - {curve[0]:.4f} - {curve[1]:.3g} * images ** -{curve[2]:.2f}")
    without = fit({images: values for images, values in points.items() if images != last})
    print(f"without {last:,} it predicts {predict(without, last):.4f} there; measured {np.mean(points[last]):.4f}")
    for images in (5000, 12_000, 50_000):
        print(f"extrapolated to {images:6,} images: {predict(curve, images):.4f}")
    if arguments.out:
        label = f"{HEADLINES.get(arguments.metric, (arguments.metric,))[0]} on the test split"
        figure(points, curve, label).savefig(arguments.out, dpi=130)
        print(f"figure: {arguments.out}")


if __name__ == "__main__":
    main()
