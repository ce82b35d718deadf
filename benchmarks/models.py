"""Models with random weights to measure on, their inputs, and a predictor for each: time does not depend on weights.

Needs torch, transformers and scr_runtime, and no other part of the project.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from scr_runtime import PredictorConfig, SourcePredictor

PATCH = 14  # pixels a side, of every model here


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaVA; the defaults are a model of 220 M parameters with LLaVA-1.5's 24 x 24 patches.

    Attributes:
        hidden: Hidden size of the language model.
        intermediate: Width of its MLPs.
        layers: Its blocks.
        heads: Its attention heads.
        tower: The same four sizes of the vision tower.
        side: Patches a side.
        words: Size of the vocabulary; the last word is the image token.
    """

    hidden: int = 1024
    intermediate: int = 2816
    layers: int = 16
    heads: int = 16
    tower: tuple[int, int, int, int] = (384, 1536, 8, 6)
    side: int = 24
    words: int = 1000

    @property
    def image_token(self) -> int:
        """Id of the image token."""
        return self.words - 1

    @property
    def pixels(self) -> int:
        """Pixels a side."""
        return self.side * PATCH


SMALL = Shape()
NARROW = Shape(hidden=64, intermediate=176, layers=32, heads=1, tower=(384, 1536, 1, 6))
"""For counting operators: the depth of a 7B model, and as little width as possible."""


def build_llava(shape: Shape = SMALL, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A random LLaVA in eval mode, without gradients."""
    hidden, intermediate, layers, heads = shape.tower
    vision = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=shape.pixels,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=shape.words,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=4096,
    )
    # a dict: the type stub of LlavaConfig lacks the parameters
    ours: dict[str, Any] = {"image_token_id": shape.image_token, "attn_implementation": "sdpa"}
    config = LlavaConfig(**ours, vision_config=vision, text_config=text, image_seq_length=shape.side**2)
    return _random(lambda: LlavaForConditionalGeneration(config), device, dtype)


def llava_inputs(
    shape: Shape = SMALL,
    batch: int = 1,
    *,
    text: tuple[int, int] = (10, 30),
    first_word: int = 10,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """One image per row, with text before and behind it.

    Args:
        shape: Of the model.
        batch: Rows.
        text: Tokens before and behind the image.
        first_word: Token behind the image; the others count on from it.
        device: Where the inputs lie.
        dtype: Of the pixels.
    """
    generator = torch.Generator(device).manual_seed(0)
    size = (batch, 3, shape.pixels, shape.pixels)
    pixels = torch.randn(size, generator=generator, device=device, dtype=dtype)
    return {**_prompt(shape.side**2, shape.image_token, text, first_word, batch, device), "pixel_values": pixels}


def build_qwen(device: str, dtype: torch.dtype) -> Any:
    """A random Qwen2-VL-7B."""
    settings: dict[str, Any] = {
        "attn_implementation": "sdpa",
        "text_config": {
            "vocab_size": 152_064,
            "hidden_size": 3584,
            "intermediate_size": 18_944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16, "mlp_ratio": 4},
    }
    config = Qwen2VLConfig(**settings)
    return _random(lambda: Qwen2VLForConditionalGeneration(config), device, dtype)


def qwen_inputs(model: Any, *, text: tuple[int, int], device: str, dtype: torch.dtype) -> dict[str, Any]:
    """One image of 24 x 24 merged patches, with text before and behind it."""
    side, token = 24, model.config.image_token_id
    prompt = _prompt(side * side, token, text, 10, 1, device)
    patches = 4 * side * side  # before 2 x 2 are merged
    return prompt | {
        "pixel_values": torch.randn(patches, 3 * 2 * PATCH * PATCH, device=device, dtype=dtype),
        "image_grid_thw": torch.tensor([[1, 2 * side, 2 * side]], device=device),
        "mm_token_type_ids": (prompt["input_ids"] == token).int(),
    }


def build_predictor(model: Any) -> SourcePredictor:
    """A random predictor of the shipped network, with a drift guard that never trips, as an exported one has."""
    predictor = SourcePredictor(PredictorConfig(model.config.get_text_config().hidden_size))
    predictor.set_drift(1.0, 1e9)
    return predictor.eval().requires_grad_(False).to(model.device)


def millions(model: Any) -> float:
    """Parameters of a model, in millions."""
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def _prompt(
    visual: int, image_token: int, text: tuple[int, int], first_word: int, batch: int, device: str
) -> dict[str, Any]:
    before, behind = text
    ids = [1, *[5] * (before - 1), *[image_token] * visual, *range(first_word, first_word + behind)]
    rows = torch.tensor([ids] * batch, device=device)
    return {"input_ids": rows, "attention_mask": torch.ones_like(rows), "use_cache": True}


def _random(make: Callable[[], Any], device: str, dtype: torch.dtype) -> Any:
    """Makes a model on its device and in its dtype, always with the same weights."""
    former = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            return make().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(former)
