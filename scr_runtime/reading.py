"""Reading of a predictor folder's files: whatever their bytes are, values of the right kind or a PredictorError.

Sizes are bounded before anything is allocated: of config.json by a constant, of the network by what config.json says
(made without memory first), of the weights by what that network needs.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from scr_runtime.confidence import check_drift
from scr_runtime.config import PredictorConfig, SCRConfig
from scr_runtime.errors import ConfigurationError, PredictorCorruptError, PredictorVersionError
from scr_runtime.network import SourcePredictor

FORMAT_VERSION = 3
"""3 is 2 with a checksum of config.json in it. When it rises, and what is still read, is said in docs/deploy.md."""
PROBE = 32
"""Entries of the input embedding that a model is known by."""

_READ_VERSIONS = (2, 3)
_REQUIRED = ("format_version", "network", "scr", "model", "threshold", "weights_sha256")
_ADDED_IN_3 = ("checksum",)
_MODEL_KEYS = ("family", "hidden_size", "num_blocks", "embedding_probe")
_DEEPEST = 32  # levels of config.json
_MOST_PARAMETERS = 2**26
_MOST_KNOTS = 2**16
_MOST_HEADER = 2**16  # bytes of the weights' own header
_SHA256 = re.compile("[0-9a-f]{64}")


def read_regular(path: Path, most: int) -> bytes:
    """Reads a regular file, or a link to one, of a bounded size. Never waits, as for a pipe.

    Raises:
        PredictorCorruptError: If it is something else, too large, or can't be read.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise PredictorCorruptError(f"{path}: cannot be read (it is no regular file). Export it again.")
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise PredictorCorruptError(f"{path}: cannot be read (it is no regular file). Export it again.")
            content = stream.read(most + 1) if status.st_size <= most else None
    except (OSError, ValueError) as error:
        raise PredictorCorruptError(f"{path}: cannot be read ({error}). Export it again.") from error
    if content is None or len(content) > most:
        raise PredictorCorruptError(f"{path}: is larger than the {most:,} bytes that it can have. Export it again.")
    return content


def checksum(record: Mapping[str, Any]) -> str:
    """The sha256 of a config.json's values: of its JSON with sorted keys and no spaces, itself left out."""
    values = {key: value for key, value in record.items() if key != "checksum"}
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def parse_record(content: bytes, path: Path) -> dict[str, Any]:
    """Parses config.json and checks each value by itself.

    Raises:
        PredictorVersionError: If another version of the format wrote it.
        PredictorCorruptError: If it is not JSON, or a value is missing, of another type or out of range.
    """
    try:
        record: Any = json.loads(content.decode(), parse_constant=_no_constant, object_pairs_hook=_no_repetition)
    except (ValueError, RecursionError) as error:
        raise PredictorCorruptError(f"{path}: not readable as JSON ({error!s:.200}). Export it again.") from error
    if _depth(record) > _DEEPEST:
        raise PredictorCorruptError(f"{path}: nested deeper than {_DEEPEST} levels")
    version: Any = record.get("format_version") if isinstance(record, dict) else None  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    if not _is_integer(version):
        of_a_model = isinstance(record, dict) and "format_version" not in record and "model_type" in record
        hint = "; this is a model's folder: name one that train.py exported" if of_a_model else ""
        raise PredictorCorruptError(f"{path}: format_version={version!r:.40}, expected an integer{hint}")
    if version > FORMAT_VERSION:
        raise PredictorVersionError(
            f"{path}: format_version={version!r:.40}, and this scr_runtime reads up to {FORMAT_VERSION}. "
            "Upgrade scr-runtime, or export the predictor with this version."
        )
    if version not in _READ_VERSIONS:
        raise PredictorVersionError(
            f"{path}: format_version={version!r:.40}, and this scr_runtime reads {_READ_VERSIONS[0]} to "
            f"{FORMAT_VERSION}: the network has changed. Fit it again from the same harvest (train.py), or use the "
            "scr_runtime that wrote it."
        )
    required = _REQUIRED + (_ADDED_IN_3 if version == FORMAT_VERSION else ())
    missing = [key for key in required if key not in record]
    if missing:
        raise PredictorCorruptError(f"{path}: missing keys {missing}. Export it again.")
    problems = _problems(record)
    if problems:
        raise PredictorCorruptError(f"{path}: " + "; ".join(problems))
    return record  # pyright: ignore[reportUnknownVariableType]


@dataclass(frozen=True)
class SizedNetwork:
    """A network without memory.

    Attributes:
        predictor: On the meta device.
        most_bytes: Largest file that its weights can be.
    """

    predictor: SourcePredictor
    most_bytes: int


def sized_network(record: Mapping[str, Any], path: Path) -> SizedNetwork:
    """Makes the network that config.json describes, without its weights.

    Raises:
        PredictorCorruptError: If it is larger than any predictor.
    """
    config = PredictorConfig.from_dict(record["network"])
    numbers = config.count_parameters() + 4 * config.hidden_size
    if numbers > _MOST_PARAMETERS:
        raise PredictorCorruptError(f"{path}: its network would have more than {_MOST_PARAMETERS:,} numbers")
    with torch.device("meta"):
        predictor = SourcePredictor(config)
    return SizedNetwork(predictor, 4 * (numbers + 2 * _MOST_KNOTS + 1) + _MOST_HEADER)


def parse_weights(content: bytes, path: Path) -> dict[str, Tensor]:
    """Parses model.safetensors.

    Raises:
        PredictorCorruptError: If it is not in that format.
    """
    try:
        return load_tensors(content)
    except (
        SafetensorError,
        KeyError,
        AttributeError,
        RuntimeError,
        TypeError,
        ValueError,
        ArithmeticError,
        MemoryError,
    ) as error:
        raise PredictorCorruptError(f"{path}: not readable as safetensors ({error}). Export it again.") from error


def _problems(record: dict[str, Any]) -> list[str]:
    """What is wrong with the values of a config.json, key by key."""
    problems = [*_network_problems(record), *_model_problems(record["model"])]
    if not _is_finite(record["threshold"]):
        problems.append(f"threshold={record['threshold']!r:.40}: expected a finite number")
    for key in ("weights_sha256", *(key for key in ("checksum", "golden_sha256") if key in record)):
        value = record[key]
        if not (isinstance(value, str) and _SHA256.fullmatch(value)):
            problems.append(f"{key}={value!r:.80}: expected 64 hexadecimal digits")
    if record["format_version"] == 2 and "checksum" in record:
        problems.append("format_version=2 with a checksum, which came with 3")
    for key in ("metrics", "provenance"):
        if not isinstance(record.get(key, {}), dict):
            problems.append(f"{key}={record[key]!r:.40}: expected an object")
    typical, limit = record.get("drift_typical"), record.get("drift_limit")
    if typical is not None or limit is not None:
        if not (_is_finite(typical) and _is_finite(limit)):
            problems.append(
                f"drift_typical={typical!r:.40} and drift_limit={limit!r:.40}: expected two numbers, or null"
            )
        else:
            try:
                check_drift(float(typical), float(limit))
            except ValueError as error:
                problems.append(f"drift_typical and drift_limit: {error}")
    return problems


def _network_problems(record: dict[str, Any]) -> list[str]:
    problems: list[str] = []
    for key, parse in (("network", PredictorConfig.from_dict), ("scr", SCRConfig.from_dict)):
        if not isinstance(record[key], dict):
            problems.append(f"{key}={record[key]!r:.40}: expected an object")
            continue
        try:
            parse(record[key])
        except (ConfigurationError, TypeError, ValueError, OverflowError) as error:
            problems.append(f"{error}"[:500])
    return problems


def _model_problems(model: Any) -> list[str]:
    """What is wrong with the section that names the model. One that was written by hand may name its family alone."""
    if not isinstance(model, dict):
        return [f"model={model!r:.40}: expected an object"]
    section: dict[str, Any] = model  # pyright: ignore[reportUnknownVariableType]
    described = any(key in section for key in _MODEL_KEYS[1:])
    problems = [f"model.{key} is missing" for key in _MODEL_KEYS if described and key not in section]
    for key in ("family", "name"):
        if key in section and not isinstance(section[key], str):
            problems.append(f"model.{key}={section[key]!r:.40}: expected a string")
    for key in ("hidden_size", "num_blocks"):
        if key in section and not (_is_integer(section[key]) and section[key] > 0):
            problems.append(f"model.{key}={section[key]!r:.40}: expected an integer over 0")
    for key in ("image_backend", "revision"):
        if not isinstance(section.get(key), str | None):
            problems.append(f"model.{key}={section[key]!r:.40}: expected a string or null")
    probe: Any = section.get("embedding_probe")
    if "embedding_probe" in section and not (
        isinstance(probe, list) and len(probe) == PROBE and all(map(_is_finite, probe))  # pyright: ignore[reportUnknownArgumentType]
    ):
        problems.append(f"model.embedding_probe={probe!r:.40}: expected {PROBE} finite numbers")
    return problems


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _no_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a key occurs twice among {[key for key, _ in pairs]!r:.200}")
    return found


def _depth(value: Any) -> int:
    """Levels of lists and objects within each other."""
    depth, level = 0, [value]
    while level:
        depth += 1
        items = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [inner for item in items for inner in item]
    return depth


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> TypeGuard[float]:
    """Whether a value is a number that a float can hold."""
    if not (_is_integer(value) or isinstance(value, float)):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False
