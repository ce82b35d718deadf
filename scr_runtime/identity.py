"""Which model a predictor belongs to: described when it is saved, compared when it is used."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from scr_runtime.artifact import PROBE, load_predictor, stored_settings
from scr_runtime.config import Mode, SCRConfig
from scr_runtime.errors import ConfigurationError, PredictorError, PredictorMismatchError
from scr_runtime.families import blocks_of, family_of, generative_model
from scr_runtime.network import SourcePredictor

logger = logging.getLogger("scr_runtime")

_CALIBRATED_FOR = ("num_sources", "source_fraction", "exclude_border", "connectivity", "suppress_claimed")

Given = str | os.PathLike[str] | SourcePredictor | None


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
        without a processor), ``embedding_probe`` (``None`` where the weights are offloaded).
    """
    model = generative_model(model)
    family = family_of(model)
    image_processor = getattr(processor, "image_processor", processor)
    return {
        "name": str(getattr(model.config, "_name_or_path", "") or type(model).__name__),
        "revision": getattr(model.config, "_commit_hash", None),
        "family": family.name,
        "hidden_size": int(family.text_config(model).hidden_size),
        "num_blocks": len(blocks_of(model)),
        "image_backend": None if processor is None else type(image_processor).__name__,
        "embedding_probe": _probe(model),
    }


def _probe(model: Any) -> list[float] | None:
    """32 entries of the input embedding; ``None`` where its weights are offloaded."""
    table: Tensor = model.get_input_embeddings().weight.detach()
    if table.device.type == "meta":
        return None
    places = torch.linspace(0, table.numel() - 1, PROBE + 2, dtype=torch.float64).long()[1:-1].to(table.device)
    return [float(value) for value in table.reshape(-1)[places].float().tolist()]


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
    if not problems and probe is not None and mine is not None:
        scale = max(abs(value) for value in probe) or 1.0
        worst = max((abs(a - b) for a, b in zip(probe, mine, strict=True)), default=math.inf)
        if not worst <= 0.02 * scale:  # NaN is not
            problems.append(f"its input embeddings differ (by up to {worst:.3g}): these are other weights")
    return problems


def usable_predictor(
    given: Given, model: Any, processor: Any = None, config: SCRConfig | None = None
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
    device = next(blocks_of(model)[0].parameters()).device
    return predictor if device.type == "meta" else predictor.to(device)  # offloaded states say where they are


def _mismatches(predictor: SourcePredictor, model: Any, processor: Any, config: SCRConfig | None) -> list[str]:
    problems = model_differences(predictor.info["model"], model, processor) if predictor.info else []
    size, found = family_of(model).text_config(model).hidden_size, predictor.config.hidden_size
    if found != size and not problems:
        problems.append(f"hidden_size is {size}, the predictor expects {found}")
    if predictor.info:
        fitted = SCRConfig.from_dict(predictor.info["scr"])
        if config is None:  # they are in force then
            problems += _too_deep(fitted, len(blocks_of(model)))
        elif config.state_layer != fitted.state_layer:
            problems.append(f"state_layer is {config.state_layer}, the predictor reads block {fitted.state_layer}")
    return problems


def _too_deep(settings: SCRConfig, num_blocks: int) -> list[str]:
    try:
        settings.check_depth(num_blocks)
    except ConfigurationError as error:
        return [str(error)]
    return []


def choose_predictor(
    given: Given, model: Any, mode: Mode, processor: Any = None, config: SCRConfig | None = None
) -> tuple[SourcePredictor | None, str | None]:
    """The predictor of an SCR, and why there is none where the mode would ask it.

    Raises:
        ConfigurationError: In mode ``"one-pass"``, if none is given.
        PredictorError: In every mode but ``"auto"`` and ``"off"``, if it can't be used.
    """
    if mode == "off":
        return None, None
    if mode not in ("one-pass", "auto"):  # only what it was fitted with is of use
        return given if given is None or isinstance(given, SourcePredictor) else load_predictor(given), None
    try:
        return usable_predictor(given, model, processor, config), None
    except (PredictorError, ConfigurationError) as error:
        if mode == "one-pass":
            raise
        return None, str(error)


def choose_settings(given: Given, model: Any, mode: Mode, config: SCRConfig | None, reason: str | None) -> SCRConfig:
    """The settings of an SCR: those given, else the predictor's. Called by ``SCR.__init__``, whose caller is warned.

    Args:
        given: The predictor that is asked, or what was given as one.
        model: The model.
        mode: The SCR's.
        config: Given settings.
        reason: Why there is no predictor, where ``auto`` would ask one: it then runs two-pass, and needs no settings
            for that.

    Raises:
        ConfigurationError: If there are none.
    """
    if reason is not None:
        settings, words = (config, "") if config is not None else _settings_without(given, len(blocks_of(model)))
        message = f"predictor not usable, every prefill runs two-pass{words}: {reason}"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
        logger.info(message)
        return settings
    info = given.info if isinstance(given, SourcePredictor) else {}
    fitted = SCRConfig.from_dict(info["scr"]) if info else None
    if config is not None:
        if fitted is not None and mode in ("one-pass", "auto"):
            _warn_of_other_calibration(config, fitted)
        return config
    if fitted is not None:
        return fitted
    if mode == "off":
        return SCRConfig()
    raise ConfigurationError("no settings: give config=SCRConfig(...), or a predictor folder that holds them")


def _settings_without(given: Given, num_blocks: int) -> tuple[SCRConfig, str]:
    """Settings where the predictor can't be used, and what they are in words."""
    try:
        stored = stored_settings(given) if not isinstance(given, SourcePredictor) else None
        if isinstance(given, SourcePredictor) and given.info:
            stored = SCRConfig.from_dict(given.info["scr"])
        if stored is not None:
            stored.check_depth(num_blocks)
            return stored, f" with the folder's settings ({_ranges(stored)})"
    except (ConfigurationError, PredictorError):
        pass
    scaled = SCRConfig.for_depth(num_blocks)
    return scaled, f" with the paper's settings for LLaVA-1.5, scaled to {num_blocks} blocks ({_ranges(scaled)})"


def _ranges(config: SCRConfig) -> str:
    return f"edit_layers={config.edit_layers}, attention_layers={config.attention_layers}"


def _warn_of_other_calibration(config: SCRConfig, fitted: SCRConfig) -> None:
    mine, theirs = config.to_dict(), fitted.to_dict()
    other = [f"{key} is {mine[key]!r}, was {theirs[key]!r}" for key in _CALIBRATED_FOR if mine[key] != theirs[key]]
    if other:
        warnings.warn(
            f"the predictor's confidence was calibrated for other settings: {'; '.join(other)}. Its threshold does "
            "not mean the same share of fallbacks here.",
            RuntimeWarning,
            stacklevel=4,
        )
