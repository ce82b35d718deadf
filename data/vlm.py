"""Loads a vision-language model and its processor, and turns (image, text) pairs into a padded batch."""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image as PILImage
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.feature_extraction_utils import BatchFeature

from data.errors import ModelLoadError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FULL_HASH_BYTES = 2 * 1024**3  # above this only the files' headers and sizes go into the weights' checksum
# say how a model is run or by which release it was written, not what it is
_VOLATILE_KEYS = {
    "_name_or_path", "_commit_hash", "transformers_version", "attn_implementation", "_attn_implementation",
    "_attn_implementation_internal", "dtype", "torch_dtype",
}  # fmt: skip


def load_vlm(
    hub_id: str,
    revision: str | None = None,
    dtype: str = "auto",
    attn_implementation: str = "sdpa",
    device: str = "auto",
) -> tuple[Any, Any]:
    """Loads a model for evaluation, with a left-padding processor.

    Args:
        hub_id: Hugging Face hub id, or a folder with `config.json`, `*.safetensors` and the processor's files.
        revision: branch, tag or commit on the hub.
        dtype: float32, bfloat16, float16, or "auto": the checkpoint's own on an accelerator, float32 on a CPU.
        attn_implementation: what the model computes attention with.
        device: "auto" (an accelerator if there is one, else the CPU) or a torch device.

    Returns:
        The model in eval mode on its device, and its processor.

    Raises:
        ModelLoadError: nothing loadable lies there, or weights are missing in the checkpoint.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ModelLoadError(f"model.dtype={dtype!r}: use auto, {', '.join(DTYPES)}")
    if hub_id.startswith(("/", ".", "~")) and not Path(hub_id).is_dir():
        raise ModelLoadError(f"model.hub_id={hub_id!r}: there is no such folder")
    target = _resolve_device(device)
    wanted = DTYPES.get(dtype, "auto" if target.type != "cpu" else torch.float32)
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            hub_id,
            revision=revision,
            dtype=wanted,
            attn_implementation=attn_implementation,
            output_loading_info=True,
        )
        model, info = loaded
        processor = AutoProcessor.from_pretrained(hub_id, revision=revision)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelLoadError(_cannot_load(hub_id, revision, error)) from error
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise ModelLoadError(
            f"{hub_id} lacks {len(names)} weights of its architecture ({', '.join(names[:3])} ...): they would be "
            "random. The checkpoint is incomplete or belongs to another model class."
        )
    if getattr(processor, "chat_template", None) is None and processor.tokenizer.chat_template is None:
        raise ModelLoadError(f"{hub_id} has no chat template: add chat_template.jinja beside its processor.")
    processor.tokenizer.padding_side = "left"  # the last position is the one that answers, in every row
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return model.to(target).eval(), processor


def _resolve_device(device: str) -> torch.device:
    if device == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise ModelLoadError(f"model.device={device!r}: use auto, cpu, cuda, cuda:N or mps") from error
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ModelLoadError(f"model.device={device!r}, but torch sees no CUDA device: use model.device=cpu or auto")
    return target


def _cannot_load(hub_id: str, revision: str | None, error: Exception) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    if len(reason) > 300:
        reason = reason[:300] + " ..."
    where = f"the folder {hub_id}" if Path(hub_id).is_dir() else f"{hub_id!r}"
    if revision is not None:
        where += f" at revision {revision!r}"
    return (
        f"cannot load a vision-language model from {where}: {type(error).__name__}: {reason}\n"
        "Set model.hub_id to a folder with config.json, *.safetensors and the processor's files, or to an id on the "
        f"Hugging Face hub (fetch it where there is a network: `hf download {hub_id}`; gated models need "
        "`hf auth login`)."
    )


def chat_inputs(processor: Any, images: Sequence[PILImage], texts: Sequence[str]) -> BatchFeature:
    """One user turn per row, image first, through the model's own chat template.

    Args:
        processor: as returned by `load_vlm`.
        images: one RGB image per row.
        texts: one text per row.

    Returns:
        The model's inputs on the CPU, left padded: `input_ids` and `attention_mask` [B, S], `pixel_values`, ...
    """
    if len(images) != len(texts):
        raise ValueError(f"{len(images)} images for {len(texts)} texts: give one image per text")
    conversations = [_conversation(image, text) for image, text in zip(images, texts, strict=True)]
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )


def _conversation(image: PILImage, text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]


class TokenCounter:
    """Tells how many tokens a prompt about an image has, without preprocessing every image for it.

    How many of them are visual follows from the image's size alone: an image of each size is preprocessed once.

    Args:
        processor: as returned by `load_vlm`.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._visual: dict[tuple[int, int], int] = {}  # image size -> tokens beyond those of the text

    def __call__(self, image: PILImage, text: str) -> int:
        """Visual and text tokens of one row of `chat_inputs`, without padding."""
        told = self._text_tokens(image, text)
        if image.size not in self._visual:
            inputs = chat_inputs(self._processor, [image], [text])
            self._visual[image.size] = inputs["input_ids"].shape[1] - told
        return told + self._visual[image.size]

    def _text_tokens(self, image: PILImage, text: str) -> int:
        written = self._processor.apply_chat_template(_conversation(image, text), add_generation_prompt=True)
        return len(self._processor.tokenizer(written)["input_ids"])


def shared_chat_inputs(
    processor: Any, images: Sequence[PILImage], texts: Sequence[Sequence[str]]
) -> tuple[BatchFeature, int]:
    """`chat_inputs` of several texts about each image, which is preprocessed once.

    Args:
        processor: as returned by `load_vlm`.
        images: RGB images.
        texts: the texts about each image, equally many for all.

    Returns:
        The inputs, and how many successive rows each image of `pixel_values` serves. Where a processor does not give
        one array per image (tiles, patches of differing numbers), that is 1, and pixels come once per row.
    """
    [repeats] = {len(about) for about in texts}
    rows = [image for image in images for _ in range(repeats)]
    flat = [text for about in texts for text in about]
    if repeats == 1:
        return chat_inputs(processor, rows, flat), 1
    once = _EachImageOnce(processor.image_processor, images, repeats)
    sharing = copy.copy(processor)
    sharing.image_processor = once
    inputs = chat_inputs(sharing, rows, flat)
    if once.pixels is None:
        return inputs, 1
    inputs["pixel_values"] = once.pixels
    return inputs, repeats


class _EachImageOnce:
    """Stands in for an image processor: preprocesses each image once, and repeats the result for its prompts."""

    def __init__(self, image_processor: Any, images: Sequence[PILImage], repeats: int) -> None:
        self._inner = image_processor
        self._images = list(images)
        self._repeats = repeats
        self.pixels: torch.Tensor | None = None

    def __call__(self, images: Any, **settings: Any) -> BatchFeature:
        outputs = self._inner(self._images, **settings)
        pixels = outputs["pixel_values"]
        one_each = isinstance(pixels, torch.Tensor) and pixels.ndim == 4 and len(pixels) == len(self._images)
        if outputs.keys() != {"pixel_values"} or not one_each:
            return self._inner(images, **settings)
        self.pixels = pixels
        return BatchFeature({"pixel_values": pixels.repeat_interleave(self._repeats, 0)})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def unprocessed(processor: Any, image: PILImage) -> NDArray[np.uint8]:
    """The part of an image that the model sees, as it sees it: resized and cropped by the processor, [H, W, 3]."""
    settings = processor.image_processor
    pixels = settings(images=image, return_tensors="np")["pixel_values"][0]  # [3, H, W]
    mean, deviation = np.array(settings.image_mean), np.array(settings.image_std)
    scaled = pixels.transpose(1, 2, 0) * deviation + mean
    return (scaled * 255).round().clip(0, 255).astype(np.uint8)


def fingerprint(model: Any, processor: Any) -> dict[str, Any]:
    """What must be equal for two runs to see the same states and maps, up to rounding.

    Returns:
        `hub_id` (of a folder: its name), `revision` (the resolved commit, if the hub told one), `config_sha256`,
        `weights_sha256` (of a local folder; None otherwise, where the commit stands for it), `image_processor` (class
        name: it differs between image back ends, whose pixels differ), `dtype`.
    """
    name = str(model.config._name_or_path or "")
    folder = Path(name) if name and Path(name).is_dir() else None
    settings = {**_stable(model.config.to_dict()), "architectures": [type(model).__name__]}  # null until it is saved
    config = json.dumps(settings, sort_keys=True, default=str)
    return {
        "hub_id": folder.resolve().name if folder else name,
        "revision": getattr(model.config, "_commit_hash", None),
        "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
        "weights_sha256": _weights_sha256(folder) if folder else None,
        "image_processor": type(processor.image_processor).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def library_versions() -> dict[str, str]:
    """Versions of what computes states and maps."""
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
