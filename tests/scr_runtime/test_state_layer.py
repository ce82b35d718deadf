"""Sources chosen from a later block than the paper's: the same exactness, wherever the pass is entered."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.counting import accelerator_branches, counted
from scr_runtime import SCR, PredictorConfig, SCRConfig, SourcePredictor, capture
from tests.scr_runtime.questions import ask, calls_of, fresh, positions, same_rows
from tests.scr_runtime.reference import (
    IMAGE_TOKEN,
    decoder_blocks,
    kept,
    make_predictor,
    reference_greedy,
    reference_images,
    reference_logits,
    reference_maps,
    reference_sources,
)
from tests.scr_runtime.test_families import every
from tests.scr_runtime.test_maps import PROMPTS, prompts_about_two_images
from tests.scr_runtime.tiny_families import Tiny

FROM_1 = SCRConfig(num_sources=5, strength=1.3, edit_layers=(1, 3), attention_layers=(2, 4), state_layer=1)
FROM_2 = SCRConfig(num_sources=5, strength=1.3, edit_layers=(2, 4), attention_layers=(3, 5), state_layer=2)
EDIT_LATER = SCRConfig(num_sources=5, strength=1.3, edit_layers=(3, 4), attention_layers=(4, 5), state_layer=1)
configs = pytest.mark.parametrize("config", [FROM_1, FROM_2, EDIT_LATER], ids=["1", "2", "1-edits-from-3"])


@configs
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_two_pass_equals_the_naive_reference(tiny_llava: Any, llava_inputs: Any, config: SCRConfig, attn: str) -> None:
    model = tiny_llava(1, attn=attn)
    inputs = llava_inputs(model, [2, 0, 1], seed=1)
    expected, sources = reference_logits(model, inputs, config)
    blocks = decoder_blocks(model)
    scr = SCR(model, config=config, mode="two-pass")
    state, last = config.state_layer, config.attention_layers[1]
    with torch.no_grad(), calls_of(blocks[state]) as before, calls_of(blocks[state + 1]) as behind, scr:
        logits = model(**inputs).logits
    assert [report.sources for report in scr.reports] == sources
    assert torch.allclose(kept(inputs, logits), kept(inputs, expected), atol=1e-4, rtol=0)
    assert (len(before), len(behind)) == (1, 2)  # the nested run starts behind the state layer, no earlier
    assert last > state and scr.reports[0].layers_edited == tuple(
        range(config.edit_layers[0], config.edit_layers[1] + 1)
    )
    with torch.no_grad():
        moved = kept(inputs, model(**inputs).logits) - kept(inputs, logits)
    assert moved.abs().max() > 0.05  # the edit is no rounding error, so the comparison above means something


@every()
@pytest.mark.parametrize("layer", [1, 2])
def test_every_family_equals_the_naive_reference(tiny: Tiny, layer: int) -> None:
    """Qwen3-VL adds features behind its first blocks: behind the one that sources are chosen from, too."""
    config = SCRConfig(5, 1.3, (layer, 3), (layer + 1, 4), state_layer=layer)
    model = tiny.model(2)
    prompt = tiny.prompt(model, [2, 1], seed=2)
    expected, sources = reference_logits(model, prompt.inputs, config, images=prompt.images, visual=prompt.visual)
    with torch.no_grad(), SCR(model, config=config, mode="two-pass") as scr:
        logits = model(**prompt.inputs).logits
    assert [report.sources for report in scr.reports] == sources
    assert torch.allclose(kept(prompt.inputs, logits), kept(prompt.inputs, expected), atol=1e-4, rtol=0)


@every()
def test_capture_gives_the_blocks_own_output_and_the_reference_map(tiny: Tiny) -> None:
    model = tiny.model(1)
    prompt = tiny.prompt(model, [1, 2], seed=1)
    outputs: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hook = decoder_blocks(model)[2].register_forward_hook(keep)
    with torch.no_grad():
        model(**prompt.inputs)
    hook.remove()
    captures = capture(model, FROM_2, prompt.inputs)
    expected = reference_maps(model, prompt.inputs, FROM_2, None, prompt.images, prompt.visual)
    for item, image, attention in zip(captures, prompt.images, expected, strict=True):
        assert torch.allclose(item.states, outputs[0][image.row, image.positions], atol=1e-6, rtol=0)
        assert torch.allclose(item.attention, attention, atol=1e-6, rtol=0)


@configs
def test_states_and_questions_are_hidden_states_of_a_plain_run(
    tiny_llava: Any, llava_inputs: Any, config: SCRConfig
) -> None:
    model = tiny_llava(1)
    inputs = llava_inputs(model, [1, 1], seed=1)
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).hidden_states[config.state_layer + 1]
    for item, (row, places, _) in zip(capture(model, config, inputs), reference_images(model, inputs), strict=True):
        assert torch.equal(item.states, hidden[row, places])
        text = [at for at in range(places[-1] + 1, hidden.shape[1]) if inputs["input_ids"][row, at] != IMAGE_TOKEN]
        assert torch.allclose(item.question, hidden[row, text].mean(0), atol=1e-6)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_packed_prompts_give_what_each_gives_alone(tiny_llava: Any, llava_inputs: Any, attn: str) -> None:
    """Behind block 1 a text has read the image, so what it must not see would show in its question as well."""
    model = tiny_llava(attn=attn)
    inputs = prompts_about_two_images(model, llava_inputs)
    each = capture(model, FROM_2, inputs)
    rows: list[int] = []
    hook = decoder_blocks(model)[0].register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    together = capture(model, FROM_2, dict(inputs, pixel_values=inputs["pixel_values"][::PROMPTS]), PROMPTS)
    hook.remove()
    assert rows == [2]  # packed: one row per image
    for one, other in zip(together, each, strict=True):
        torch.testing.assert_close(one.states, other.states, atol=5e-6, rtol=1e-5)
        torch.testing.assert_close(one.question, other.question, atol=5e-6, rtol=1e-5)
        torch.testing.assert_close(one.attention, other.attention, atol=1e-7, rtol=1e-5)


@configs
@pytest.mark.parametrize(
    "options", [{}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}]
)
def test_greedy_tokens_equal_the_reference(
    tiny_llava: Any, llava_inputs: Any, config: SCRConfig, options: dict[str, Any]
) -> None:
    model = tiny_llava(5)
    inputs = llava_inputs(model, [1, 2], seed=5)
    expected = reference_greedy(model, inputs, config, 5)
    with SCR(model, config=config, mode="two-pass"):
        tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False, **options)
    assert torch.equal(tokens, expected)


def test_cached_beams_equal_uncached_beams(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(6)
    inputs = llava_inputs(model, [1, 2], seed=6)
    results = []
    for use_cache in (True, False):
        with SCR(model, config=FROM_1, mode="two-pass"):
            results.append(
                model.generate(**inputs, use_cache=use_cache, max_new_tokens=5, num_beams=3, do_sample=False)
            )
    assert torch.equal(*results)


def test_auto_diagnoses_single_rows_exactly(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(12)
    predictor = make_predictor(model)
    inputs = llava_inputs(model, [1, 1, 1], seed=12)
    with torch.no_grad():
        with SCR(model, config=FROM_2, mode="one-pass", predictor=predictor) as scr:
            model(**inputs)
        sure = sorted(float(report.confidence or 0) for report in scr.reports)
        with SCR(model, config=FROM_2, mode="auto", predictor=predictor, threshold=sure[1]) as scr:
            logits = model(**inputs).logits
    assert [report.provider for report in scr.reports].count("two-pass") == 1
    truth = reference_maps(model, inputs, FROM_2, inputs["input_ids"].shape[1])
    for report, attention in zip(scr.reports, truth, strict=True):
        if report.provider == "two-pass":
            assert report.sources == reference_sources(attention, FROM_2)
    expected, _ = reference_logits(model, inputs, FROM_2, [report.sources for report in scr.reports])
    assert torch.allclose(kept(inputs, logits), kept(inputs, expected), atol=1e-4, rtol=0)


@configs
def test_a_predictor_reads_that_block(tiny_llava: Any, llava_inputs: Any, config: SCRConfig) -> None:
    model = tiny_llava(4)
    inputs = llava_inputs(model, [1, 1], seed=4)
    predictor = make_predictor(model)
    items = capture(model, config, inputs)
    states, question = torch.stack([i.states for i in items]), torch.stack([i.question for i in items])
    with torch.no_grad():
        scores = predictor(states, items[0].grid, question)
    with torch.no_grad(), SCR(model, config=config, mode="one-pass", predictor=predictor) as scr:
        model(**inputs)
    assert [report.sources for report in scr.reports] == [reference_sources(row, config) for row in scores]


@pytest.mark.parametrize("images", [1, 2])
def test_a_session_gives_the_same_answers_with_less_work(tiny_llava: Any, llava_inputs: Any, images: int) -> None:
    model = tiny_llava(images)
    inputs = same_rows(model, llava_inputs, rows=2, images=images, seed=images)
    blocks = decoder_blocks(model)
    questions = [ask(inputs, texts, seed) for seed, texts in enumerate(([5, 5], [9, 3], [1, 6]))]
    widest = [9, 6]
    with torch.no_grad(), SCR(model, config=FROM_1, mode="two-pass") as scr, scr.image(**inputs) as image:
        for number, question in enumerate(questions):
            question["position_ids"] = positions(question)
            logits, sources = fresh(scr, question)
            with calls_of(blocks[2]) as lengths:
                answer = image(**question).logits
            assert torch.allclose(kept(question, answer), kept(question, logits), atol=1e-5, rtol=0)
            assert [report.sources for report in scr.reports] == sources
            if number:
                assert lengths == [widest[number - 1], question["input_ids"].shape[1]]
        tokens = ask(inputs, [4, 4], 7)
        expected = model.generate(**tokens, max_new_tokens=5, do_sample=False)
        assert torch.equal(image.generate(**tokens, max_new_tokens=5, do_sample=False), expected)


def test_one_pass_costs_the_same_from_any_block(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(3)
    inputs = llava_inputs(model, [1])
    predictor = SourcePredictor(PredictorConfig(32, rank=4)).eval().requires_grad_(False)
    kernels = []
    with torch.no_grad(), accelerator_branches():
        vanilla = counted(lambda: model(**inputs))
        for layer in range(3):
            config = SCRConfig(
                num_sources=5, edit_layers=(layer, layer + 2), attention_layers=(4, 5), state_layer=layer
            )
            with SCR(model, config=config, mode="one-pass", predictor=predictor):
                count = counted(lambda: model(**inputs))
            assert count.syncs == vanilla.syncs
            kernels.append(count.net(vanilla))
    assert kernels[0] == kernels[1] == kernels[2]
