"""Builds scene-next: a LLaVA-NeXT of 2.9 million parameters with a weak vision tower and a deep decoder."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
)

from scenes.model import CHAT_TEMPLATE, build_tokenizer, vocabulary

TILE = 96  # pixels a side of the thumbnail and of each tile
PATCH = 16  # pixels a side
GRID = TILE // PATCH  # 6 x 6 = 36 patches of the thumbnail
HIDDEN = 128
TOWER_LAYERS, LANGUAGE_LAYERS, HEADS = 1, 16, 4
PINPOINTS = ((96, 192), (192, 96), (192, 192), (96, 288), (288, 96))  # (height, width) of the tiles together


def build_next_processor() -> LlavaNextProcessor:
    """The processor of scene-next: tiles without torchvision, the words and the chat template of scene-llava."""
    return LlavaNextProcessor(
        image_processor=build_image_processor(),
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        num_additional_image_tokens=1,  # the class token of CLIP, which "default" leaves out again
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
    )


def build_image_processor() -> LlavaNextImageProcessorPil:
    """Cuts an image into a thumbnail and tiles, scaled to [-1, 1]."""
    return LlavaNextImageProcessorPil(
        size={"height": TILE, "width": TILE},
        crop_size={"height": TILE, "width": TILE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        image_grid_pinpoints=[list(pinpoint) for pinpoint in PINPOINTS],
    )


def build_next_model() -> LlavaNextForConditionalGeneration:
    """The model with fresh weights (fp32), drawn from torch's global generator."""
    words = vocabulary()
    ids = {"pad_token_id": words["<pad>"], "bos_token_id": words["<s>"], "eos_token_id": words["</s>"]}
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=HIDDEN,
            intermediate_size=3 * HIDDEN,
            num_hidden_layers=TOWER_LAYERS,
            num_attention_heads=HEADS,
            image_size=TILE,
            patch_size=PATCH,
            projection_dim=HIDDEN,
        ),
        text_config=LlamaConfig(
            vocab_size=len(words),
            hidden_size=HIDDEN,
            intermediate_size=2 * HIDDEN,
            num_hidden_layers=LANGUAGE_LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            max_position_embeddings=2048,
            initializer_range=0.05,  # 0.02 is meant for wider models
            pad_token_id=ids["pad_token_id"],
            bos_token_id=ids["bos_token_id"],
            eos_token_id=ids["eos_token_id"],
        ),
        image_token_index=words["<image>"],
        image_grid_pinpoints=[list(pinpoint) for pinpoint in PINPOINTS],
        image_seq_length=GRID * GRID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    model = LlavaNextForConditionalGeneration(config)
    for name, value in ids.items():
        setattr(model.generation_config, name, value)
    model.generation_config.max_new_tokens = 48
    _start_positions(model)
    _start_attention(model)
    return model


def _start_positions(model: LlavaNextForConditionalGeneration) -> None:
    """Starts the tower's position embedding from sines and cosines of row and column."""
    quarter = HIDDEN // 4
    angle = torch.arange(GRID)[:, None] * torch.exp(-math.log(100.0) * torch.arange(quarter) / quarter)  # [6, d/4]
    axis = torch.cat([angle.sin(), angle.cos()], 1)  # [6, d/2]
    grid = torch.cat([axis[:, None].expand(GRID, GRID, -1), axis[None].expand(GRID, GRID, -1)], -1).flatten(0, 1)
    embedding = cast(nn.Embedding, model.model.vision_tower.embeddings.position_embedding)
    with torch.no_grad():
        embedding.weight[1:] = 0.1 * grid


def _start_attention(model: LlavaNextForConditionalGeneration) -> None:
    """Starts every decoder block with W_q = W_k, orthogonal: a token first looks at tokens like itself.

    As in `scenes.fit` (mimetic initialisation, arXiv 2305.09828).
    """
    for layer in model.model.language_model.layers:
        attention = cast(Any, layer).self_attn
        with torch.no_grad():
            shared = torch.empty(HIDDEN, HIDDEN)
            nn.init.orthogonal_(shared)
            attention.q_proj.weight.copy_(shared)
            attention.k_proj.weight.copy_(shared)
