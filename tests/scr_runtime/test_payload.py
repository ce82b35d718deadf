"""Which calls are of the same images."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from scr_runtime import SCR, SCRConfig
from scr_runtime.payload import Payload, encoded_images, image_tensors, tensors_in
from tests.conftest import make_inputs, make_tiny_llava
from tests.scr_runtime.reference import reference_logits

CONFIG = SCRConfig(num_sources=4, strength=1.3, edit_layers=(0, 2), attention_layers=(2, 4))


def features(*tensors: Tensor) -> dict[str, Any]:
    return {"mm_encoder_outputs": {"image": SimpleNamespace(pooler_output=list(tensors))}}


def test_the_tensors_of_a_call() -> None:
    one, two = torch.zeros(1), torch.ones(2)
    assert tensors_in([one, (two, None, "x"), 3]) == [one, two]
    assert tensors_in("no") == []
    assert image_tensors({"pixel_values": one}) == [one]
    assert image_tensors({}) == image_tensors({"pixel_values": None}) == []
    assert image_tensors(features(one, two) | {"pixel_values": two}) == [one, two]
    assert encoded_images({"mm_encoder_outputs": None}) is encoded_images({}) is None


@pytest.mark.parametrize("inference", [False, True])
def test_equal_tensors_are_the_same_images_and_written_ones_are_not(inference: bool) -> None:
    with torch.inference_mode(inference):
        pixels = torch.rand(2, 3)
        payload = Payload({"pixel_values": pixels})
        assert payload.is_of({"pixel_values": pixels})
        assert payload.is_of({"pixel_values": pixels.clone()})
        others = [{}, {"pixel_values": pixels[:1]}, {"pixel_values": pixels.double()}, {"pixel_values": pixels + 1},
                  {"pixel_values": [pixels, pixels]}, features(pixels)]  # fmt: skip
        assert not any(payload.is_of(other) for other in others)
        pixels[0, 0] += 1
        assert not payload.is_of({"pixel_values": pixels})


def test_a_buffer_that_is_filled_again_is_another_image() -> None:
    """R4: within one generate, a processor writes other pixels into the very tensor, and asks about them."""
    model: Any = make_tiny_llava(80)
    inputs, others = make_inputs(model, [1], seed=1), make_inputs(model, [1], seed=2)
    mine, theirs = inputs["pixel_values"].clone(), others["pixel_values"].clone()
    expected, sources = reference_logits(model, others, CONFIG)
    seen: list[Any] = []

    def processor(ids: Tensor, scores: Tensor) -> Tensor:
        inputs["pixel_values"].copy_(theirs)
        question = others | {"pixel_values": inputs["pixel_values"]}
        seen.append((model(**question).logits, scr.reports[0].sources))
        inputs["pixel_values"].copy_(mine)
        return scores

    with torch.no_grad(), SCR(model, config=CONFIG, mode="two-pass") as scr:
        alone = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        together = model.generate(**inputs, max_new_tokens=3, do_sample=False, logits_processor=[processor])
    assert torch.equal(alone, together)
    assert len(seen) == 3
    for logits, chosen in seen:
        assert [chosen] == sources
        assert torch.allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("change", ["other", "noise", "two images", "other question"])
def test_another_prefill_in_a_generate_chooses_for_itself(change: str, cached: bool) -> None:
    """R4: it took the sources of the image that ``generate`` was called with."""
    model: Any = make_tiny_llava(81)
    inputs = make_inputs(model, [1], seed=1)
    other = {
        "other": make_inputs(model, [1], seed=2),
        "noise": inputs | {"pixel_values": inputs["pixel_values"] + torch.randn_like(inputs["pixel_values"])},
        "two images": make_inputs(model, [2], seed=3),
        "other question": make_inputs(model, [1], seed=4, text=9) | {"pixel_values": inputs["pixel_values"]},
    }[change]
    expected, sources = reference_logits(model, other, CONFIG)
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "use_cache": cached}
    count = 0

    def processor(ids: Tensor, scores: Tensor) -> Tensor:
        nonlocal count
        count += 1
        assert torch.allclose(model(**other).logits, expected, atol=1e-4)
        assert [report.sources for report in scr.reports] == sources
        return scores

    with torch.no_grad(), SCR(model, config=CONFIG, mode="two-pass") as scr:
        alone = model.generate(**inputs, **options)
        assert torch.equal(model.generate(**inputs, **options, logits_processor=[processor]), alone)
    assert count == 3
