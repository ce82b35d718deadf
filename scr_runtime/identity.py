"""Which model a predictor belongs to: described when it is saved, compared when it is used."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from scr_runtime.artifact import load_predictor
from scr_runtime.config import SCRConfig
from scr_runtime.errors import ConfigurationError, PredictorMismatchError
from scr_runtime.families import family_of
from scr_runtime.network import SourcePredictor


def describe_model(model: Any, processor: Any = None) -> dict[str, Any]:
    """Describes a model by what sets it apart from others: a predictor folder stores it, the runtime compares it.

    The probe, 32 evenly spaced entries of the input embedding, separates models of one architecture; it is compared
    loosely, so that a predictor survives a change of dtype.

    Args:
        model: A model of a supported family.
        processor: Its processor; the class of its image processor is kept, since other image back ends make
            other pixels of the same image.

    Returns:
        Plain values: ``name``, ``revision``, ``family``, ``hidden_size``, ``num_blocks``, ``image_backend`` (``None``
        without a processor), ``embedding_probe``.
    """
    family = family_of(model)
    table: Tensor = model.get_input_embeddings().weight.detach()
    places = torch.linspace(0, table.numel() - 1, 34, dtype=torch.float64).long()[1:-1].to(table.device)
    image_processor = getattr(processor, "image_processor", processor)
    return {
        "name": str(getattr(model.config, "_name_or_path", "") or type(model).__name__),
        "revision": getattr(model.config, "_commit_hash", None),
        "family": family.name,
        "hidden_size": int(family.text_config(model).hidden_size),
        "num_blocks": len(family.blocks(model)),
        "image_backend": None if processor is None else type(image_processor).__name__,
        "embedding_probe": [float(value) for value in table.view(-1)[places].float().tolist()],
    }


def model_differences(expected: Mapping[str, Any], model: Any, processor: Any = None) -> list[str]:
    """Lists in words how a model, and its processor if given, differ from what a predictor was fitted for."""
    found = describe_model(model, processor)
    keys = ["family", "hidden_size", "num_blocks"]
    if found["image_backend"] is not None and expected.get("image_backend") is not None:
        keys.append("image_backend")
    problems = [
        f"{key} is {found[key]!r}, the predictor expects {expected.get(key)!r}"
        for key in keys
        if found[key] != expected.get(key)
    ]
    probe, mine = expected.get("embedding_probe"), found["embedding_probe"]
    if not problems and probe is not None:
        scale = max(abs(value) for value in probe) or 1.0
        worst = max(abs(a - b) for a, b in zip(probe, mine, strict=True))
        if worst > 0.02 * scale:
            problems.append(f"its input embeddings differ (by up to {worst:.3g}): these are other weights")
    return problems


def usable_predictor(
    given: str | os.PathLike[str] | SourcePredictor | None,
    model: Any,
    processor: Any = None,
    config: SCRConfig | None = None,
) -> SourcePredictor:
    """Returns a predictor that serves a model under these settings, on the device of the model's first block.

    Args:
        given: A predictor folder, or a predictor; one that was not loaded from a folder is compared in hidden size
            alone.
        model: A model of a supported family.
        processor: The model's processor, to compare its image back end.
        config: The settings in force, whose ``state_layer`` has to be the predictor's; ``None`` takes the predictor's.

    Raises:
        ConfigurationError: If none is given.
        PredictorError: If it is missing, corrupt or made for another model.
    """
    if given is None:
        raise ConfigurationError("no predictor was given: pass predictor=FOLDER")
    predictor = given if isinstance(given, SourcePredictor) else load_predictor(given)
    problems = _mismatches(predictor, model, processor, config)
    if problems:
        raise PredictorMismatchError("the predictor is for another model: " + "; ".join(problems))
    return predictor.to(next(family_of(model).blocks(model)[0].parameters()).device)


def _mismatches(predictor: SourcePredictor, model: Any, processor: Any, config: SCRConfig | None) -> list[str]:
    if not predictor.info:
        size, found = family_of(model).text_config(model).hidden_size, predictor.config.hidden_size
        return [] if found == size else [f"hidden_size is {size}, the predictor expects {found}"]
    problems = model_differences(predictor.info["model"], model, processor)
    fitted = SCRConfig.from_dict(predictor.info["scr"]).state_layer
    if config is not None and config.state_layer != fitted:
        problems.append(f"state_layer is {config.state_layer}, the predictor reads block {fitted}")
    return problems
