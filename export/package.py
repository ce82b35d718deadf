"""Packs a fitted checkpoint: calibrates it, writes the folder, and reads it back before it takes its place."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from export.card import write_card
from export.errors import ExportError
from export.fresh import check_fresh
from predictor.batch import Batch
from predictor.calibration import Calibration, calibrate, confidence_rows, fit_drift, spread_rows
from predictor.module import SourceModule, load_module
from predictor.settings import PredictorSettings
from scr_runtime import SCRConfig, SourcePredictor, load_predictor, save_predictor
from scr_runtime.files import sync_folder
from scr_runtime.golden import golden_inputs, golden_outputs


@dataclass(frozen=True)
class Facts:
    """What a folder and its card say beside what the predictor itself knows.

    Attributes:
        metrics: What was measured on the test split: ``test/mass``, ``test/mass_low``, ``test/position/mass``, ...
        provenance: Where it comes from, and what was used.
        evaluation: ``sentence`` and ``reason`` of the evaluation's verdict; ``None`` if there is none yet.
    """

    metrics: Mapping[str, float] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Exported:
    """A checked predictor folder.

    Attributes:
        folder: Where it lies.
        predictor: As read back from it.
        calibration: Its confidence map.
    """

    folder: Path
    predictor: SourcePredictor
    calibration: Calibration


def export_predictor(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    scr: SCRConfig,
    model: Mapping[str, Any],
    validation: Iterable[Batch],
    settings: PredictorSettings,
    facts: Facts | None = None,
) -> Exported:
    """Writes a predictor folder from a Lightning checkpoint, and checks it before it takes the folder's place.

    Args:
        checkpoint: A checkpoint of ``SourceModule``.
        folder: Where the predictor goes. What lay there stays until the new one has been checked.
        scr: The settings that the targets were made with.
        model: ``scr_runtime.describe_model`` of the VLM.
        validation: Batches of the validation split: confidence and drift guard are calibrated on them.
        settings: How much of them ``auto`` would hand to the diagnostic run, see ``fit_calibration``.
        facts: For config.json and the card.

    Raises:
        CheckpointMissingError: If there is no such checkpoint.
        FitError: If it can't be read, or its scores on the validation split are not finite.
        ExportError: If the folder's outputs differ from the checkpoint's, here or in a process of its own that has
            the runtime's dependencies alone; the former folder is left as it was.
    """
    folder, facts = Path(folder), facts or Facts()
    module = load_module(checkpoint)
    calibration = _calibrate(module, validation, scr, settings)
    staged = folder.with_name(f".{folder.name}.staged")
    shutil.rmtree(staged, ignore_errors=True)
    save_predictor(
        staged, module.predictor, scr=scr, model=model, metrics=facts.metrics,
        provenance=_provenance(facts, calibration, settings),
    )  # fmt: skip
    write_card(staged, facts.evaluation)
    reloaded = load_predictor(staged, verify=True)
    _check_scores(module, reloaded, validation)
    _check_calibration(module.predictor, reloaded, staged)
    check_fresh(staged, golden_outputs(module.predictor, golden_inputs(module.predictor), scr))
    keep_former(folder)
    staged.rename(folder)
    sync_folder(folder.parent)
    return Exported(folder, reloaded, calibration)


def keep_former(folder: Path) -> Path | None:
    """Moves what lies at a place to the first free name behind it, ``<name>.former-<n>``.

    Returns:
        Where it is now; ``None`` if nothing was there.
    """
    if not folder.exists():
        return None
    number = 1
    while (former := folder.with_name(f"{folder.name}.former-{number}")).exists():
        number += 1
    return folder.rename(former)


def _provenance(facts: Facts, calibration: Calibration, settings: PredictorSettings) -> dict[str, Any]:
    """Where a predictor comes from, and how its threshold came about."""
    names = ("target_fallback", "target_fidelity")
    asked = {name: value for name in names if (value := getattr(settings, name)) is not None}
    used = {**facts.provenance.get("used", {}), **asked, "temperature": calibration.temperature}
    return {**facts.provenance, "used": used}


def _calibrate(
    module: SourceModule, validation: Iterable[Batch], scr: SCRConfig, settings: PredictorSettings
) -> Calibration:
    """Fits confidence and drift guard, and stores them in the module's predictor."""
    calibration = calibrate(confidence_rows(module.score, validation, scr), settings)
    module.predictor.set_calibration(
        torch.tensor(calibration.raw),
        torch.tensor(calibration.expected),
        calibration.threshold,
        calibration.temperature,
    )
    module.predictor.set_drift(*fit_drift(spread_rows(module.spread, validation)))
    return calibration


@torch.inference_mode()
def _check_scores(module: SourceModule, reloaded: SourcePredictor, validation: Iterable[Batch]) -> None:
    """Compares the scores of the first batch, bit for bit."""
    batch = next(iter(validation))
    expected, found = (scores(batch["states"], batch["grid"], batch["question"]) for scores in (module, reloaded))
    if not torch.equal(found, expected):
        worst = (found - expected).abs().max()
        raise ExportError(f"the reloaded predictor's scores differ from the checkpoint's by up to {worst:.3g}")


def _check_calibration(predictor: SourcePredictor, reloaded: SourcePredictor, staged: Path) -> None:
    for name in ("temperature", "calibration_raw", "calibration_expected"):
        if not torch.equal(getattr(predictor, name), getattr(reloaded, name)):
            raise ExportError(f"{staged}: the confidence calibration changed on its way through the folder")
    if reloaded.threshold != predictor.threshold:
        raise ExportError(f"{staged}: the confidence calibration changed on its way through the folder")
    if (reloaded.drift_typical, reloaded.drift_limit) != (predictor.drift_typical, predictor.drift_limit):
        raise ExportError(f"{staged}: the drift guard changed on its way through the folder")
