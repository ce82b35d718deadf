"""Loads a vision-language model and its processor, and identifies them."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor

from data.errors import ModelLoadError
from data.settings import Dtype, VLMSettings

DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FULL_HASH_BYTES = 2 * 1024**3  # above this, the weights' checksum covers the files' headers and sizes only
# keys that describe how a model runs, or which release wrote it, not which model it is
_VOLATILE_KEYS = {
    "_name_or_path", "_commit_hash", "transformers_version", "attn_implementation", "_attn_implementation",
    "_attn_implementation_internal", "dtype", "torch_dtype",
}  # fmt: skip


def load_vlm(settings: VLMSettings) -> tuple[Any, Any]:
    """Loads a model for evaluation, with a left-padding processor.

    Args:
        settings: which model, its number format (auto: the checkpoint's own on an accelerator, float32 on a CPU), its
            attention kernel, and its device (auto: an accelerator if there is one, else the CPU). A folder has to
            hold `config.json`, `*.safetensors` and the processor's files.

    Returns:
        The model in eval mode on its device, and its processor.

    Raises:
        ModelLoadError: the folder or the hub id holds no model, or weights are missing in the checkpoint.
    """
    place = settings.location
    if place.startswith(("/", ".", "~")) and not Path(place).is_dir():
        raise ModelLoadError(f"model.hub_id={place!r}: there is no such folder")
    target = _resolve_device(settings.device)
    dtype = DTYPES.get(settings.dtype, "auto" if target.type != "cpu" else torch.float32)
    model, processor, missing = _load(settings, dtype)
    if missing:
        raise ModelLoadError(
            f"{place} lacks {len(missing)} weights of its architecture ({', '.join(missing[:3])} ...): they would be "
            "random. The checkpoint is incomplete or belongs to another model class."
        )
    if getattr(processor, "chat_template", None) is None and processor.tokenizer.chat_template is None:
        raise ModelLoadError(f"{place} has no chat template: add chat_template.jinja beside its processor.")
    processor.tokenizer.padding_side = "left"  # the last position is the one that answers, in every row
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return model.to(target).eval(), processor


def _load(settings: VLMSettings, dtype: torch.dtype | str) -> tuple[Any, Any, list[str]]:
    """Model, processor, and the names of weights that the checkpoint lacks."""
    place, revision = settings.location, settings.revision
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            place,
            revision=revision,
            dtype=dtype,
            attn_implementation=settings.attn_implementation,
            output_loading_info=True,
        )
        model, info = loaded
        processor = AutoProcessor.from_pretrained(place, revision=revision)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelLoadError(_cannot_load(place, revision, error)) from error
    return model, processor, sorted(info["missing_keys"])


def _resolve_device(device: str) -> torch.device:
    if device == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    target = torch.device(device)
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ModelLoadError(f"model.device={device!r}, but torch sees no CUDA device: use model.device=cpu or auto")
    return target


def _cannot_load(place: str, revision: str | None, error: Exception) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    if len(reason) > 300:
        reason = reason[:300] + " ..."
    where = f"the folder {place}" if Path(place).is_dir() else f"{place!r}"
    if revision is not None:
        where += f" at revision {revision!r}"
    return (
        f"cannot load a vision-language model from {where}: {type(error).__name__}: {reason}\n"
        "Set model.hub_id to a folder with config.json, *.safetensors and the processor's files, or to an id on the "
        f"Hugging Face hub (fetch it where there is a network: `hf download {place}`; gated models need "
        "`hf auth login`)."
    )


def model_identity(model: Any, processor: Any) -> dict[str, Any]:
    """What must be equal for two runs to see the same states and maps, up to rounding.

    Returns:
        `hub_id` (of a folder: its name), `revision` (the resolved commit, if it came from the hub), `config_sha256`,
        `weights_sha256` (of a local folder; None otherwise, where the commit stands for it), `image_processor` (class
        name: it differs between image back ends, whose pixels differ), `dtype`.
    """
    name = str(model.config._name_or_path or "")
    folder = Path(name) if name and Path(name).is_dir() else None
    stable = {**_stable(model.config.to_dict()), "architectures": [type(model).__name__]}  # null until it is saved
    config = json.dumps(stable, sort_keys=True, default=str)
    return {
        "hub_id": folder.resolve().name if folder else name,
        "revision": getattr(model.config, "_commit_hash", None),
        "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
        "weights_sha256": _weights_sha256(folder) if folder else None,
        "image_processor": type(processor.image_processor).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def library_versions() -> dict[str, str]:
    """Versions of the libraries that compute states and maps."""
    names = ("torch", "transformers", "pillow", "datasets", "safetensors", "numpy")
    return {name: importlib.metadata.version(name) for name in names}


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _stable(inner) for key, inner in value.items() if key not in _VOLATILE_KEYS}
    return value


def _weights_sha256(folder: Path) -> str | None:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return None
    digest = hashlib.sha256()
    full = sum(file.stat().st_size for file in files) <= _FULL_HASH_BYTES
    for file in files:
        with file.open("rb") as stream:
            if full:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
            else:
                header = stream.read(int.from_bytes(stream.read(8), "little"))
                digest.update(header + str(file.stat().st_size).encode())
    return digest.hexdigest()
