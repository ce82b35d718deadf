"""The wrapper around an attention implementation, and rows that are read in chunks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from scr_runtime import SCR, SCRConfig, capture, errors
from scr_runtime.attention import AttentionRows, MapComplete, hold, release, takes_mask_tensor
from tests.scr_runtime.tiny_families import TINY

CONFIG = SCRConfig(num_sources=5, strength=1.3, edit_layers=(0, 2), attention_layers=(2, 4))


def test_attention_without_a_mask_function_is_refused() -> None:
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("flash_without_mask", sdpa_attention_forward)
    model = TINY["qwen2-vl"].model(12)
    model.model.language_model.config._attn_implementation = "flash_without_mask"
    with pytest.raises(errors.UnsupportedModelError, match=r"no mask function.*attn_implementation= one of .*'sdpa'"):
        SCR(model, config=CONFIG, mode="two-pass").attach()


def test_long_prompts_are_read_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TINY["internvl"].model(13)
    prompt = TINY["internvl"].prompt(model, [2, 1], seed=13)
    whole = capture(model, CONFIG, prompt.inputs)
    monkeypatch.setattr("scr_runtime.attention._MOST_WEIGHTS", 10_000)
    for a, b in zip(whole, capture(model, CONFIG, prompt.inputs), strict=True):
        assert torch.allclose(a.attention, b.attention, atol=1e-7, rtol=0)


@pytest.mark.parametrize(("name", "takes"), [("sdpa", True), ("eager", True), ("flash_attention_2", False)])
def test_which_implementations_take_a_mask_tensor(name: str, takes: bool) -> None:
    assert takes_mask_tensor(SimpleNamespace(_attn_implementation=name)) == takes
    assert takes_mask_tensor(SimpleNamespace(_attn_implementation="scr_" + name)) == takes


def test_the_wrapper_is_selected_and_put_back() -> None:
    config = TINY["llava"].model(1, "eager").model.language_model.config
    owner = object()
    hold(config, owner)
    assert config._attn_implementation == "scr_eager"
    assert takes_mask_tensor(config)
    release(owner)
    assert config._attn_implementation == "eager"


@pytest.mark.parametrize("mask", ["none", "rows", "bool", "additive"])
def test_rows_are_means_over_heads_of_a_plain_softmax(mask: str) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)  # two query heads per key head
    keep = torch.ones(2, 6, dtype=torch.bool)
    if mask != "none":
        keep[0, :2] = False
    seen = (torch.ones(6, 6, dtype=torch.bool).tril() & keep[:, None])[:, None]  # [B, 1, S, S]
    given = {
        "none": None, "rows": keep, "bool": seen, "additive": torch.zeros(seen.shape).masked_fill(~seen, -1e30)
    }[mask]  # fmt: skip
    rows = AttentionRows((3, 4), 3)
    rows.read(2, query, key, given, None)
    assert rows.total is None  # before the first layer to read
    rows.read(3, query, key, given, None)
    with pytest.raises(MapComplete):
        rows.read(4, query, key, given, 0.5)
    expected = torch.zeros(2, 3, 6)
    for scaling in (8**-0.5, 0.5):
        weights = query @ key.repeat_interleave(2, 1).transpose(-1, -2) * scaling
        expected += weights.masked_fill(~seen, -1e30).softmax(-1).mean(1)[:, -3:]
    torch.testing.assert_close(rows.total, expected)
