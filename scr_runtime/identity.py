"""Which model a predictor belongs to: described when it is saved, compared when it is used."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scr_runtime.artifact import PROBE, load_predictor, stored_info
from scr_runtime.config import Mode, SCRConfig
from scr_runtime.errors import ConfigurationError, PredictorError, PredictorMismatchError
from scr_runtime.families import blocks_of, family_of, generative_model
from scr_runtime.network import SourcePredictor
from scr_runtime.places import Place, local_folder

logger = logging.getLogger("scr_runtime")

_SNAPSHOT = re.compile(r"models--([^/\\]+)[/\\]snapshots[/\\][0-9a-f]+")  # of the Hub's cache
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_HOW_IT_RUNS = ("_name_or_path", "_commit_hash", "transformers_version", "dtype", "torch_dtype", "architectures")

Given = Place | SourcePredictor | None


def describe_model(model: Any, processor: Any = None) -> dict[str, Any]:
    """Describes a model by what sets it apart from others: a predictor folder stores it, the runtime compares it.

    The probe, 32 evenly spaced entries of the input embedding, separates models of one architecture; it is compared
    loosely, so that a predictor survives a change of dtype.

    Args:
        model: A model of a supported family.
        processor: Its processor; the class of its image processor is kept, since other image back ends make
            other pixels of the same image.

    Returns:
        Plain values: ``name`` (see ``public_name``), ``revision`` (the Hub's commit; ``None`` for a local folder),
        ``family``, ``hidden_size``, ``num_blocks``, ``image_backend`` (``None`` without a processor),
        ``embedding_probe`` (``None`` where the weights are offloaded).
    """
    model = generative_model(model)
    return {"name": public_name(model), **_facts(model, processor)}


def public_name(model: Any) -> str:
    """A model's name for other machines, without a path of this one.

    Returns:
        Its Hub id. Of a local folder, its last part and eight digits of a checksum of the model's configuration and
        input embeddings, such as ``scene-llava-1a2b3c4d``. The class's name for a model that was made in memory.
    """
    place = str(getattr(model.config, "_name_or_path", "") or "")
    if (cached := _SNAPSHOT.search(place)) is not None:
        return cached[1].replace("--", "/")
    if not place:
        return type(model).__name__
    if _HUB_NAME.fullmatch(place) and place.strip(".") and not os.path.isdir(place):
        return place
    settings: Any = json.loads(model.config.to_json_string(use_diff=False))
    text = json.dumps([_without(settings), _rounded(_probe(model))], sort_keys=True)
    last = Path(place.replace("\\", "/")).absolute().name
    return f"{last}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _without(value: Any) -> Any:
    """A configuration without what says how or where a model runs, and not which it is."""
    if isinstance(value, dict):
        items: dict[str, Any] = value  # pyright: ignore[reportUnknownVariableType]
        return {key: _without(inner) for key, inner in items.items() if key not in _HOW_IT_RUNS}
    return value


def _rounded(probe: list[float] | None) -> list[float] | None:
    """A probe in bfloat16, so that a model has one name in float32 and in that."""
    return None if probe is None else torch.tensor(probe).bfloat16().tolist()


def _facts(model: Any, processor: Any) -> dict[str, Any]:
    """What ``describe_model`` says of a model beside its name."""
    family = family_of(model)
    image_processor = getattr(processor, "image_processor", processor)
    return {
        "revision": getattr(model.config, "_commit_hash", None),
        "family": family.name,
        "hidden_size": int(family.text_config(model).hidden_size),
        "num_blocks": len(blocks_of(model)),
        "image_backend": None if processor is None else type(image_processor).__name__,
        "embedding_probe": _probe(model),
    }


def _probe(model: Any) -> list[float] | None:
    """32 entries of the input embedding; ``None`` where its weights are offloaded."""
    table: Tensor = model.get_input_embeddings().weight
    return (
        None if table.device.type == "meta" else probe_of(lambda tokens: table[tokens.to(table.device)], table.shape)
    )


def probe_of(embed: Callable[[Tensor], Tensor], shape: Sequence[int]) -> list[float]:
    """32 evenly spaced entries of an input embedding.

    Args:
        embed: Token ids [N] -> their embeddings [N, d].
        shape: V, d.
    """
    words, size = shape
    places = torch.linspace(0, words * size - 1, PROBE + 2, dtype=torch.float64).long()[1:-1]
    columns = (places % size)[:, None]
    rows = embed(places // size).detach()
    return rows.gather(1, columns.to(rows.device))[:, 0].float().tolist()


def model_differences(expected: Mapping[str, Any], model: Any, processor: Any = None) -> list[str]:
    """Lists in words how a model, and its processor if given, differ from what a predictor was fitted for."""
    model = generative_model(model)
    return fact_differences(expected, {"name": public_name(model), **_facts(model, processor)})


def fact_differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Lists in words how what ``describe_model`` says of two models differs; what is ``None`` in one is not known."""
    keys = ["family", "hidden_size", "num_blocks"]
    if found["image_backend"] is not None and expected.get("image_backend") is not None:
        keys.append("image_backend")
    if found["revision"] and expected.get("revision") and expected.get("name") == found["name"]:
        keys.append("revision")
    problems = [
        f"{key} is {found[key]!r}, the predictor expects {expected.get(key)!r}"
        for key in keys
        if found[key] != expected.get(key)
    ]
    if not problems:
        problems += embedding_differences(expected.get("embedding_probe"), found["embedding_probe"])
    return problems


def embedding_differences(expected: list[float] | None, found: list[float] | None) -> list[str]:
    """Says in words if two probes of input embeddings are not those of one model."""
    if expected is None or found is None:
        return []
    scale = max(abs(value) for value in expected) or 1.0
    worst = max((abs(a - b) for a, b in zip(expected, found, strict=True)), default=math.inf)
    if worst <= 0.02 * scale:  # NaN is not
        return []
    return [f"its input embeddings differ (by up to {worst:.3g}): these are other weights"]


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


def choose(
    given: Given, model: Any, mode: Mode, processor: Any, config: SCRConfig | None, revision: str | None
) -> tuple[SourcePredictor | None, SCRConfig, str | None]:
    """The predictor and the settings of an SCR. Called by ``SCR.__init__``, whose caller is warned.

    Returns:
        The predictor, the settings, and why there is no predictor where the mode would ask it.

    Raises:
        ConfigurationError: In mode ``"one-pass"``, if no predictor is given; if there are no settings.
        PredictorError: In every mode but ``"auto"`` and ``"off"``, if it can't be used.
    """
    with contextlib.ExitStack() as fetched:
        predictor, reason = None, None
        try:
            if isinstance(given, str | os.PathLike) and mode != "off":
                given = fetched.enter_context(local_folder(given, revision))
            if mode in ("one-pass", "auto"):
                predictor = usable_predictor(given, model, processor, config)
            elif mode != "off" and isinstance(given, Path):
                predictor = load_predictor(given)  # only what it was fitted with is of use
            elif isinstance(given, SourcePredictor):
                predictor = given
        except (PredictorError, ConfigurationError) as error:
            if mode != "auto":
                raise
            reason = str(error)
        return predictor, _choose_settings(predictor or given, model, mode, config, reason), reason


def _choose_settings(given: Given, model: Any, mode: Mode, config: SCRConfig | None, reason: str | None) -> SCRConfig:
    """The settings of an SCR: those given, else the predictor's.

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
        warnings.warn(message, RuntimeWarning, stacklevel=4)
        logger.info(message)
        return settings
    fitted = fitted_settings(given)
    if config is not None:
        if mode in ("one-pass", "auto"):
            warn_of_other_settings(config, fitted, stacklevel=5)
        return config
    if fitted is not None:
        return fitted
    if mode == "off":
        return SCRConfig()
    raise ConfigurationError("no settings: give config=SCRConfig(...), or a predictor folder that holds them")


def fitted_settings(given: Given) -> SCRConfig | None:
    """The settings that a loaded predictor was fitted with; ``None`` if it was not loaded from a folder."""
    info = given.info if isinstance(given, SourcePredictor) else {}
    return SCRConfig.from_dict(info["scr"]) if info else None


def _settings_without(given: Given, num_blocks: int) -> tuple[SCRConfig, str]:
    """Settings where the predictor can't be used, and what they are in words."""
    try:
        info = given.info if isinstance(given, SourcePredictor) else stored_info(given)
        if info and info["model"].get("num_blocks", num_blocks) == num_blocks:
            stored = SCRConfig.from_dict(info["scr"])
            stored.check_depth(num_blocks)
            return stored, f" with the folder's settings ({_ranges(stored)})"
    except (ConfigurationError, PredictorError):
        pass
    scaled = SCRConfig.for_depth(num_blocks)
    return scaled, f" with the paper's settings for LLaVA-1.5, scaled to {num_blocks} blocks ({_ranges(scaled)})"


def _ranges(config: SCRConfig) -> str:
    return f"{config.sources_in_words}, edit_layers={config.edit_layers}, attention_layers={config.attention_layers}"


def warn_of_other_settings(config: SCRConfig, fitted: SCRConfig | None, stacklevel: int) -> None:
    """Warns, with both values, where the settings in force are not those that a predictor was fitted with."""
    mine, theirs = config.to_dict(), (config if fitted is None else fitted).to_dict()
    other = [f"{key} is {mine[key]!r}, was {theirs[key]!r}" for key in mine if mine[key] != theirs[key]]
    if other:
        warnings.warn(
            f"the predictor was fitted and calibrated with other settings: {'; '.join(other)}. Its threshold and its "
            "metrics don't mean the same here.",
            RuntimeWarning,
            stacklevel=stacklevel,
        )
