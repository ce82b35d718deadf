"""Tells two predictors apart: settings, data, metrics, and what they choose."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from scr_runtime import SCRConfig, SourcePredictor, load_predictor
from scr_runtime.artifact import GOLDEN_NAME
from scr_runtime.golden import golden_outputs

_SEALS = ("checksum", "golden_sha256", "model.embedding_probe")


def differences(first: Path, second: Path) -> tuple[list[list[str]], list[str]]:
    """Compares two predictor folders.

    Returns:
        A table of what differs in config.json, with a header; and sentences about the model and about the sources
        that both choose for each folder's golden inputs, under the settings of the first.

    Raises:
        scr_runtime.errors.PredictorError: If a folder can't be used.
    """
    predictors = [load_predictor(folder, verify=True) for folder in (first, second)]
    flat = [_flat(predictor.info) for predictor in predictors]
    rows = [["key", "first", "second", "change"]]
    for key in dict.fromkeys([*flat[0], *flat[1]]):
        one, other = (values.get(key, "-") for values in flat)
        if one != other and key not in _SEALS:
            numbers = isinstance(one, int | float) and isinstance(other, int | float)
            rows.append([key, _shown(one), _shown(other), f"{other - one:+.4g}" if numbers else ""])
    return rows, [_model(flat), *_agreement(predictors, (first, second))]


def _model(flat: list[dict[str, Any]]) -> str:
    same = all(flat[0].get(key) == flat[1].get(key) for key in ("model.family", "model.embedding_probe"))
    return "both are for the same model" if same else "they are for different models: their input embeddings differ"


def _agreement(predictors: list[SourcePredictor], folders: tuple[Path, Path]) -> list[str]:
    if predictors[0].config.hidden_size != predictors[1].config.hidden_size:
        return ["agreement of sources: not known, since they read states of different sizes"]
    scr, found = SCRConfig.from_dict(predictors[0].info["scr"]), []
    for name, folder in zip(("first", "second"), folders, strict=True):
        inputs = load_file(folder / GOLDEN_NAME)
        one, other = (golden_outputs(predictor, inputs, scr) for predictor in predictors)
        shared = (one["sources"][:, :, None] == other["sources"][:, None, :]).any(-1).float().mean()
        order = torch.stack([one["scores"].flatten(), other["scores"].flatten()])
        found.append(
            f"golden inputs of the {name}: {float(shared):.0%} of {one['sources'].shape[1]} sources in common, "
            f"correlation of scores {float(torch.corrcoef(order)[0, 1]):.3f}"
        )
    return found


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _shown(value: Any) -> str:
    text = f"{value:.5g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
