"""generate() under SCR: the reference's tokens in every way of decoding, and a shadow that leaves no trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from scr_runtime import SCR, SCRConfig, errors
from scr_runtime.families import family_of
from scr_runtime.generate import GenerateCall, GenerateShadow
from tests.scr_runtime.reference import make_predictor, reference_greedy, reference_logits
from tests.scr_runtime.test_families import GENERATING, every
from tests.scr_runtime.tiny_families import Tiny

CONFIG = SCRConfig(num_sources=5, strength=1.3, edit_layers=(0, 2), attention_layers=(2, 4))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=["dynamic-cache", "no-cache", "static-cache", "prompt-lookup"],
)
@pytest.mark.parametrize("images", [[1], [1, 2, 1]])
def test_greedy_tokens_equal_the_reference(
    tiny_llava: Any, llava_inputs: Any, options: dict[str, Any], images: list[int]
) -> None:
    if "prompt_lookup_num_tokens" in options and len(images) > 1:
        pytest.skip("transformers' assisted decoding takes one prompt at a time")
    model = tiny_llava(5)
    inputs = llava_inputs(model, images, seed=5)
    expected = reference_greedy(model, inputs, CONFIG, 6)
    with SCR(model, config=CONFIG, mode="two-pass") as scr:
        tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False, **options)
    assert torch.equal(tokens, expected)
    assert [report.layers_edited for report in scr.reports] == [(0, 1, 2)] * sum(images)
    assert not torch.equal(tokens, model.generate(**inputs, max_new_tokens=6, do_sample=False))


def test_assisted_decoding_gives_the_same_tokens(tiny_llava: Any, llava_inputs: Any) -> None:
    """The first forward holds draft tokens already; they are no part of the question."""
    model, assistant = tiny_llava(5), tiny_llava(6, layers=2)
    inputs = llava_inputs(model, [1], seed=5)
    with SCR(model, config=CONFIG, mode="two-pass"):
        plain = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        assisted = model.generate(**inputs, max_new_tokens=8, do_sample=False, assistant_model=assistant)
    assert torch.equal(assisted, plain)


@pytest.mark.parametrize("mode", ["two-pass", "one-pass"])
def test_cached_beams_equal_uncached_beams(tiny_llava: Any, llava_inputs: Any, mode: Any) -> None:
    model = tiny_llava(6)
    inputs = llava_inputs(model, [1, 2], seed=6)
    options: dict[str, Any] = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    results = []
    for use_cache in (True, False):
        with SCR(model, config=CONFIG, mode=mode, predictor=make_predictor(model)):
            results.append(model.generate(**inputs, use_cache=use_cache, **options))
    assert torch.equal(*results)


def test_sampling_with_a_seed_equals_forward_then_sample(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(6)
    inputs = llava_inputs(model, [1], seed=6)
    logits, _ = reference_logits(model, inputs, CONFIG)
    torch.manual_seed(0)
    expected = torch.multinomial(logits[:, -1].softmax(-1), 1)
    torch.manual_seed(0)
    with SCR(model, config=CONFIG, mode="two-pass"):
        tokens = model.generate(**inputs, max_new_tokens=1, do_sample=True, top_k=0)
    assert torch.equal(tokens[:, -1:], expected)


def test_left_padded_batch_equals_single_prompts(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(8)
    inputs = llava_inputs(model, [1, 1, 1], seed=8)
    with SCR(model, config=CONFIG, mode="two-pass"):
        batch = model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, -5:]
        for row in range(3):
            keep = inputs["attention_mask"][row].bool()
            single = model.generate(
                input_ids=inputs["input_ids"][row : row + 1, keep],
                attention_mask=inputs["attention_mask"][row : row + 1, keep],
                pixel_values=inputs["pixel_values"][row : row + 1],
                max_new_tokens=5,
                do_sample=False,
            )
            assert torch.equal(single[0, -5:], batch[row])


def test_positional_inputs_and_repeated_generate(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(10)
    first, second = (llava_inputs(model, [1], seed=seed) for seed in (10, 11))
    greedy = [reference_greedy(model, inputs, CONFIG, 3) for inputs in (first, second)]
    with torch.no_grad(), SCR(model, config=CONFIG, mode="two-pass"):
        for inputs, expected in zip((first, second), greedy, strict=True):  # nothing of the first call is left
            rest = {key: value for key, value in inputs.items() if key != "input_ids"}
            tokens = model.generate(inputs["input_ids"], **rest, max_new_tokens=3, do_sample=False)
            assert torch.equal(tokens, expected)
        logits = model(first["input_ids"], first["pixel_values"], first["attention_mask"]).logits
    assert torch.allclose(logits, reference_logits(model, first, CONFIG)[0], atol=1e-4, rtol=0)


def test_chunked_prefill_is_refused(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(20)
    inputs = llava_inputs(model, [1], seed=20)
    with (
        SCR(model, config=CONFIG, mode="two-pass"),
        pytest.raises(errors.PrefillError, match="prefill_chunk_size=None"),
    ):
        model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=16)


@every(GENERATING)
def test_chunked_prefill_is_refused_in_every_family(tiny: Tiny) -> None:
    model = tiny.model(12)
    prompt = tiny.prompt(model, [1], seed=12)
    end = max(max(image.positions) for image in prompt.images) + 3  # the first chunk holds all visual tokens
    for chunk in (16, end):
        with (
            SCR(model, config=CONFIG, mode="two-pass"),
            pytest.raises(errors.PrefillError, match="prefill_chunk_size=None"),
        ):
            model.generate(**prompt.inputs, max_new_tokens=2, prefill_chunk_size=chunk)


def test_the_shadow_knows_the_running_call(tiny_llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llava(1)
    seen: list[GenerateCall] = []

    def inner(*args: Any, **kwargs: Any) -> str:
        assert shadow.running is not None
        seen.append(shadow.running)
        if len(seen) == 1:
            assert model.generate(inputs=torch.zeros(2, 7, dtype=torch.long), past_key_values=object()) == "done"
            assert shadow.running is seen[0]  # the outer call again
        if kwargs.get("fail"):
            raise KeyError("inside")
        return "done"

    monkeypatch.setattr(model, "generate", inner)  # an attribute of the instance, as a user's own shadow
    shadow = GenerateShadow(model, family_of(model))
    restore = shadow.install()
    ids = torch.zeros(2, 5, dtype=torch.long)
    assert model.generate(ids, top_k=3) == "done"
    with pytest.raises(KeyError):
        model.generate(input_ids=ids, fail=True)
    assert shadow.running is None
    model.generate(inputs_embeds=torch.zeros(1))
    assert [(call.prompt_length, call.fresh_cache) for call in seen] == [
        (5, True), (7, False), (5, True), (None, True)
    ]  # fmt: skip
    assert seen[0].inputs == {"top_k": 3} and seen[0].choice is None
    restore()
    assert model.__dict__["generate"] is inner
    monkeypatch.undo()
    assert "generate" not in model.__dict__


def test_a_chunk_size_in_the_generation_config_is_refused(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(20)
    text = llava_inputs(model, [0], seed=20)
    words = r"chunked prefill \(of 16 tokens\) would process the image and the question in separate passes"
    settings = copy.deepcopy(model.generation_config)
    settings.prefill_chunk_size = 16
    inputs = llava_inputs(model, [1], seed=20)
    with SCR(model, config=CONFIG, mode="two-pass") as scr:
        for call in (lambda: model.generate(**inputs, generation_config=settings, max_new_tokens=2),
                     lambda: model.generate(None, settings, **inputs, max_new_tokens=2)):  # fmt: skip
            with pytest.raises(errors.PrefillError, match=words):
                call()
        model.generation_config.prefill_chunk_size = 16
        with pytest.raises(errors.PrefillError, match=words):
            model.generate(**inputs, max_new_tokens=2)
        assert scr._passes.generate.running is None
        model.generate(**text, max_new_tokens=2, do_sample=False)  # without an image there is nothing to take apart
