"""A predictor folder: config.json, model.safetensors, golden.safetensors. Saved and loaded here, nowhere else.

``config.json`` holds everything that the runtime needs beside the weights: the format version, the network's
sizes, the SCR settings and the model that the predictor was fitted for, its calibration threshold, its drift
guard (null for none), its metrics, the sha256 of the other two files, and a checksum of itself;
``config.schema.json`` beside this file describes it. There is no pickle, and no file name is guessed.
``scr_runtime.reading`` checks what is read.
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
from scr_runtime.golden import check_golden, golden_pair, most_golden_bytes
from scr_runtime.network import SourcePredictor
from scr_runtime.places import FORMS, Place, local_folder
from scr_runtime.reading import (
    FORMAT_VERSION,
    PROBE,
    checksum,
    parse_record,
    parse_weights,
    read_regular,
    sized_network,
)

__all__ = [
    "CARD_NAME",
    "CONFIG_NAME",
    "FORMAT_VERSION",
    "GOLDEN_NAME",
    "PROBE",
    "WEIGHTS_NAME",
    "load_predictor",
    "save_predictor",
]

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
GOLDEN_NAME = "golden.safetensors"
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
        card: Text of the model card, README.md; ``None`` writes none.

    Returns:
        The folder.

    Raises:
        ConfigurationError: If ``model`` lacks a key, or a value or a tensor is one that ``load_predictor`` would
            refuse.
    """
    folder = Path(folder)
    tensors = {name: value.detach().cpu().float().contiguous() for name, value in predictor.state_dict().items()}
    weights = save_tensors(tensors)
    golden = _golden_bytes(predictor, tensors, scr, folder)
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
        "golden_sha256": hashlib.sha256(golden).hexdigest(),
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
    write_file(folder / GOLDEN_NAME, golden)
    if card is not None:
        write_file(folder / CARD_NAME, card.encode())
    write_file(folder / CONFIG_NAME, text.encode())
    return folder


def _golden_bytes(predictor: SourcePredictor, tensors: dict[str, Tensor], scr: SCRConfig, folder: Path) -> bytes:
    """The golden pair of the network as it will be read, and not of the one in memory."""
    try:
        with torch.device("meta"):
            read = SourcePredictor(predictor.config)
        read = _fill(read, tensors, folder / WEIGHTS_NAME).eval().requires_grad_(False)
    except PredictorCorruptError as error:
        raise ConfigurationError(f"what is to be saved could not be loaded again: {error}") from None
    if predictor.drift_typical is not None and predictor.drift_limit is not None:
        read.set_drift(predictor.drift_typical, predictor.drift_limit)
    return save_tensors(golden_pair(read, scr))


def load_predictor(
    folder: Place,
    device: str | torch.device | None = None,
    *,
    verify: bool = False,
    revision: str | None = None,
    local_files_only: bool = False,
) -> SourcePredictor:
    """Reads a predictor, strictly. Whatever its files hold, nothing but these errors is raised.

    Args:
        folder: A folder that ``save_predictor`` wrote, ``"models:/NAME@ALIAS"`` of MLflow's registry, or
            ``"ORG/NAME"`` of the Hugging Face Hub; ``scr_runtime.places.kind_of`` tells them apart.
        device: Where the network goes; the CPU if it is missing.
        verify: Whether the stored golden inputs are scored and compared with the stored answers.
        revision: Commit, tag or branch of a Hub repository.
        local_files_only: Whether of the Hub only the cache on this machine is asked.

    Returns:
        The network in eval mode, its ``info`` filled with config.json.

    Raises:
        ConfigurationError: If a revision is given for what is no Hub repository.
        PredictorNotFoundError: If the folder or its config.json is missing, or can't be fetched.
        PredictorVersionError: If another version of the format wrote it, newer or older.
        PredictorCorruptError: If a file is unreadable, larger than it can be or no regular file, a value is of another
            type or out of range, the checksum or a sha256 differs, or a tensor is missing, unexpected, of
            another shape or type, or not finite; the message lists every such tensor. With ``verify`` also if there
            is no golden pair, or other answers come out.
    """
    with local_folder(folder, revision, local_files_only=local_files_only) as place:
        return _load(place, verify=verify).to(device)


def _load(folder: Path, *, verify: bool) -> SourcePredictor:
    record = _read_record(folder)
    path = folder / CONFIG_NAME
    network = sized_network(record, path)
    weights = _read_sealed(folder / WEIGHTS_NAME, network.most_bytes, record["weights_sha256"])
    predictor = _fill(network.predictor, parse_weights(weights, folder / WEIGHTS_NAME), folder / WEIGHTS_NAME)
    _check_whole(record, path)
    predictor.threshold = float(record["threshold"])
    if record.get("drift_limit") is not None:  # a folder without it has no guard
        predictor.set_drift(float(record["drift_typical"]), float(record["drift_limit"]))
    predictor.info = record
    predictor.eval().requires_grad_(False)
    if verify:
        _verify(predictor, folder)
    return predictor


def _verify(predictor: SourcePredictor, folder: Path) -> None:
    path, record = folder / GOLDEN_NAME, predictor.info
    if "golden_sha256" not in record:
        raise PredictorCorruptError(
            f"{folder / CONFIG_NAME}: missing key 'golden_sha256': this folder was written before there were golden "
            "pairs. Export it again, or load it without verify."
        )
    content = _read_sealed(path, most_golden_bytes(predictor.config.hidden_size), record["golden_sha256"])
    check_golden(predictor, parse_weights(content, path), SCRConfig.from_dict(record["scr"]), path)


def _read_sealed(path: Path, most: int, sha256: str) -> bytes:
    """Reads a file whose sha256 is in config.json."""
    content = read_regular(path, most)
    digest = hashlib.sha256(content).hexdigest()
    if digest != sha256:
        raise PredictorCorruptError(
            f"{path}: sha256 is {digest[:12]}..., config.json says {sha256[:12]}.... "
            "The file was changed or cut; copy or export it again."
        )
    return content


def stored_info(folder: Place | None) -> Mapping[str, Any]:
    """What a folder whose predictor can't be used says of itself; nothing without a folder.

    Raises:
        PredictorError: If its config.json is not what was written.
    """
    if folder is None:
        return {}
    record = _read_record(Path(folder))
    _check_whole(record, Path(folder) / CONFIG_NAME)
    return record


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
            f"{CONFIG_NAME} and {WEIGHTS_NAME}. {FORMS}"
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
