"""Loads a vision-language model and its processor, and identifies them."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from data.chat import chat_inputs, chat_template
from data.errors import ModelLoadError, UnreadableFileError
from data.files import is_count, open_regular
from data.settings import Dtype, VLMSettings
from data.wording import CAPTION_PROMPT
from scr_runtime.families import FAMILIES

DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FULL_HASH_BYTES = 2 * 1024**3  # above this, the weights' checksum covers the files' headers and sizes only
_HEADER_BYTES = 100_000_000  # of a safetensors file, at most: the limit of the format's own readers
_TEXT_BYTES = 1 << 28  # of any other file of a model's folder: a tokenizer.json has tens of megabytes
# keys that describe how a model runs, or which release wrote it, not which model it is
_VOLATILE_KEYS = {
    "_name_or_path", "_commit_hash", "transformers_version", "attn_implementation", "_attn_implementation",
    "_attn_implementation_internal", "dtype", "torch_dtype",
}  # fmt: skip
_PROCESSOR_FILES = (
    "processor_config.json", "preprocessor_config.json", "chat_template.*", "additional_chat_templates/*",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.tiktoken", "*.model",
)  # fmt: skip
_PACKAGES = {"vision": "pillow", "jinja": "jinja2", "pil": "pillow", "torchvision": "torchvision"}  # by transformers


# -- loading ---------------------------------------------------------------------------------------------------------


def model_config(settings: VLMSettings) -> Any:
    """The transformers configuration of a model: its class, depth and width, without its weights.

    Raises:
        ModelLoadError: the folder or the hub id holds no model, or one of a family that SCR does not know.
    """
    place = settings.location
    _check_folder(place)
    with _explained(settings):
        config = AutoConfig.from_pretrained(
            place, revision=settings.revision, trust_remote_code=False, local_files_only=_without_hub(place)
        )
        sizes = config.get_text_config()
        wrong = {
            key: value
            for key in ("num_hidden_layers", "hidden_size")
            if not is_count(value := getattr(sizes, key, None), 1)
        }
    if config.model_type not in FAMILIES:
        raise ModelLoadError(
            f"{place} is a model of type {config.model_type!r}, whose blocks and patches SCR does not know. Set "
            f"model.hub_id to one of {', '.join(sorted(FAMILIES))}; docs/families.md shows how a family is added."
        )
    if wrong:
        raise ModelLoadError(f"{place}: its config.json has impossible sizes: {wrong}. Fetch it again.")
    return config


def load_vlm(settings: VLMSettings) -> tuple[Any, Any]:
    """Loads a model for evaluation, with a left-padding processor.

    What takes no time is checked first: the configuration, then the processor, and the weights last.

    Args:
        settings: which model, its number format (auto: the checkpoint's own on an accelerator, float32 on a CPU), its
            attention kernel, and its device (auto: an accelerator if there is one, else the CPU). A folder has to
            hold `config.json`, `*.safetensors` and the processor's files.

    Returns:
        The model in eval mode on its device, and its processor.

    Raises:
        ModelLoadError: the folder or the hub id holds no model, no processor with a chat template, or not all weights;
            or a package that they need is not installed.
    """
    place, revision = settings.location, settings.revision
    target = _resolve_device(settings.device)
    dtype = DTYPES.get(settings.dtype, "auto" if target.type != "cpu" else torch.float32)
    config = model_config(settings)
    processor = load_processor(settings, config)
    with _explained(settings):
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            place,
            revision=revision,
            dtype=dtype,
            attn_implementation=settings.attn_implementation,
            output_loading_info=True,
            trust_remote_code=False,
            local_files_only=_without_hub(place),
        )
        model, info = loaded
        missing = sorted(info["missing_keys"])
    if missing:
        raise ModelLoadError(
            f"{place} lacks {len(missing)} weights of its architecture ({', '.join(missing[:3])} ...): they would be "
            "random. The checkpoint is incomplete or belongs to another model class."
        )
    with _explained(settings):
        return model.to(target).eval(), processor


def load_processor(settings: VLMSettings, config: Any) -> Any:
    """The left-padding processor of a model, once it has made a prompt about an image.

    Args:
        settings: which model.
        config: its `model_config`.

    Raises:
        ModelLoadError: there is none that can be used.
    """
    place = settings.location
    with _explained(settings):
        processor = AutoProcessor.from_pretrained(
            place, revision=settings.revision, trust_remote_code=False, local_files_only=_without_hub(place)
        )
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or getattr(processor, "image_processor", None) is None:
        raise ModelLoadError(
            f"{place} holds no processor for images and text (found: {type(processor).__name__}): add its "
            "processor_config.json or preprocessor_config.json, and its tokenizer's files."
        )
    if chat_template(processor) is None:
        raise ModelLoadError(f"{place} has no chat template: add chat_template.jinja beside its processor.")
    tokenizer.padding_side = "left"  # the last position is the one that answers, in every row
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    try:
        ids = chat_inputs(processor, [Image.new("RGB", (64, 48))], [CAPTION_PROMPT])["input_ids"]  # [1, S]
    except ImportError as error:
        raise ModelLoadError(_lacks_package(place, error)) from error
    except Exception as error:  # templates and processors raise errors of every kind
        raise ModelLoadError(
            f"{place}: its processor and chat template cannot make a prompt about an image: {_reason(error)}\nFetch "
            "processor_config.json, the tokenizer's files and chat_template.jinja again."
        ) from error
    token = getattr(config, "image_token_id", None)
    if token is not None and not bool((ids == token).any()):
        raise ModelLoadError(
            f"{place}: its chat template leaves the image out of the prompt (no token {token}). Use the chat_template"
            ".jinja that belongs to this model."
        )
    return processor


def _without_hub(place: str) -> bool:
    """Whether a model of the Hub is looked for in the cache alone: its files would be asked for six times each.

    So it is where the Hub's name can't be looked up, and no proxy does that.
    """
    if Path(place).is_dir() or urllib.request.getproxies():
        return False
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT).hostname, None)
    except OSError:
        return True
    return False


def _check_folder(place: str) -> None:
    """Checks the files of a local folder before a library opens them: it would wait for a FIFO for ever."""
    folder = Path(place)
    if folder.is_file():
        raise ModelLoadError(f"model.hub_id={place!r} is a file: give the folder that holds config.json")
    if not folder.is_dir():
        if place.startswith(("/", ".", "~")) or place.count("/") > 1:  # an id on the hub has one at most
            raise ModelLoadError(f"model.hub_id={place!r}: there is no such folder")
        return
    try:
        files = [file for file in folder.iterdir() if file.suffix and not file.name.startswith(".")]
        for file in files:
            if file.is_dir():
                continue
            with open_regular(file) as stream:
                size = os.fstat(stream.fileno()).st_size
            if file.suffix in (".json", ".jinja", ".txt") and size > _TEXT_BYTES:
                raise UnreadableFileError(file, f"has {size:,} bytes, and at most {_TEXT_BYTES:,} are expected")
    except (OSError, UnreadableFileError) as error:
        raise ModelLoadError(f"cannot load a vision-language model from the folder {place}: {error}") from error


def _resolve_device(device: str) -> torch.device:
    if device == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    target = torch.device(device)
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ModelLoadError(f"model.device={device!r}, but torch sees no CUDA device: use model.device=cpu or auto")
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise ModelLoadError(f"model.device={device!r}, but torch sees {torch.cuda.device_count()} CUDA devices")
    if target.type == "mps" and not torch.backends.mps.is_available():
        raise ModelLoadError(f"model.device={device!r}, but torch sees no such device: use model.device=cpu or auto")
    return target


# -- errors ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _explained(settings: VLMSettings) -> Iterator[None]:
    """Turns whatever the libraries raise, for whatever is in a folder, into a ModelLoadError."""
    place = settings.location
    try:
        yield
    except ImportError as error:
        raise ModelLoadError(_lacks_package(place, error)) from error
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ModelLoadError(
            f"{place} does not fit into memory ({_reason(error)}): use model.dtype=bfloat16, a smaller model, or "
            "another model.device."
        ) from error
    except Exception as error:
        raise ModelLoadError(_cannot_load(place, settings.revision, error)) from error


def _cannot_load(place: str, revision: str | None, error: Exception) -> str:
    local = Path(place).is_dir()
    where = f"the folder {place}" if local else f"{place!r}"
    if revision is not None:
        where += f" at revision {revision!r}"
    way_out = (
        "A folder that model.hub_id names has to hold config.json, *.safetensors and the processor's files, as "
        "`save_pretrained` or a download writes them: copy or fetch it again."
        if local
        else "Set model.hub_id to a folder with config.json, *.safetensors and the processor's files, or to an id on "
        f"the Hugging Face hub (fetch it where there is a network: `hf download {place}`; gated models need "
        "`hf auth login`)."
    )
    return f"cannot load a vision-language model from {where}: {_reason(error)}\n{way_out}"


def _lacks_package(place: str, error: ImportError) -> str:
    """Names the package that an ImportError is about, and the line that installs it."""
    text = str(error)
    named = re.search(r"pip install ([\w.-]+)", text) or re.search(r"[Pp]ackages? [`'\"]?([\w.-]+)", text)
    named = re.search(r"requires the ([\w.-]+) library", text) or named
    package = getattr(error, "name", None) or (named[1] if named else None)
    if package is None:
        return f"{place} needs a package that is not installed: {_reason(error)}"
    package = _PACKAGES.get(package.lower(), package.lower().split(".")[0])
    return f"{place} needs the package {package}, which is not installed: pip install {package}\n({_reason(error)})"


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= 300 else text[:300] + " ..."


# -- identity --------------------------------------------------------------------------------------------------------


def model_identity(model: Any, processor: Any) -> dict[str, Any]:
    """What must be equal for two runs to see the same states and maps, up to rounding.

    Returns:
        `hub_id` (of a folder: its name), `revision` (the resolved commit, if it came from the hub), `config_sha256`,
        `weights_sha256` (of a local folder; None otherwise, where the commit stands for it), `image_processor` (class
        name: it differs between image back ends, whose pixels differ), `dtype`; and of a local folder
        `processor_sha256`, of the files of processor, tokenizer and chat template.
    """
    name = str(model.config._name_or_path or "")
    folder = _folder(name)
    processor_folder = _folder(str(getattr(processor.tokenizer, "name_or_path", ""))) or folder
    stable = {**_stable(model.config.to_dict()), "architectures": [type(model).__name__]}  # null until it is saved
    config = json.dumps(stable, sort_keys=True, default=str)
    identity = {
        "hub_id": folder.resolve().name if folder else name,
        "revision": getattr(model.config, "_commit_hash", None),
        "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
        "weights_sha256": _weights_sha256(folder) if folder else None,
        "image_processor": type(processor.image_processor).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    return identity | ({"processor_sha256": _processor_sha256(processor_folder)} if processor_folder else {})


def library_versions() -> dict[str, str]:
    """Versions of the libraries that compute states and maps."""
    names = ("torch", "transformers", "pillow", "datasets", "safetensors", "numpy")
    return {name: importlib.metadata.version(name) for name in names}


def _folder(name: str) -> Path | None:
    return Path(name) if name and Path(name).is_dir() else None


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
        with open_regular(file) as stream:
            if full:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
            else:
                size = int.from_bytes(stream.read(8), "little")
                if size > _HEADER_BYTES:
                    raise ModelLoadError(f"{file} is no safetensors file: its header would have {size:,} bytes")
                digest.update(stream.read(size) + str(file.stat().st_size).encode())
    return digest.hexdigest()


def _processor_sha256(folder: Path) -> str:
    """Checksum of the files that decide which pixels and tokens the model sees."""
    files = {file for pattern in _PROCESSOR_FILES for file in folder.glob(pattern) if file.is_file()}
    digest = hashlib.sha256()
    for file in sorted(files):
        with open_regular(file) as stream:
            digest.update(file.relative_to(folder).as_posix().encode() + b"\0")
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
