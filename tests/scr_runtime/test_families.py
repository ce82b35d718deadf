"""Every family, on a random tiny model of its real class, against the naive reference of reference.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from scr_runtime import SCR, PredictorConfig, SCRConfig, SourcePredictor, capture, errors
from scr_runtime.here import here
from scr_runtime.rule import effective_num_sources
from tests.scr_runtime.reference import (
    IMAGE_TOKEN,
    Image,
    hook_count,
    kept,
    reference_greedy,
    reference_logits,
    reference_maps,
)
from tests.scr_runtime.tiny_families import HIDDEN, TINY, Prompt, Tiny

CONFIG = SCRConfig(num_sources=5, strength=1.3, edit_layers=(0, 2), attention_layers=(2, 4))
GENERATING = [tiny for tiny in TINY.values() if tiny.generates]


def every(tinies: list[Tiny] | None = None) -> Any:
    tinies = list(TINY.values()) if tinies is None else tinies
    return pytest.mark.parametrize("tiny", tinies, ids=[tiny.name for tiny in tinies])


def logits_of(model: Any, prompt: Prompt, **kwargs: Any) -> tuple[Tensor, Any]:
    with torch.no_grad(), SCR(model, config=CONFIG, **kwargs) as scr:
        return model(**prompt.inputs).logits, scr


# -- exactness -------------------------------------------------------------------------------------------------------


@every()
@pytest.mark.parametrize("pad", ["left", "right"])
def test_maps_equal_eager_averages(tiny: Tiny, pad: str) -> None:
    for attn in tiny.attentions:
        model = tiny.model(1, attn)
        prompt = tiny.prompt(model, [1, 2, 1], seed=1, pad=pad)
        captures = capture(model, CONFIG, prompt.inputs)
        expected = reference_maps(model, prompt.inputs, CONFIG, None, prompt.images, prompt.visual)
        assert [(item.row, item.grid) for item in captures] == [(image.row, image.grid) for image in prompt.images]
        for item, attention in zip(captures, expected, strict=True):
            assert torch.allclose(item.attention, attention, atol=1e-6, rtol=0)


@every()
@pytest.mark.parametrize("images", [[1], [2, 1, 0]])
def test_two_pass_equals_the_naive_reference(tiny: Tiny, images: list[int]) -> None:
    for attn in tiny.attentions:
        model = tiny.model(2, attn)
        prompt = tiny.prompt(model, images, seed=2)
        expected, sources = reference_logits(model, prompt.inputs, CONFIG, images=prompt.images, visual=prompt.visual)
        logits, scr = logits_of(model, prompt, mode="two-pass")
        assert [report.sources for report in scr.reports] == sources
        assert torch.allclose(kept(prompt.inputs, logits), kept(prompt.inputs, expected), atol=1e-4, rtol=0)
        with torch.no_grad():
            moved = kept(prompt.inputs, model(**prompt.inputs).logits) - kept(prompt.inputs, logits)
        assert moved.abs().max() > 0.02  # the edit is no rounding error, so the comparison above means something


@every()
def test_one_pass_given_the_true_scores_equals_two_pass(tiny: Tiny) -> None:
    model = tiny.model(3)
    prompt = tiny.prompt(model, [2, 1], seed=3)
    captures = capture(model, CONFIG, prompt.inputs)

    class Oracle(SourcePredictor):
        def forward(self, states: Tensor, grid: Any, question: Tensor | None = None) -> Tensor:
            return torch.stack([item.attention for item in captures if item.grid == grid])

    oracle = Oracle(PredictorConfig(HIDDEN, rank=4))
    two_pass, _ = logits_of(model, prompt, mode="two-pass")
    one_pass, _ = logits_of(model, prompt, mode="one-pass", predictor=oracle)
    assert torch.equal(one_pass, two_pass)


@every()
def test_bfloat16_equals_the_reference_in_bfloat16(tiny: Tiny) -> None:
    """Given the same sources: the rounding of 8 bits lets near ties fall either way."""
    model = tiny.model(5, tiny.attentions[-1], torch.bfloat16)
    prompt = tiny.prompt(model, [1, 1], seed=5)
    logits, scr = logits_of(model, prompt, mode="two-pass")
    sources = [report.sources for report in scr.reports]
    expected, _ = reference_logits(model, prompt.inputs, CONFIG, sources, images=prompt.images, visual=prompt.visual)
    logits, expected = kept(prompt.inputs, logits).float(), kept(prompt.inputs, expected).float()
    real = expected > -1e30  # Chameleon masks image tokens with the lowest number
    assert logits.dtype == torch.float32 and real.float().mean() > 0.9
    assert (logits - expected)[real].abs().max() <= 0.05 * expected[real].abs().max()


# -- generate --------------------------------------------------------------------------------------------------------


OPTIONS: dict[str, dict[str, Any]] = {
    "dynamic-cache": {},
    "no-cache": {"use_cache": False},
    "static-cache": {"cache_implementation": "static", "disable_compile": True},
    "prompt-lookup": {"prompt_lookup_num_tokens": 3},
}


@every(GENERATING)
@pytest.mark.parametrize("images", [[2], [1, 2, 1]], ids=["two-images", "padded-batch"])
def test_greedy_tokens_equal_the_reference(tiny: Tiny, images: list[int]) -> None:
    compare_greedy_tokens(tiny, images, CONFIG, "two-pass")


def compare_greedy_tokens(tiny: Tiny, images: list[int], config: SCRConfig, mode: Any) -> None:
    model = tiny.model(6)
    prompt = tiny.prompt(model, images, seed=6)
    expected = reference_greedy(model, prompt.inputs, config, 4, prompt.images, prompt.visual)
    edited = tuple(range(config.edit_layers[0], config.edit_layers[1] + 1))
    for name, options in OPTIONS.items():
        if name == "prompt-lookup" and len(images) > 1:
            continue  # transformers' assisted decoding takes one prompt at a time
        with SCR(model, config=config, mode=mode) as scr:
            tokens = model.generate(**prompt.inputs, max_new_tokens=4, do_sample=False, **options)
        assert torch.equal(tokens, expected), name
        assert [report.layers_edited for report in scr.reports] == [edited] * len(prompt.images)
        assert getattr(scr.stats, mode.replace("-", "_")) == len(prompt.images)


@every(GENERATING)
def test_left_padded_batch_equals_single_prompts(tiny: Tiny) -> None:
    model = tiny.model(7)
    prompt = tiny.prompt(model, [1, 2], seed=7)
    with SCR(model, config=CONFIG, mode="two-pass"):
        batch = model.generate(**prompt.inputs, max_new_tokens=4, do_sample=False)[:, -4:]
        for row in range(2):
            single = model.generate(**prompt.row(row), max_new_tokens=4, do_sample=False)
            assert torch.equal(single[0, -4:], batch[row])


@every(GENERATING)
@pytest.mark.parametrize("images", [[1, 2], [2]])
def test_cached_beams_equal_uncached_beams(tiny: Tiny, images: list[int]) -> None:
    """[1, 2]: the images are repeated per prompt, as the grids have to be; two of them have equal lengths."""
    model = tiny.model(8)
    prompt = tiny.prompt(model, images, seed=8)
    options: dict[str, Any] = {"max_new_tokens": 3, "num_beams": 3, "do_sample": False}
    options["suppress_tokens"] = [IMAGE_TOKEN]  # a generated placeholder is an error in the model itself, uncached
    results = []
    for use_cache in (True, False):
        with SCR(model, config=CONFIG, mode="two-pass") as scr:
            results.append(model.generate(**prompt.inputs, use_cache=use_cache, **options))
        assert [report.grid for report in scr.reports] == [image.grid for image in prompt.images]  # not per beam
    assert torch.equal(*results)


# -- leaving no trace ------------------------------------------------------------------------------------------------


def config_state(model: Any) -> list[Any]:
    configs = [model.config, *(getattr(model.config, key, None) for key in ("text_config", "vq_config"))]
    return [getattr(config, "_attn_implementation", None) for config in configs]


@every()
def test_vanilla_is_bit_identical_before_after_and_off(tiny: Tiny) -> None:
    model = tiny.model(9)
    prompt = tiny.prompt(model, [1, 1], seed=9)
    with torch.no_grad():
        if tiny.name.startswith("chameleon"):
            model.config.vq_config._attn_implementation = "eager"  # a sub-config with another implementation
        vanilla = model(**prompt.inputs).logits
        hooks, attributes, configs = hook_count(model), set(model.__dict__), config_state(model)
        edited, after = logits_of(model, prompt, mode="two-pass")
        assert not torch.equal(edited, vanilla)
        assert torch.equal(model(**prompt.inputs).logits, vanilla)
        off, scr = logits_of(model, prompt, mode="off")
        assert torch.equal(off, vanilla) and scr.reports == []
    assert after._last is not None and not after._last.decoder.call  # features of the image are let go
    assert (hook_count(model), set(model.__dict__), config_state(model)) == (hooks, attributes, configs)


class StopError(Exception):
    """Ends a pass or a generation from inside."""


@every()
def test_hooks_return_after_an_exception(tiny: Tiny) -> None:
    model = tiny.model(10)
    prompt = tiny.prompt(model, [1], seed=10)
    with torch.no_grad():
        vanilla = model(**prompt.inputs).logits
    hooks = hook_count(model)

    def explode(*_: Any) -> None:
        raise StopError

    scr = SCR(model, config=CONFIG, mode="two-pass")
    for layer in (0, 1, 3):
        bomb = scr._blocks[layer].register_forward_pre_hook(explode)
        with torch.no_grad(), scr, pytest.raises(StopError):
            model(**prompt.inputs)
        bomb.remove()
    assert hook_count(model) == hooks
    if tiny.generates:
        calls = []

        def stop(ids: Tensor, scores: Any, **_: Any) -> Any:
            calls.append(ids.shape)
            if len(calls) == 2:
                raise StopError
            return torch.zeros(len(ids), dtype=torch.bool)

        with scr, pytest.raises(StopError):
            model.generate(**prompt.inputs, max_new_tokens=5, do_sample=False, stopping_criteria=[stop])
        assert len(calls) == 2
    assert hook_count(model) == hooks
    assert scr._passes.generate.running is None and here.prefill is None
    with torch.no_grad():
        assert torch.equal(model(**prompt.inputs).logits, vanilla)


# -- refusals --------------------------------------------------------------------------------------------------------


def refused(model: Any, inputs: dict[str, Any], error: type[Exception], words: str) -> None:
    hooks = hook_count(model)
    with torch.no_grad(), SCR(model, config=CONFIG, mode="two-pass"), pytest.raises(error, match=words):
        model(**inputs)
    assert hook_count(model) == hooks


@every()
def test_another_count_of_visual_tokens_is_refused(tiny: Tiny) -> None:
    model = tiny.model(11)
    prompt = tiny.prompt(model, [1, 1], seed=11)
    with torch.no_grad():
        model(**prompt.inputs)  # transformers installs its output recorders at the first call
    place = prompt.images[0].positions[7]
    ids = prompt.inputs["input_ids"].clone()
    if tiny.name == "qwen-vl":  # an image that ends late
        ids[0, prompt.images[0].positions[-1] + 1] = 5
    else:
        ids[0, place] = 5
    refused(model, prompt.inputs | {"input_ids": ids}, errors.PrefillError, "do not match")
    if tiny.generates:
        prompt = tiny.prompt(model, [1], seed=11)
        prompt.inputs["input_ids"][0, -1] = IMAGE_TOKEN  # one too many, all in one prompt
        refused(model, prompt.inputs, errors.PrefillError, "do not match")


def test_an_image_spread_over_two_prompts_is_refused() -> None:
    """The number of visual tokens is right, so the model itself raises nothing."""
    model = TINY["llava"].model(11)
    prompt = TINY["llava"].prompt(model, [1, 1], seed=11)
    ids = prompt.inputs["input_ids"].clone()
    ids[0, prompt.images[0].positions[0]], ids[1, -1] = 5, IMAGE_TOKEN
    with torch.no_grad():
        model(**prompt.inputs | {"input_ids": ids})
    refused(model, prompt.inputs | {"input_ids": ids}, errors.PrefillError, "within one prompt")


@pytest.mark.parametrize(
    ("name", "key"),
    [("qwen2-vl", "image_grid_thw"), ("qwen3-vl", "image_grid_thw"), ("llava-next", "image_sizes")],
)
def test_a_grid_that_is_unknown(name: str, key: str) -> None:
    """Features that were computed earlier don't say how they lie; the table has to come with them."""
    tiny = TINY[name]
    model = tiny.model(12)
    prompt = tiny.prompt(model, [1], seed=12)
    inputs = dict(prompt.inputs)
    with torch.no_grad():
        encoded = model.model.get_image_features(inputs.pop("pixel_values"), prompt.inputs[key], return_dict=True)
    call = inputs | {"mm_encoder_outputs": {"image": encoded}}
    given, _ = logits_of(model, Prompt(call, prompt.images, prompt.visual, prompt.pictures), mode="two-pass")
    direct, _ = logits_of(model, prompt, mode="two-pass")
    assert torch.equal(given, direct)
    without = {field: value for field, value in call.items() if field != key}
    refused(model, without, errors.PrefillError, f"{key} is missing. The processor returns it")


def test_a_vision_tower_that_is_not_known() -> None:
    model = TINY["llava"].model(12)
    prompt = TINY["llava"].prompt(model, [1])
    model.config.vision_config.model_type = "pixtral"
    refused(model, prompt.inputs, errors.PrefillError, "vision tower 'pixtral'.*known towers.*clip_vision_model")


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl", "llava-onevision"])
def test_videos_are_refused(name: str) -> None:
    model = TINY[name].model(12)
    ids = torch.randint(3, 60, (1, 9))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": torch.zeros(1)}
    refused(model, inputs, errors.PrefillError, "a prompt with a video")


def test_an_image_of_many_frames_is_refused() -> None:
    model = TINY["qwen2-vl"].model(12)
    prompt = TINY["qwen2-vl"].prompt(model, [1])
    table = prompt.inputs["image_grid_thw"] * torch.tensor([2, 1, 1])
    refused(model, prompt.inputs | {"image_grid_thw": table}, errors.PrefillError, "2 frames: that is a video")


def test_a_grid_without_an_inner_patch() -> None:
    model = TINY["qwen2-vl"].model(12)
    prompt = TINY["qwen2-vl"].prompt(model, [1])  # 24 tokens: as 4 x 6, or as 2 x 12
    inputs = prompt.inputs | {"image_grid_thw": torch.tensor([[1, 4, 24]])}
    refused(model, inputs, errors.PrefillError, "grid of 2 x 12 patches.*set exclude_border=False")


def test_a_language_model_without_vision_is_refused() -> None:
    model = TINY["qwen-vl"].model(12)
    del model.transformer.visual
    with pytest.raises(errors.UnsupportedModelError, match="model_type 'qwen' has no vision tower"):
        SCR(model, config=CONFIG, mode="two-pass")


# -- parts -----------------------------------------------------------------------------------------------------------


def test_onevision_tiles_an_image_only_where_it_is_alone() -> None:
    tiny = TINY["llava-onevision"]
    model = tiny.model(14)
    generator = torch.Generator().manual_seed(14)
    ids = [1, 5, *[IMAGE_TOKEN] * 37, 6, *[IMAGE_TOKEN] * 37, 7, 8, 9]  # each: a thumbnail and one newline
    inputs = {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "pixel_values": torch.randn(2, 5, 3, 24, 24, generator=generator),
        "image_sizes": torch.tensor([[48, 48], [17, 40]]),
        "batch_num_images": torch.tensor([2]),
    }
    images = [Image(0, list(range(start, start + 36)), (6, 6)) for start in (2, 40)]
    expected, sources = reference_logits(model, inputs, CONFIG, images=images)
    with torch.no_grad(), SCR(model, config=CONFIG, mode="two-pass") as scr:
        logits = model(**inputs).logits
        tokens = model.generate(**inputs, max_new_tokens=1, do_sample=False)
    assert [report.sources for report in scr.reports] == sources
    assert torch.allclose(logits, expected, atol=1e-4, rtol=0)
    assert tokens[0, -1] == expected[0, -1].argmax()


def test_source_fraction_follows_the_grid() -> None:
    config = SCRConfig(source_fraction=0.0556)
    assert [effective_num_sources(grid, config) for grid in ((24, 24), (32, 32), (16, 16), (4, 5))] == [32, 57, 14, 1]
    assert effective_num_sources((6, 6), SCRConfig(source_fraction=0.5)) == 8  # half of the inner 16
    assert effective_num_sources((32, 32), SCRConfig()) == 32
    for value in (0.0, 0.6, -0.1):
        with pytest.raises(errors.ConfigurationError, match="source_fraction="):
            SCRConfig(source_fraction=value)
    model = TINY["qwen2-vl"].model(15)
    prompt = TINY["qwen2-vl"].prompt(model, [2], seed=15)
    with torch.no_grad(), SCR(model, config=SCRConfig(
        source_fraction=0.125, edit_layers=(0, 2), attention_layers=(2, 4)
    ), mode="two-pass") as scr:  # fmt: skip
        model(**prompt.inputs)
    assert [len(report.sources) for report in scr.reports] == [3, 3]
