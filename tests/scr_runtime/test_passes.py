"""Forward passes and their boundary: which calls are edited, and what is seen of those that are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from scr_runtime import SCR, SCRConfig, errors
from tests.conftest import make_inputs, make_tiny_llava
from tests.scr_runtime.reference import IMAGE_TOKEN, reference_logits
from tests.scr_runtime.test_families import GENERATING, every
from tests.scr_runtime.tiny_families import Tiny

CONFIG = SCRConfig(num_sources=5, strength=1.3, edit_layers=(0, 2), attention_layers=(2, 4))


@every(GENERATING)
def test_the_base_model_called_by_itself_is_edited(tiny: Tiny) -> None:
    """It is the boundary: whoever calls it, by whatever name."""
    model = tiny.model(7)
    prompt = tiny.prompt(model, [1], seed=7)
    expected, sources = reference_logits(model, prompt.inputs, CONFIG, images=prompt.images, visual=prompt.visual)
    seen = expected[0, 0] > -1e30  # Chameleon's head hides the codes of images
    with torch.no_grad(), SCR(model, config=CONFIG, mode="two-pass") as scr:
        for number, call in enumerate((model.model, model.base_model, model.model.forward), 1):
            states = call(**prompt.inputs).last_hidden_state
            assert torch.allclose(model.lm_head(states)[..., seen], expected[..., seen], atol=1e-4, rtol=0)
            assert [report.sources for report in scr.reports] == sources
            assert scr.stats.prefills == number
        ids, mask = prompt.inputs["input_ids"], prompt.inputs["attention_mask"]
        rest = {key: value for key, value in prompt.inputs.items() if key not in ("input_ids", "attention_mask")}
        assert torch.allclose(model(ids, attention_mask=mask, **rest).logits, expected, atol=1e-4, rtol=0)


@every(GENERATING)
def test_text_and_decode_steps_pass_through(tiny: Tiny) -> None:
    model = tiny.model(8)
    text = {"input_ids": torch.randint(3, 60, (2, 9))}
    with torch.no_grad():
        vanilla = model(**text, use_cache=True)
        step = model(input_ids=torch.tensor([[5], [6]]), past_key_values=vanilla.past_key_values).logits
        with SCR(model, config=CONFIG, mode="two-pass") as scr:
            again = model(**text, use_cache=True)
            assert torch.equal(again.logits, vanilla.logits)
            following = model(input_ids=torch.tensor([[5], [6]]), past_key_values=again.past_key_values)
            assert torch.equal(following.logits, step)
            decoder = model.model.language_model if hasattr(model.model, "language_model") else model.model
            decoder(input_ids=text["input_ids"])
            assert (scr.stats.prefills, scr.reports) == (0, [])


def test_the_vision_tower_and_the_decoder_by_themselves_are_not_edited() -> None:
    model: Any = make_tiny_llava(83)
    inputs = make_inputs(model, [1])
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"]).pooler_output
        with SCR(model, config=CONFIG, mode="two-pass") as scr:
            again = model.get_image_features(inputs["pixel_values"]).pooler_output
            assert torch.equal(torch.cat(list(features)), torch.cat(list(again)))
            assert scr.stats.prefills == 0


@pytest.mark.parametrize("mask", ["none", "2-D", "4-D bool", "4-D additive"])
def test_masks_of_any_kind(mask: str) -> None:
    model: Any = make_tiny_llava(84)
    inputs = make_inputs(model, [1], seed=84)
    expected, sources = reference_logits(model, inputs, CONFIG)
    length = inputs["input_ids"].shape[1]
    causal = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    masks = {
        "none": None, "2-D": inputs["attention_mask"], "4-D bool": causal,
        "4-D additive": torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min),
    }  # fmt: skip
    with torch.no_grad(), SCR(model, config=CONFIG, mode="two-pass") as scr:
        assert torch.allclose(model(**inputs | {"attention_mask": masks[mask]}).logits, expected, atol=1e-4, rtol=0)
        assert [report.sources for report in scr.reports] == sources


def test_a_mask_that_can_not_be_read_is_refused() -> None:
    model: Any = make_tiny_llava(85)
    inputs = make_inputs(model, [1])
    odd: Any = object()
    with SCR(model, config=CONFIG, mode="uniform"), pytest.raises(errors.PrefillError, match="mask of type object"):
        model(**inputs | {"attention_mask": odd})


def test_placeholders_without_an_image_are_left_to_the_model() -> None:
    """Without pixels nothing is there that could be edited: the answer is the model's own."""
    model: Any = make_tiny_llava(86)
    ids = torch.tensor([[1, 5, IMAGE_TOKEN, 7, 8]])
    with torch.no_grad():
        vanilla = model(input_ids=ids).logits
        with SCR(model, config=CONFIG, mode="two-pass") as scr:
            assert torch.equal(model(input_ids=ids).logits, vanilla)
            assert scr.stats.prefills == 0
