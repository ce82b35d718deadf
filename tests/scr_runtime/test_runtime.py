"""SCR against a naive reference: eager attention matrices and Python loops, written from the paper's text."""

from __future__ import annotations

import logging
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


@pytest.mark.filterwarnings("ignore:1000 sources are asked for")
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


# -- what passes through ---------------------------------------------------------------------------------------------


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


def test_reports_of_an_scr_that_is_not_attached(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(15)
    scr = SCR(model, config=CONFIG, mode="two-pass")
    with pytest.warns(RuntimeWarning, match=r"never attached: write `with SCR\(\.\.\.\)`"):
        assert scr.reports == []
    with scr:
        pass
    assert scr.reports == []  # nothing was asked
    with torch.no_grad(), scr:
        model(**llava_inputs(model, [1], seed=15))
    assert len(scr.reports) == 1


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


def test_the_log(tiny_llava: Any, llava_inputs: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llava(2)
    predictor = make_predictor(model)
    inputs = llava_inputs(model, [1, 1])
    predictor.set_drift(1e-3, 1.5)
    with caplog.at_level(logging.DEBUG, logger="scr_runtime"), torch.no_grad():
        with SCR(model, config=CONFIG, mode="auto", predictor=predictor, threshold=0.0):
            model(**inputs)
            model(**inputs)
        drift = [(record.levelname, record.getMessage()) for record in caplog.records]
        caplog.clear()
        with pytest.warns(RuntimeWarning, match="not usable"):
            scr = SCR(model, config=CONFIG, mode="auto")
        with scr:
            model(**inputs)
        without = [(record.levelname, record.getMessage()) for record in caplog.records]
        caplog.clear()
        with SCR(model, config=CONFIG, mode="auto", predictor=make_predictor(model), threshold=2.0):
            model(**inputs)
        low = [(record.levelname, record.getMessage()) for record in caplog.records]
    prefill = ("DEBUG", "prefill of 2 images: 2 two-pass; 3 blocks edited")
    assert drift[0][0] == "INFO"
    assert "attached to LlavaForConditionalGeneration (llava): mode auto, blocks 0-2, 5 sources" in drift[0][1]
    assert [level for level, _ in drift] == ["INFO", "WARNING", "DEBUG", "DEBUG"]  # the warning comes once
    assert "is over the limit 1.50" in drift[1][1]
    assert drift[2] == drift[3] == prefill
    assert [level for level, _ in without] == ["INFO", "INFO", "DEBUG"]  # the warning is Python's, once
    assert [level for level, _ in low] == ["INFO", "DEBUG"]  # low confidence is expected
