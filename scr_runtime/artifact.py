"""A predictor folder: config.json, model.safetensors and a model card. Saved and loaded here, nowhere else.

``config.json`` holds everything that the runtime needs beside the weights: the format version, the network's
sizes, the SCR settings and the model that the predictor was fitted for, its calibration threshold, its drift
guard (null for none), its metrics, the sha256 of the weights, and a checksum of itself. There is no pickle, and no
file name is guessed. ``scr_runtime.reading`` checks what is read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from scr_runtime.config import PredictorConfig, SCRConfig
from scr_runtime.errors import ConfigurationError, PredictorCorruptError, PredictorNotFoundError
from scr_runtime.files import write_file
from scr_runtime.network import SourcePredictor
from scr_runtime.reading import (
    FORMAT_VERSION,
    PROBE,
    checksum,
    parse_record,
    parse_weights,
    read_regular,
    sized_network,
)

__all__ = ["CARD_NAME", "CONFIG_NAME", "FORMAT_VERSION", "PROBE", "WEIGHTS_NAME", "load_predictor", "save_predictor"]

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
CARD_NAME = "README.md"

_MOST_CONFIG = 2**20  # bytes


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

    Raises:
        ConfigurationError: If ``model`` lacks a key, or a value is one that ``load_predictor`` would refuse.
    """
    folder = Path(folder)
    tensors = {name: value.detach().cpu().float().contiguous() for name, value in predictor.state_dict().items()}
    weights = save_tensors(tensors)
    record: dict[str, Any] = {
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
    record = json.loads(json.dumps(record, allow_nan=False))  # what will be read: tuples are lists, keys are strings
    record["checksum"] = checksum(record)
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    try:
        parse_record(text.encode(), folder / CONFIG_NAME)
    except PredictorCorruptError as error:
        raise ConfigurationError(f"what is to be saved could not be loaded again: {error}") from None
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / WEIGHTS_NAME, weights)
    write_file(folder / CARD_NAME, (card or _card(record)).encode())
    write_file(folder / CONFIG_NAME, text.encode())
    return folder


def load_predictor(folder: str | os.PathLike[str], device: str | torch.device | None = None) -> SourcePredictor:
    """Reads a predictor folder, strictly. Whatever its files hold, nothing but these errors is raised.

    Args:
        folder: A folder that ``save_predictor`` wrote.
        device: Where the network goes; the CPU if it is missing.

    Returns:
        The network in eval mode, its ``info`` filled with config.json.

    Raises:
        PredictorNotFoundError: If the folder or its config.json is missing.
        PredictorVersionError: If another version of the format wrote it, newer or older.
        PredictorCorruptError: If a file is unreadable, larger than it can be or no regular file, a value is of another
            type or out of range, the checksum or the weights' sha256 differs, or a tensor is missing, unexpected, of
            another shape or type, or not finite; the message lists every such tensor.
    """
    folder = Path(folder)
    record = _read_record(folder)
    path = folder / CONFIG_NAME
    network = sized_network(record, path)
    weights_path = folder / WEIGHTS_NAME
    weights = read_regular(weights_path, network.most_bytes)
    digest = hashlib.sha256(weights).hexdigest()
    if digest != record["weights_sha256"]:
        raise PredictorCorruptError(
            f"{weights_path}: sha256 is {digest[:12]}..., config.json says {record['weights_sha256'][:12]}.... "
            "The file was changed or cut; copy or export it again."
        )
    predictor = _fill(network.predictor, parse_weights(weights, weights_path), weights_path)
    _check_whole(record, path)
    predictor.threshold = float(record["threshold"])
    if record.get("drift_limit") is not None:  # a folder without it has no guard
        predictor.set_drift(float(record["drift_typical"]), float(record["drift_limit"]))
    predictor.info = record
    return predictor.eval().requires_grad_(False).to(device)


def stored_settings(folder: str | os.PathLike[str] | SourcePredictor | None) -> SCRConfig | None:
    """The SCR settings in a folder whose predictor can't be used; ``None`` if they can't be read either.

    Raises:
        PredictorError: If its config.json is not what was written.
    """
    if folder is None or isinstance(folder, SourcePredictor):
        return None
    record = _read_record(Path(folder))
    _check_whole(record, Path(folder) / CONFIG_NAME)
    return SCRConfig.from_dict(record["scr"])


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    try:
        missing = not os.path.lexists(path)
        found = os.path.isdir(folder)
    except (OSError, ValueError) as error:
        raise PredictorNotFoundError(f"predictor folder {str(folder)!r} can't be read: {error}") from error
    if missing:
        what = "has no config.json" if found else "does not exist"
        raise PredictorNotFoundError(
            f"predictor folder {str(folder)!r} {what}. Fit one with train.py, or give the folder that holds "
            f"{CONFIG_NAME} and {WEIGHTS_NAME}."
        )
    return parse_record(read_regular(path, _MOST_CONFIG), path)


def _check_whole(record: Mapping[str, Any], path: Path) -> None:
    """Checks that config.json is as it was written. After the values by themselves, whose errors say more."""
    count = PredictorConfig.from_dict(record["network"]).count_parameters()
    if record.get("parameters", count) != count:
        raise PredictorCorruptError(f"{path}: parameters={record['parameters']!r:.40}, but its network has {count:,}")
    if "checksum" in record and record["checksum"] != checksum(record):
        raise PredictorCorruptError(
            f"{path}: its checksum is not that of its values: a value was changed. Copy or export it again."
        )


def _fill(predictor: SourcePredictor, tensors: dict[str, Tensor], path: Path) -> SourcePredictor:
    for name in ("calibration_raw", "calibration_expected"):  # the only tensors whose length is free
        if name in tensors:
            setattr(predictor, name, torch.empty_like(tensors[name], device="meta"))
    expected = predictor.state_dict()
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is unexpected" for name in tensors if name not in expected]
    for name, tensor in tensors.items():
        wanted = expected.get(name)
        if wanted is None:
            continue
        if tensor.shape != wanted.shape:
            problems.append(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(wanted.shape)}")
        elif tensor.dtype != torch.float32:
            problems.append(f"{name} is {tensor.dtype}, expected torch.float32")
        elif not bool(tensor.isfinite().all()):
            problems.append(f"{name} holds NaN or infinity")
        elif name.endswith("_std") and not bool((tensor > 0).all()):
            problems.append(f"{name} holds deviations that are not over 0")
    if not problems:
        predictor.load_state_dict(tensors, assign=True)
        try:
            predictor.check_calibration()
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise PredictorCorruptError(f"{path}: " + "; ".join(problems))
    return predictor


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
