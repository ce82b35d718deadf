"""Where each VLM family keeps its decoder blocks, its visual tokens and its patch grids.

A new family is one entry in ``FAMILIES`` and the small functions it names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scr_runtime.errors import PrefillError, UnsupportedModelError
from scr_runtime.redistribute import Grid


@dataclass(frozen=True)
class ImageGrid:
    """The patch grid of one image.

    Attributes:
        grid: Rows and columns of patches.
        skip: Visual tokens before the first patch (a class token), never edited.
    """

    grid: Grid
    skip: int = 0

    @property
    def tokens(self) -> int:
        """Visual tokens that the image takes in the prompt."""
        return self.skip + self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Family:
    """How to find one family's parts.

    Attributes:
        name: The name that predictor folders and error messages use.
        blocks: Model -> its decoder blocks, in order.
        text_config: Model -> the config object that its decoder's attention reads.
        image_token_id: Model -> the placeholder token of a visual token.
        image_grids: Model and the call's keyword arguments -> one grid per image, in order of appearance.
    """

    name: str
    blocks: Callable[[Any], nn.ModuleList]
    text_config: Callable[[Any], Any]
    image_token_id: Callable[[Any], int]
    image_grids: Callable[[Any, Mapping[str, Any]], list[ImageGrid]]


def _llava_grids(model: Any, call: Mapping[str, Any]) -> list[ImageGrid]:
    """LLaVA-1.5: a square grid of image_size / patch_size; strategy "full" keeps the class token first."""
    vision = model.config.vision_config
    side: int = vision.image_size // vision.patch_size
    strategy = call.get("vision_feature_select_strategy") or model.config.vision_feature_select_strategy
    grid = ImageGrid((side, side), skip=0 if strategy == "default" else 1)
    images, tokens = _count_images(call)
    if tokens is not None and tokens != grid.tokens:
        raise PrefillError(
            f"an image came with {tokens} visual tokens, but a {side} x {side} grid with strategy {strategy!r} "
            f"has {grid.tokens}. A chunked prefill splits images: set prefill_chunk_size=None. Images of other "
            "sizes have no known grid in this family."
        )
    return [grid] * images


def _count_images(call: Mapping[str, Any]) -> tuple[int, int | None]:
    """Images of a call, and the visual tokens of each where they have been encoded already."""
    encoded = (call.get("mm_encoder_outputs") or {}).get("image")
    if encoded is None:
        return len(call["pixel_values"]), None
    features: list[Tensor] = list(encoded.pooler_output)
    tokens = {feature.shape[-2] for feature in features}
    return len(features), tokens.pop() if len(tokens) == 1 else -1


FAMILIES: dict[str, Family] = {
    "llava": Family(
        name="llava",
        blocks=lambda model: model.model.language_model.layers,
        text_config=lambda model: model.model.language_model.config,
        image_token_id=lambda model: model.config.image_token_id,
        image_grids=_llava_grids,
    ),
}


def family_of(model: nn.Module) -> Family:
    """Finds a model's family by ``config.model_type``.

    Raises:
        UnsupportedModelError: If the type is not in the table; names the supported ones.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    family = FAMILIES.get(str(model_type))
    if family is None or not hasattr(model, "generate"):
        raise UnsupportedModelError(
            f"{type(model).__name__} (model_type={model_type!r}) is not a model SCR knows. Supported are the "
            f"...ForConditionalGeneration classes of {sorted(FAMILIES)}; a new family is one entry in "
            "scr_runtime/families.py."
        )
    return family


def is_image_prefill(call: Mapping[str, Any]) -> bool:
    """Whether a forward call brings images, as pixels or as features that ``generate`` has encoded."""
    if call.get("pixel_values") is not None:
        return True
    return (call.get("mm_encoder_outputs") or {}).get("image") is not None


def describe_model(model: Any) -> dict[str, Any]:
    """Tells a model apart from others: what a predictor folder stores and the runtime compares.

    The probe, 32 evenly spaced entries of the input embedding, tells models of one architecture apart; it is
    compared loosely, so that a predictor survives a change of dtype.

    Returns:
        Plain values: ``name``, ``revision``, ``family``, ``hidden_size``, ``num_blocks``, ``embedding_probe``.
    """
    family = family_of(model)
    config = family.text_config(model)
    table: Tensor = model.get_input_embeddings().weight.detach()
    places = torch.linspace(0, table.numel() - 1, 34, dtype=torch.float64).long()[1:-1].to(table.device)
    return {
        "name": str(getattr(model.config, "_name_or_path", "") or type(model).__name__),
        "revision": getattr(model.config, "_commit_hash", None),
        "family": family.name,
        "hidden_size": int(config.hidden_size),
        "num_blocks": len(family.blocks(model)),
        "embedding_probe": [float(value) for value in table.view(-1)[places].float().tolist()],
    }


def model_differences(expected: Mapping[str, Any], model: Any) -> list[str]:
    """Lists in words how a model differs from the one that a predictor was fitted for."""
    found = describe_model(model)
    problems = [
        f"{key} is {found[key]!r}, the predictor expects {expected.get(key)!r}"
        for key in ("family", "hidden_size", "num_blocks")
        if found[key] != expected.get(key)
    ]
    probe, mine = expected.get("embedding_probe"), found["embedding_probe"]
    if not problems and probe is not None:
        scale = max(abs(value) for value in probe) or 1.0
        worst = max(abs(a - b) for a, b in zip(probe, mine, strict=True))
        if worst > 0.02 * scale:
            problems.append(f"its input embeddings differ (by up to {worst:.3g}): these are other weights")
    return problems
