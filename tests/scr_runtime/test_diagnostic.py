"""The diagnostic run's parts: arguments by name, rows of a batch, and attention that it can't read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scr_runtime import SCR, SCRConfig, errors
from scr_runtime.diagnostic import Decoder, UnknownBatchDimension, block_arguments, residual_stream, select_rows
from scr_runtime.families import FAMILIES, family_of
from tests.scr_runtime.reference import make_predictor
from tests.scr_runtime.test_families import logits_of, refused
from tests.scr_runtime.tiny_families import TINY

CONFIG = SCRConfig(num_sources=5, strength=1.3, edit_layers=(0, 2), attention_layers=(2, 4))


def test_rows_are_taken_from_the_batch_dimension_whatever_its_size() -> None:
    index, batch, length = torch.tensor([2, 0]), 3, 7
    positions = torch.randn(3, batch, length)  # three axes of M-RoPE, three rows
    cosine = torch.randn(3, batch, length, 8)
    mask = torch.randn(batch, 1, length, length)
    chosen = select_rows("position_embeddings", (cosine, cosine[0]), index, batch)
    assert torch.equal(chosen[0], cosine[:, index]) and torch.equal(chosen[1], cosine[0][index])
    assert torch.equal(select_rows("position_ids", positions, index, batch), positions[:, index])
    assert torch.equal(select_rows("position_ids", positions[0], index, batch), positions[0][index])
    assert torch.equal(select_rows("attention_mask", mask, index, batch), mask[index])
    shared = torch.randn(3, 1, length)
    assert select_rows("position_ids", shared, index, batch) is shared
    assert select_rows("position_ids", shared[0, 0], index, batch) is not None
    for name, value in (("cu_seq_lens_q", torch.arange(3)), ("position_ids", torch.randn(2, 4)), ("x", object())):
        with pytest.raises(UnknownBatchDimension):
            select_rows(name, value, index, batch)


def test_an_unknown_argument_of_a_block_diagnoses_all_rows() -> None:
    model = TINY["llava"].model(13)
    prompt = TINY["llava"].prompt(model, [1, 1], seed=13)
    predictor = make_predictor(model)
    block = model.model.language_model.layers[0]
    hook = block.register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"odd": torch.zeros(2)}), with_kwargs=True
    )
    _, scr = logits_of(model, prompt, mode="one-pass", predictor=predictor)
    threshold = max(report.confidence or 0 for report in scr.reports)
    _, scr = logits_of(model, prompt, mode="auto", predictor=predictor, threshold=threshold)
    hook.remove()
    _, truth = logits_of(model, prompt, mode="two-pass")
    assert sorted(report.provider for report in scr.reports) == ["one-pass", "two-pass"]
    for mine, full in zip(scr.reports, truth.reports, strict=True):
        assert mine.provider == "one-pass" or mine.sources == full.sources


def test_blocks_of_different_reach_are_refused_in_two_pass() -> None:
    model = TINY["qwen2-vl"].model(12)
    prompt = TINY["qwen2-vl"].prompt(model, [1])
    model.model.language_model.config.layer_types = ["full_attention"] * 3 + ["sliding_attention"] * 3
    model.model.language_model.config.sliding_window = 4
    model.model.language_model.has_sliding_layers = True
    with pytest.raises(errors.UnsupportedModelError, match="mix attention of different reach"):
        SCR(model, config=CONFIG, mode="two-pass")
    logits_of(model, prompt, mode="uniform")


def test_attention_that_hides_its_queries_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TINY["qwen-vl"].model(13)
    prompt = TINY["qwen-vl"].prompt(model, [1])
    attention = type(model.transformer.h[0].attn)

    def fused(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.c_proj(hidden_states), None

    monkeypatch.setattr(attention, "forward", fused)
    refused(model, prompt.inputs, errors.UnsupportedModelError, "did not pass where its q and k are read")
    logits_of(model, prompt, mode="uniform")


def test_another_attention_implementation_while_attached(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(20)
    with SCR(model, config=CONFIG, mode="two-pass"), torch.no_grad():
        model.set_attn_implementation("eager")
        with pytest.raises(errors.UnsupportedModelError, match="changed to 'eager' while SCR was attached"):
            model(**llava_inputs(model, [1]))


class Block(nn.Module):
    def forward(
        self, hidden: Tensor, mask: Any = None, past_key_values: Any = None, use_cache: bool = False
    ) -> Tensor:
        return hidden


def test_a_blocks_arguments_by_name() -> None:
    hidden, mask = torch.zeros(1, 2, 3), torch.ones(1)
    assert block_arguments(Block(), (hidden,), {"use_cache": True}) == {"use_cache": True}
    named = block_arguments(Block(), (hidden, mask, None), {"use_cache": True})
    assert named == {"mask": mask, "past_key_values": None, "use_cache": True}
    assert residual_stream((hidden, "rest")) is residual_stream(hidden) is hidden


def test_the_decoders_call_is_kept_only_where_the_family_needs_it() -> None:
    for name, needed in (("qwen3-vl", True), ("llava", False)):
        model = TINY[name].model(1)
        prompt = TINY[name].prompt(model, [1])
        decoder = Decoder(family_of(model), family_of(model).blocks(model))
        undo = decoder.keep_call(model)
        with torch.no_grad():
            model(**prompt.inputs)
        assert ("deepstack_visual_embeds" in decoder.call) == bool(decoder.call) == needed
        undo()
        decoder.call.clear()
        with torch.no_grad():
            model(**prompt.inputs)
        assert not decoder.call
    packing = {"llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"}  # as test_maps.py has compared
    assert {family.name for family in FAMILIES.values() if family.packs} == packing
