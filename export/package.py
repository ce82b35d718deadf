"""Packs a fitted checkpoint: calibrates it, writes the folder, reads it back and compares before it says done."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from predictor.calibration import Calibration, ConfidenceRows, calibrate, confidence_rows, fit_drift, spread_rows
from predictor.module import SourceModule
from scr_runtime import SCRConfig, SourcePredictor, load_predictor, save_predictor

Batch = Mapping[str, Any]


class ExportError(RuntimeError):
    """The folder that was written does not give the checkpoint's outputs."""


@dataclass(frozen=True)
class Exported:
    """A checked predictor folder.

    Attributes:
        folder: Where it lies.
        predictor: As read back from it.
        calibration: Its confidence map.
        validation: The rows that the map was fitted on.
    """

    folder: Path
    predictor: SourcePredictor
    calibration: Calibration
    validation: ConfidenceRows


def export_predictor(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    scr: SCRConfig,
    model: Mapping[str, Any],
    validation: Iterable[Batch],
    target_fallback: float | None,
    target_fidelity: float | None = None,
    metrics: Mapping[str, float] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Exported:
    """Writes a predictor folder from a Lightning checkpoint, and proves it before it takes the folder's place.

    Args:
        checkpoint: A checkpoint of ``SourceModule``.
        folder: Where the predictor goes. What lay there stays until the new one has been checked.
        scr: The settings that the targets were made with.
        model: ``scr_runtime.describe_model`` of the VLM.
        validation: Batches of the validation split: confidence and drift guard are calibrated on them.
        target_fallback: Share of them that ``auto`` would hand to the diagnostic run.
        target_fidelity: Instead of it: expected share of true sources that those which stay shall have on average.
        metrics: Numbers for the card.
        provenance: Where it comes from.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ExportError: If the folder's outputs differ from the checkpoint's; the former folder is left as it was.
    """
    checkpoint, folder = Path(checkpoint), Path(folder)
    if not checkpoint.is_file():
        raise FileNotFoundError(f"no checkpoint at {checkpoint}: run train.py first")
    module = SourceModule.load_from_checkpoint(checkpoint, map_location="cpu").eval()
    rows = confidence_rows(module.score, validation, scr)
    calibration = calibrate(rows, target_fallback, target_fidelity)
    predictor = module.predictor
    predictor.set_calibration(
        torch.tensor(calibration.raw),
        torch.tensor(calibration.expected),
        calibration.threshold,
        calibration.temperature,
    )
    predictor.set_drift(*fit_drift(spread_rows(module.spread, validation)))
    staged = folder.with_name(f".{folder.name}.staged")
    shutil.rmtree(staged, ignore_errors=True)
    save_predictor(staged, predictor, scr=scr, model=model, metrics=metrics, provenance=provenance)
    again = load_predictor(staged)
    with torch.inference_mode():
        for batch in validation:
            _compare(module(batch["states"], batch["grid"], batch["question"]), again, batch)
            break
    for name in ("temperature", "calibration_raw", "calibration_expected"):
        if not torch.equal(getattr(predictor, name), getattr(again, name)) or again.threshold != predictor.threshold:
            raise ExportError(f"{staged}: the confidence calibration changed on its way through the folder")
    if (again.drift_typical, again.drift_limit) != (predictor.drift_typical, predictor.drift_limit):
        raise ExportError(f"{staged}: the drift guard changed on its way through the folder")
    if folder.exists():
        shutil.rmtree(folder)
    staged.rename(folder)
    return Exported(folder, again, calibration, rows)


def _compare(expected: Tensor, predictor: SourcePredictor, batch: Batch) -> None:
    found = predictor(batch["states"], batch["grid"], batch["question"])
    if not torch.equal(found, expected):
        worst = (found - expected).abs().max()
        raise ExportError(f"the reloaded predictor's scores differ from the checkpoint's by up to {worst:.3g}")
