"""A predictor folder: config.json, model.safetensors and a model card. Saved and loaded here, nowhere else.

``config.json`` holds everything that the runtime needs beside the weights: the format version, the network's
sizes, the SCR settings and the model that the predictor was fitted for, its calibration threshold, its drift
guard (null for none), its metrics, and the sha256 of the weights. There is no pickle, and no file name is guessed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from scr_runtime.config import PredictorConfig, SCRConfig
from scr_runtime.errors import (
    ConfigurationError,
    PredictorCorruptError,
    PredictorNotFoundError,
    PredictorVersionError,
)
from scr_runtime.files import write_file
from scr_runtime.network import SourcePredictor

FORMAT_VERSION = 2
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
CARD_NAME = "README.md"

_REQUIRED = ("format_version", "network", "scr", "model", "threshold", "weights_sha256")


def save_predictor(
    folder: str | os.PathLike[str],
    predictor: SourcePredictor,
    *,
    scr: SCRConfig,
    model: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
    provenance: Mapping[str, Any] | None = None,
    card: str | None = None,
) -> Path:
    """Writes a predictor folder, each file complete or not at all; config.json comes last.

    Args:
        folder: Where to write; made if it is missing, its files replaced if it is there.
        predictor: The fitted network with its statistics and calibration.
        scr: The settings that its targets were made with.
        model: The VLM it belongs to, as ``scr_runtime.describe_model`` describes it.
        metrics: What was measured, for example ``{"test/mass": 0.93}``.
        provenance: Where it comes from: data fingerprint, run id, versions.
        card: Text of the model card; a short one is written if it is missing.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in predictor.state_dict().items()}
    weights = save_tensors(tensors)
    config = {
        "format_version": FORMAT_VERSION,
        "network": predictor.config.to_dict(),
        "scr": scr.to_dict(),
        "model": dict(model),
        "threshold": predictor.threshold,
        "drift_typical": predictor.drift_typical,
        "drift_limit": predictor.drift_limit,
        "parameters": predictor.count_parameters(),
        "metrics": dict(metrics or {}),
        "provenance": dict(provenance or {}),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    write_file(folder / WEIGHTS_NAME, weights)
    write_file(folder / CARD_NAME, (card or _card(config)).encode())
    write_file(folder / CONFIG_NAME, text.encode())
    return folder


def load_predictor(folder: str | os.PathLike[str], device: str | torch.device | None = None) -> SourcePredictor:
    """Reads a predictor folder, strictly.

    Args:
        folder: A folder that ``save_predictor`` wrote.
        device: Where the network goes; the CPU if it is missing.

    Returns:
        The network in eval mode, its ``info`` filled with config.json.

    Raises:
        PredictorNotFoundError: If the folder or its config.json is missing.
        PredictorVersionError: If another version of the format wrote it, newer or older.
        PredictorCorruptError: If a file is unreadable, the weights' sha256 differs, or a tensor is missing,
            unexpected or of another shape; the message lists every one.
    """
    folder = Path(folder)
    path = folder / CONFIG_NAME
    if not path.is_file():
        what = "has no config.json" if folder.is_dir() else "does not exist"
        raise PredictorNotFoundError(
            f"predictor folder {str(folder)!r} {what}. Fit one with train.py, or give the folder that holds "
            f"{CONFIG_NAME} and {WEIGHTS_NAME}."
        )
    config = _read_config(path)
    weights_path = folder / WEIGHTS_NAME
    try:
        weights = weights_path.read_bytes()
    except OSError as error:
        raise PredictorCorruptError(f"{weights_path}: cannot be read ({error}). Export it again.") from error
    digest = hashlib.sha256(weights).hexdigest()
    if digest != config["weights_sha256"]:
        raise PredictorCorruptError(
            f"{weights_path}: sha256 is {digest[:12]}..., config.json says {config['weights_sha256'][:12]}.... "
            "The file was changed or cut; copy or export it again."
        )
    try:
        predictor = SourcePredictor(PredictorConfig.from_dict(config["network"]))
        SCRConfig.from_dict(config["scr"])
    except (ConfigurationError, TypeError) as error:
        raise PredictorCorruptError(f"{path}: {error}") from error
    _load_tensors(predictor, load_tensors(weights), weights_path)
    predictor.threshold = float(config["threshold"])
    if config.get("drift_limit") is not None:  # a folder without it has no guard
        try:
            predictor.set_drift(float(config["drift_typical"]), float(config["drift_limit"]))
        except (KeyError, TypeError, ValueError) as error:
            raise PredictorCorruptError(f"{path}: drift_typical and drift_limit: {error}") from error
    predictor.info = config
    return predictor.eval().requires_grad_(False).to(device)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config: Any = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise PredictorCorruptError(f"{path}: not readable as JSON ({error}). Export it again.") from error
    version: Any = config.get("format_version") if isinstance(config, dict) else None  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    if not isinstance(version, int):
        raise PredictorCorruptError(f"{path}: format_version={version!r}, expected an integer")
    if version > FORMAT_VERSION:
        raise PredictorVersionError(
            f"{path}: format_version={version}, and this scr_runtime reads up to {FORMAT_VERSION}. "
            "Upgrade scr-runtime, or export the predictor with this version."
        )
    if version < FORMAT_VERSION:
        raise PredictorVersionError(
            f"{path}: format_version={version}, and this scr_runtime reads {FORMAT_VERSION}: the network has changed. "
            "Fit it again from the same harvest (train.py), or use the scr_runtime that wrote it."
        )
    missing = [key for key in _REQUIRED if key not in config]
    if missing:
        raise PredictorCorruptError(f"{path}: missing keys {missing}. Export it again.")
    return config  # pyright: ignore[reportUnknownVariableType]


def _load_tensors(predictor: SourcePredictor, tensors: dict[str, torch.Tensor], path: Path) -> None:
    for name in ("calibration_raw", "calibration_expected"):  # the only tensors whose length is free
        if name in tensors:
            setattr(predictor, name, torch.empty_like(tensors[name]))
    expected = predictor.state_dict()
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is unexpected" for name in tensors if name not in expected]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected
        if name in tensors and tensors[name].shape != expected[name].shape
    ]
    if problems:
        raise PredictorCorruptError(f"{path}: " + "; ".join(problems))
    predictor.load_state_dict(tensors)


def _card(config: Mapping[str, Any]) -> str:
    model, scr = config["model"], config["scr"]
    metrics = "\n".join(f"| {name} | {value:.4f} |" for name, value in config["metrics"].items())
    table = f"\n| metric | value |\n|---|---|\n{metrics}\n" if metrics else ""
    return f"""---
library_name: scr-runtime
tags: [vision-language-model, hallucination, spatial-credit-redistribution]
---

# One-pass SCR source predictor for {model.get("name", "a vision-language model")}

A network of {config["parameters"]:,} parameters that reads the hidden states of a vision-language model behind
its block {scr["state_layer"]} and names the image patches whose activation Spatial Credit Redistribution (arXiv
2602.22469) spreads to their neighbours, so that no diagnostic pass is needed.

```python
from scr_runtime import SCR

with SCR(model, predictor="this/folder", mode="auto"):
    tokens = model.generate(**inputs)
```

Fitted for family `{model.get("family")}`, hidden size {model.get("hidden_size")}, {model.get("num_blocks")} decoder
blocks; K = {scr["num_sources"]}, edited blocks {scr["edit_layers"]}, attention of blocks {scr["attention_layers"]}.
{table}"""
