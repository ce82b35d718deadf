"""Qwen-VL, the first one: a stand-in with the module layout and calling convention of its remote code."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, HIDDEN, LAYERS = 100, 32, 6
BEGIN = 96


class _Attention(nn.Module):
    """q and k reach ``_attn`` after RoPE; there is no attention interface and no keyword to pass through."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.c_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def _attn(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        causal: Tensor,
        attention_mask: Any = None,
        head_mask: Any = None,
    ) -> tuple[Tensor, Tensor]:
        weights = query @ key.transpose(-1, -2) / math.sqrt(value.shape[-1])
        length = query.shape[-2]
        lowest = torch.finfo(weights.dtype).min
        weights = torch.where(causal[:, :, :length, :length], weights, lowest)
        if attention_mask is not None:
            weights = weights + attention_mask
        weights = weights.softmax(-1)
        return (weights @ value).transpose(1, 2), weights

    def forward(
        self,
        hidden_states: Tensor,
        rotary_pos_emb: Any = None,
        registered_causal_mask: Any = None,
        layer_past: Any = None,
        attention_mask: Any = None,
        head_mask: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
    ) -> tuple[Any, ...]:
        batch, length, _ = hidden_states.shape
        query, key, value = self.c_attn(hidden_states).view(batch, length, 3, 4, HIDDEN // 4).unbind(2)
        cos, sin = rotary_pos_emb  # [1, S, 1, h]

        def rotate(states: Tensor) -> Tensor:
            first, second = states.chunk(2, -1)
            return states * cos + torch.cat([-second, first], -1) * sin

        query, key, value = (part.transpose(1, 2) for part in (rotate(query), rotate(key), value))
        mixed, weights = self._attn(query, key, value, registered_causal_mask, attention_mask, head_mask)
        output = self.c_proj(mixed.reshape(batch, length, HIDDEN))
        present = (key, value) if use_cache else None
        return (output, present, weights) if output_attentions else (output, present)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.attn = _Attention()
        self.mlp = nn.Sequential(nn.Linear(HIDDEN, 2 * HIDDEN), nn.SiLU(), nn.Linear(2 * HIDDEN, HIDDEN))

    def forward(
        self,
        hidden_states: Tensor,
        rotary_pos_emb: Any = None,
        registered_causal_mask: Any = None,
        layer_past: Any = None,
        attention_mask: Any = None,
        head_mask: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
    ) -> tuple[Any, ...]:
        outputs = self.attn(
            self.ln_1(hidden_states), rotary_pos_emb, registered_causal_mask, layer_past, attention_mask, head_mask,
            use_cache, output_attentions,
        )  # fmt: skip
        hidden_states = hidden_states + outputs[0]
        hidden_states = hidden_states + self.mlp(self.ln_2(hidden_states))
        return (hidden_states, *(outputs[1:] if use_cache else outputs[2:]))


class _Transformer(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(VOCABULARY, HIDDEN)
        self.h = nn.ModuleList([_Block() for _ in range(LAYERS)])
        self.visual = nn.Linear(8, HIDDEN)  # one feature vector per "path" of an image
        self.queries = nn.Parameter(torch.randn(config.visual["n_queries"], HIDDEN))
        causal = torch.tril(torch.ones(1, 1, 512, 512, dtype=torch.bool))
        self.register_buffer("registered_causal_mask", causal, persistent=False)

    def forward(
        self, input_ids: Tensor, past_key_values: Any = None, attention_mask: Any = None, **kwargs: Any
    ) -> tuple[Tensor, list[Tensor]]:
        hidden = self.wte(input_ids)
        start = self.config.visual["image_start_id"]
        if past_key_values is None and torch.any(input_ids == start):
            for row, begin in (input_ids == start).nonzero().tolist():
                path = input_ids[row, begin + 1 : begin + 9].to(hidden.dtype) / 30 - 1
                features = self.visual(path) * self.queries
                hidden[row, begin + 1 : begin + 1 + len(features)] = features
        length = input_ids.shape[1]
        angle = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(4) / 4)
        angle = torch.cat([angle, angle], -1)[None, :, None].to(hidden.dtype)
        if attention_mask is not None:
            lowest = torch.finfo(hidden.dtype).min
            attention_mask = (1 - attention_mask[:, None, None].to(hidden.dtype)) * lowest
        attentions = []
        for block in self.h:
            outputs = block(
                hidden, rotary_pos_emb=[angle.cos(), angle.sin()],
                registered_causal_mask=self.registered_causal_mask, layer_past=None, attention_mask=attention_mask,
                head_mask=None, use_cache=kwargs.get("use_cache", False),
                output_attentions=kwargs.get("output_attentions", False),
            )  # fmt: skip
            hidden = outputs[0]
            attentions.append(outputs[-1])
        return hidden, attentions


class QWenStandIn(nn.Module):
    """The module layout and calling convention of Qwen-VL's remote code, forward only."""

    def __init__(self) -> None:
        super().__init__()
        visual = {"image_start_id": BEGIN, "n_queries": 36}
        self.config = SimpleNamespace(model_type="qwen", hidden_size=HIDDEN, visual=visual)
        self.transformer = _Transformer(self.config)
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(
        self, input_ids: Tensor | None = None, past_key_values: Any = None, attention_mask: Any = None, **kwargs: Any
    ) -> Any:
        assert input_ids is not None
        hidden, attentions = self.transformer(input_ids, past_key_values, attention_mask, **kwargs)
        return SimpleNamespace(logits=self.lm_head(hidden), attentions=attentions)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.wte
