"""SCR against a naive reference: eager attention matrices and Python loops, written from the paper's text."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from scr_runtime import SCR, PredictorConfig, SCRConfig, SourcePredictor, capture, errors
from tests.scr_runtime.reference import (
    IMAGE_TOKEN,
    hook_count,
    kept,
    make_predictor,
    reference_greedy,
    reference_images,
    reference_logits,
    reference_maps,
    reference_sources,
)

CONFIG = SCRConfig(num_sources=5, strength=1.3, edit_layers=(0, 2), attention_layers=(2, 4))


# -- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [[1], [1, 1, 1], [2, 1], [3]])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_two_pass_equals_the_naive_reference(tiny_llava: Any, llava_inputs: Any, images: list[int], attn: str) -> None:
    for seed in range(3):
        model = tiny_llava(seed, attn=attn)
        inputs = llava_inputs(model, images, seed=seed)
        expected, sources = reference_logits(model, inputs, CONFIG)
        with torch.no_grad(), SCR(model, config=CONFIG, mode="two-pass") as scr:
            logits = model(**inputs).logits
        assert [report.sources for report in scr.reports] == sources
        assert torch.allclose(kept(inputs, logits), kept(inputs, expected), atol=1e-4, rtol=0)
        with torch.no_grad():
            moved = kept(inputs, model(**inputs).logits) - kept(inputs, logits)
        assert moved.abs().max() > 0.05  # the edit is no rounding error, so the comparison above means something


@pytest.mark.parametrize(
    "changes",
    [
        {"connectivity": 4},
        {"exclude_border": False},
        {"num_sources": 1000},
        {"edit_layers": (1, 5)},
        {"edit_layers": (3, 3), "attention_layers": (1, 1)},
        {"attention_layers": (1, 5)},
        {"suppress_claimed": True},
        {"suppress_claimed": True, "connectivity": 4},
        {"suppress_claimed": True, "num_sources": 1000},  # 8 of 16, where 4 at most are apart: claimed ones fill up
    ],
)
def test_every_setting_follows_the_reference(tiny_llava: Any, llava_inputs: Any, changes: dict[str, Any]) -> None:
    config = SCRConfig.from_dict(CONFIG.to_dict() | changes)
    model = tiny_llava(7)
    inputs = llava_inputs(model, [1, 2], seed=7)
    expected, sources = reference_logits(model, inputs, config)
    with torch.no_grad(), SCR(model, config=config, mode="two-pass") as scr:
        logits = model(**inputs).logits
    assert [report.sources for report in scr.reports] == sources
    assert torch.allclose(kept(inputs, logits), kept(inputs, expected), atol=1e-4, rtol=0)


def test_strategy_full_keeps_the_class_token_out(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(3, strategy="full")
    inputs = llava_inputs(model, [1, 1], seed=3)
    expected, _ = reference_logits(model, inputs, CONFIG)
    with torch.no_grad(), SCR(model, config=CONFIG, mode="two-pass"):
        logits = model(**inputs).logits
    assert torch.allclose(kept(inputs, logits), kept(inputs, expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize("pad", ["left", "right"])
def test_maps_equal_eager_averages(tiny_llava: Any, llava_inputs: Any, pad: str) -> None:
    model = tiny_llava(1)
    inputs = llava_inputs(model, [1, 2, 1], seed=1, pad=pad)
    captures = capture(model, CONFIG, inputs)
    expected = reference_maps(model, inputs, CONFIG, inputs["input_ids"].shape[1])
    assert [item.row for item in captures] == [0, 1, 1, 2]
    for item, attention in zip(captures, expected, strict=True):
        assert torch.allclose(item.attention, attention, atol=1e-6, rtol=0)


def test_capture_states_are_block_0_outputs(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(1)
    inputs = llava_inputs(model, [1, 1], seed=1)
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).hidden_states[1]
    for item, (row, positions, _) in zip(capture(model, CONFIG, inputs), reference_images(model, inputs), strict=True):
        assert torch.equal(item.states, hidden[row, positions])
        text = [
            place
            for place in range(positions[-1] + 1, hidden.shape[1])
            if inputs["input_ids"][row, place] != IMAGE_TOKEN
        ]
        assert torch.allclose(item.question, hidden[row, text].mean(0), atol=1e-6)
    assert model.config.text_config._attn_implementation == "sdpa"


def test_one_pass_given_the_true_scores_equals_two_pass(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(2)
    inputs = llava_inputs(model, [1, 1], seed=2)
    truth = torch.stack([item.attention for item in capture(model, CONFIG, inputs)])

    class Oracle(SourcePredictor):
        def forward(self, states: Tensor, grid: Any, question: Tensor | None = None) -> Tensor:
            return truth

    oracle = Oracle(PredictorConfig(32, rank=4))
    with torch.no_grad():
        with SCR(model, config=CONFIG, mode="two-pass"):
            two_pass = model(**inputs).logits
        with SCR(model, config=CONFIG, mode="one-pass", predictor=oracle):
            one_pass = model(**inputs).logits
    assert torch.equal(one_pass, two_pass)


def test_one_pass_edits_the_sources_that_its_predictor_chose(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(4)
    inputs = llava_inputs(model, [2, 1], seed=4)
    with torch.no_grad(), SCR(model, config=CONFIG, mode="one-pass", predictor=make_predictor(model)) as scr:
        logits = model(**inputs).logits
    expected, _ = reference_logits(model, inputs, CONFIG, [report.sources for report in scr.reports])
    assert torch.allclose(kept(inputs, logits), kept(inputs, expected), atol=1e-4, rtol=0)
    assert {report.provider for report in scr.reports} == {"one-pass"}


APART = SCRConfig.from_dict(CONFIG.to_dict() | {"suppress_claimed": True})


@pytest.mark.parametrize("mode", ["one-pass", "auto", "uniform"])
def test_sources_stay_apart_in_every_mode(tiny_llava: Any, llava_inputs: Any, mode: Any) -> None:
    model = tiny_llava(4)
    predictor = make_predictor(model)
    predictor.set_calibration(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]), 0.0, temperature=0.3)
    inputs = llava_inputs(model, [2, 1], seed=4)
    found: dict[bool, Any] = {}
    for config in (CONFIG, APART):
        with torch.no_grad(), SCR(model, config=config, mode=mode, predictor=predictor, seed=1) as scr:
            logits = model(**inputs).logits
        assert scr._last is not None
        assert scr._last.choice is not None
        scores = torch.cat([part.scores for part in scr._last.choice.scores])
        chosen = [report.sources for report in scr.reports]
        assert chosen == [reference_sources(row, config) for row in scores]
        expected, _ = reference_logits(model, inputs, config, chosen)
        assert torch.allclose(kept(inputs, logits), kept(inputs, expected), atol=1e-4, rtol=0)
        for row, report in zip(scores, scr.reports, strict=True):
            if mode == "uniform":
                assert report.confidence is None
                continue
            further = reference_sources(row, config, k=CONFIG.num_sources + 1)  # and the one that would come next
            cut = row[further[-2:]].mean()
            sure = torch.sigmoid((row[further[:-1]] - cut) / 0.3).mean()
            assert report.confidence == pytest.approx(float(sure), abs=1e-5)
        found[config.suppress_claimed] = chosen
    assert found[True] != found[False]


# -- generate --------------------------------------------------------------------------------------------------------


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


def test_text_only_passes_through_untouched(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(9)
    inputs = llava_inputs(model, [0, 0], seed=9)
    vanilla = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with torch.no_grad(), SCR(model, config=CONFIG, mode="two-pass") as scr:
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), vanilla)
        model(**inputs)
        assert scr.reports == []


def test_rows_without_an_image_beside_rows_with_one(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(9)
    inputs = llava_inputs(model, [1, 0, 2], seed=9)
    expected, _ = reference_logits(model, inputs, CONFIG)
    with torch.no_grad(), SCR(model, config=CONFIG, mode="two-pass"):
        logits = model(**inputs).logits
    assert torch.allclose(kept(inputs, logits), kept(inputs, expected), atol=1e-4, rtol=0)


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


def test_hidden_states_output_sees_the_edit_and_not_the_diagnostic(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(10, attn="eager")
    inputs = llava_inputs(model, [1], seed=10)
    with torch.no_grad():
        vanilla = model(**inputs, output_hidden_states=True, output_attentions=True)
        with SCR(model, config=CONFIG, mode="two-pass"):
            edited = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert len(edited.hidden_states) == len(vanilla.hidden_states)
    assert len(edited.attentions) == len(vanilla.attentions)
    assert torch.equal(edited.hidden_states[0], vanilla.hidden_states[0])
    assert torch.equal(edited.attentions[0], vanilla.attentions[0])
    changed = [not torch.equal(a, b) for a, b in zip(edited.hidden_states, vanilla.hidden_states, strict=True)]
    assert changed == [False] + [True] * (len(changed) - 1)


# -- auto, uniform, off ----------------------------------------------------------------------------------------------


def test_auto_diagnoses_the_rows_of_low_confidence_and_only_them(
    tiny_llava: Any, llava_inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llava(12)
    predictor = make_predictor(model)
    inputs = llava_inputs(model, [1, 1, 1], seed=12)
    with torch.no_grad():
        with SCR(model, config=CONFIG, mode="one-pass", predictor=predictor) as scr:
            model(**inputs)
        sure = [report.confidence for report in scr.reports]
        threshold = sorted(value for value in sure if value is not None)[1]  # the lowest of three is under it
        low = sure.index(min(sure))  # type: ignore[type-var]
        batches: list[int] = []
        block = model.model.language_model.layers[1]
        forward = block.forward

        def spy(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            batches.append(len(hidden))
            return forward(hidden, *args, **kwargs)

        monkeypatch.setattr(block, "forward", spy)
        with SCR(model, config=CONFIG, mode="auto", predictor=predictor, threshold=threshold) as scr:
            logits = model(**inputs).logits
        assert batches == [1, 3]  # the nested run of one row, then the pass itself
        monkeypatch.undo()
        assert [report.provider == "two-pass" for report in scr.reports] == [row == low for row in range(3)]
        assert "under the threshold" in str(scr.reports[low].fallback_reason)
        truth = reference_maps(model, inputs, CONFIG, inputs["input_ids"].shape[1])
        assert scr.reports[low].sources == reference_sources(truth[low], CONFIG)
        expected, _ = reference_logits(model, inputs, CONFIG, [report.sources for report in scr.reports])
    assert torch.allclose(kept(inputs, logits), kept(inputs, expected), atol=1e-4, rtol=0)


def test_auto_at_both_ends_is_one_pass_and_two_pass(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(13)
    predictor = make_predictor(model)
    inputs = llava_inputs(model, [1, 2], seed=13)

    def logits(mode: Any, **kwargs: Any) -> Tensor:
        with torch.no_grad(), SCR(model, config=CONFIG, predictor=predictor, mode=mode, **kwargs):
            return model(**inputs).logits

    assert torch.equal(logits("auto", threshold=0.0), logits("one-pass"))
    assert torch.equal(logits("auto", threshold=1.1), logits("two-pass"))


def test_uniform_is_seeded_and_stays_off_the_border(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(14)
    inputs = llava_inputs(model, [1], seed=14)

    def draws(seed: int) -> list[list[int]]:
        found = []
        with torch.no_grad(), SCR(model, config=CONFIG, mode="uniform", seed=seed) as scr:
            for _ in range(20):
                model(**inputs)
                found.append(scr.reports[0].sources)
        return found

    first = draws(0)
    assert first == draws(0) != draws(1)
    assert len({tuple(sources) for sources in first}) == 20
    used = {patch for sources in first for patch in sources}
    assert used == {row * 6 + column for row in range(1, 5) for column in range(1, 5)}


def test_off_changes_nothing(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(15)
    inputs = llava_inputs(model, [1], seed=15)
    with torch.no_grad():
        vanilla = model(**inputs).logits
        hooks = hook_count(model)
        with SCR(model, mode="off") as scr:
            assert hook_count(model) == hooks
            assert torch.equal(model(**inputs).logits, vanilla)
        assert scr.reports == []


# -- attaching -------------------------------------------------------------------------------------------------------


def test_hooks_return_to_what_they_were(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(16)
    inputs = llava_inputs(model, [1], seed=16)
    model.model.language_model.layers[2].register_forward_hook(lambda *_: None)  # the user's own
    with torch.no_grad():
        vanilla = model(**inputs).logits
        before, attributes = hook_count(model), set(model.__dict__)
        scr = SCR(model, config=CONFIG, mode="two-pass")
        with scr:
            attached = hook_count(model)
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
            assert hook_count(model) == attached  # the layers' hooks are gone with the prefill
        assert hook_count(model) == before
        with pytest.raises(KeyError, match="mine"), scr:
            model(**inputs)
            raise KeyError("mine")
        assert hook_count(model) == before

        def explode(*_: Any) -> None:
            raise FloatingPointError("inside block 3")

        bomb = model.model.language_model.layers[3].register_forward_hook(explode)
        with scr:
            with pytest.raises(FloatingPointError, match="inside block 3"):
                model(**inputs)
            assert hook_count(model) == attached + 1
            with pytest.raises(FloatingPointError, match="inside block 3"):
                model.generate(**inputs, max_new_tokens=2)
        bomb.remove()
        assert (hook_count(model), set(model.__dict__)) == (before, attributes)
        assert model.config.text_config._attn_implementation == "sdpa"
        assert torch.equal(model(**inputs).logits, vanilla)


def test_no_hook_on_the_decoder_during_decode_steps(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(16)
    inputs = llava_inputs(model, [1], seed=16)
    blocks = model.model.language_model.layers
    seen: list[tuple[int, int]] = []

    def count(module: Any, args: Any, kwargs: Any) -> None:
        length = (args[0] if args else kwargs["hidden_states"]).shape[1]
        seen.append((length, sum(len(block._forward_hooks) for block in blocks)))

    blocks[5].register_forward_pre_hook(count, with_kwargs=True)
    with SCR(model, config=CONFIG, mode="two-pass"):
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    prompt = inputs["input_ids"].shape[1]
    own = sum(len(block._forward_hooks) for block in blocks)  # transformers' own output recorders
    assert seen == [(prompt, own + 3), (1, own), (1, own)]


def test_attaching_twice_is_an_error_and_detaching_twice_is_not(tiny_llava: Any) -> None:
    model = tiny_llava(17)
    scr = SCR(model, config=CONFIG, mode="two-pass").attach()
    with pytest.raises(errors.AttachError, match="attached to this LlavaForConditionalGeneration already"):
        SCR(model, config=CONFIG, mode="uniform").attach()
    scr.detach()
    scr.detach()
    with scr:
        pass


def test_two_models_in_two_threads(tiny_llava: Any, llava_inputs: Any) -> None:
    models = [tiny_llava(seed) for seed in (18, 19)]
    inputs = [llava_inputs(model, [1], seed=seed) for model, seed in zip(models, (18, 19), strict=True)]
    expected = [reference_greedy(model, given, CONFIG, 4) for model, given in zip(models, inputs, strict=True)]
    results: dict[int, list[Tensor]] = {0: [], 1: []}

    def serve(index: int) -> None:
        with SCR(models[index], config=CONFIG, mode="two-pass"):
            for _ in range(5):
                results[index].append(models[index].generate(**inputs[index], max_new_tokens=4, do_sample=False))

    threads = [threading.Thread(target=serve, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        assert len(results[index]) == 5
        assert all(torch.equal(tokens, expected[index]) for tokens in results[index])


# -- bad input -------------------------------------------------------------------------------------------------------


def test_a_prompt_without_an_image(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(20)
    with_image, without = llava_inputs(model, [1], seed=20), llava_inputs(model, [0], seed=20)
    with pytest.raises(errors.PrefillError, match="without an image"):
        capture(model, CONFIG, without)
    model(**with_image)  # transformers installs its output recorders at the first call
    hooks = hook_count(model)
    with SCR(model, config=CONFIG, mode="two-pass"), torch.no_grad():
        with pytest.raises(errors.PrefillError, match="placeholder missing"):
            model(**without, pixel_values=with_image["pixel_values"])
        ids = torch.randint(3, 90, (1, 60))
        with pytest.raises(ValueError, match="do not match"):
            model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=with_image["pixel_values"])
    assert hook_count(model) == hooks


def test_no_text_after_the_image(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(20)
    inputs = llava_inputs(model, [1], seed=20)
    end = int((inputs["input_ids"][0] == IMAGE_TOKEN).nonzero()[-1]) + 1
    inputs = {key: value[:, :end] if value.ndim == 2 else value for key, value in inputs.items()}
    with (
        torch.no_grad(),
        SCR(model, config=CONFIG, mode="two-pass"),
        pytest.raises(errors.NonFiniteScoresError, match="no text after the image"),
    ):
        model(**inputs)


def test_chunked_prefill_is_refused(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(20)
    inputs = llava_inputs(model, [1], seed=20)
    with (
        SCR(model, config=CONFIG, mode="two-pass"),
        pytest.raises(errors.PrefillError, match="prefill_chunk_size=None"),
    ):
        model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=16)


def test_embeddings_without_ids_are_refused(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(20)
    inputs = llava_inputs(model, [1], seed=20)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    with (
        torch.no_grad(),
        SCR(model, config=CONFIG, mode="two-pass"),
        pytest.raises(errors.PrefillError, match="Pass input_ids"),
    ):
        model(**inputs, inputs_embeds=embeds)


def test_an_image_on_a_filled_cache(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(20)
    inputs = llava_inputs(model, [1], seed=20)
    with torch.no_grad():
        cache = model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values
        mask = torch.cat([torch.ones(1, 3, dtype=torch.long), inputs["attention_mask"]], 1)
        call = inputs | {"attention_mask": mask, "past_key_values": cache}
        with (
            SCR(model, config=CONFIG, mode="two-pass"),
            pytest.raises(errors.PrefillError, match="mode='one-pass'"),
        ):
            model(**call)


def test_training_mode_is_refused(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(20).train()
    with (
        SCR(model, config=CONFIG, mode="two-pass"),
        pytest.raises(errors.UnsupportedModelError, match="eval"),
    ):
        model(**llava_inputs(model, [1]))


def test_a_layer_beyond_the_depth_and_an_unknown_family(tiny_llava: Any) -> None:
    model = tiny_llava(20)
    with pytest.raises(errors.ConfigurationError, match="has 6 decoder blocks"):
        SCR(model, config=SCRConfig(edit_layers=(0, 6), attention_layers=(1, 2)), mode="two-pass")
    with pytest.raises(errors.ConfigurationError, match="expected one of"):
        SCR(model, config=CONFIG, mode="onepass")  # type: ignore[arg-type]
    with pytest.raises(errors.UnsupportedModelError, match=r"Supported .*'llava'.*docs/families.md"):
        SCR(torch.nn.Linear(2, 2), config=CONFIG, mode="two-pass")


def test_another_attention_implementation_while_attached(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(20)
    with SCR(model, config=CONFIG, mode="two-pass"), torch.no_grad():
        model.set_attn_implementation("eager")
        with pytest.raises(errors.UnsupportedModelError, match="changed to 'eager' while SCR was attached"):
            model(**llava_inputs(model, [1]))


def test_an_edit_that_does_not_fire_raises(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(21)
    inputs = llava_inputs(model, [1], seed=21)
    block = model.model.language_model.layers[1]
    original = model.model.language_model.forward
    with torch.no_grad(), SCR(model, config=CONFIG, mode="two-pass"):

        def without_hooks(*args: Any, **kwargs: Any) -> Any:
            block._forward_hooks.clear()  # what compiling a whole language model amounts to
            return original(*args, **kwargs)

        model.model.language_model.forward = without_hooks
        with pytest.raises(errors.EditNotFiredError, match=r"\[0, 1, 2\].*\[0, 2\] were"):
            model(**inputs)
    model.model.language_model.forward = original


class Broken(SourcePredictor):
    """Returns NaN for one patch."""

    def forward(self, states: Tensor, grid: Any, question: Tensor | None = None) -> Tensor:
        scores = super().forward(states, grid, question)
        scores[0, 7] = float("nan")
        return scores


def test_non_finite_scores(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(22)
    inputs = llava_inputs(model, [1, 1], seed=22)
    broken = Broken(PredictorConfig(32, rank=4))
    with (
        torch.no_grad(),
        SCR(model, config=CONFIG, mode="one-pass", predictor=broken),
        pytest.raises(errors.NonFiniteScoresError, match="NaN"),
    ):
        model(**inputs)
    with torch.no_grad(), SCR(model, config=CONFIG, mode="auto", predictor=broken) as scr:
        model(**inputs)
    assert [report.provider for report in scr.reports] == ["two-pass", "one-pass"]
    assert scr.reports[0].fallback_reason == "the predictor's scores are not finite"


def test_a_predictor_that_cannot_be_used(tiny_llava: Any, llava_inputs: Any, tmp_path: Any) -> None:
    model = tiny_llava(23)
    inputs = llava_inputs(model, [1], seed=23)
    other = SourcePredictor(PredictorConfig(64, rank=4))
    for predictor, error, words in (
        (tmp_path / "nowhere", errors.PredictorNotFoundError, "does not exist"),
        (other, errors.PredictorMismatchError, "hidden_size is 32, the predictor expects 64"),
        (None, errors.ConfigurationError, "no predictor was given"),
    ):
        with pytest.raises(error, match=words):
            SCR(model, config=CONFIG, mode="one-pass", predictor=predictor)
        with pytest.warns(RuntimeWarning, match=words):
            scr = SCR(model, config=CONFIG, mode="auto", predictor=predictor)
        with torch.no_grad(), scr:
            model(**inputs)
        assert scr.reports[0].provider == "two-pass"
        assert words in str(scr.reports[0].fallback_reason)


def test_reports_tell_entropy_and_grid(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(24)
    inputs = llava_inputs(model, [1], seed=24)
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).hidden_states[1]
        with SCR(model, config=CONFIG, mode="two-pass") as scr:
            model(**inputs)
    (report,) = scr.reports
    norms = hidden[0, reference_images(model, inputs)[0][1]].norm(dim=-1)
    share = norms / norms.sum()
    entropy = float(-(share * share.log()).sum())
    assert report.entropy == pytest.approx(entropy, abs=1e-5)
    assert report.entropy_normalised == pytest.approx(entropy / 3.58351893845611, abs=1e-5)
    assert (report.grid, report.layers_edited, report.confidence) == ((6, 6), (0, 1, 2), None)
