"""Image sessions against SCR without one: the same answers, less work, and no question about another image."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from scr_runtime import SCR, ImageSession, SCRConfig, errors
from tests.scr_runtime.questions import Inputs, ask, calls_of, fresh, positions, same_rows
from tests.scr_runtime.reference import IMAGE_TOKEN, hook_count, make_predictor

CONFIG = SCRConfig(num_sources=5, strength=1.3, edit_layers=(0, 2), attention_layers=(2, 4))


# -- the same answers ------------------------------------------------------------------------------------------------

MODES: list[tuple[str, dict[str, Any]]] = [
    ("two-pass", {}),
    ("one-pass", {}),
    ("auto", {"threshold": 0.0}),
    ("auto", {"threshold": 1.1}),
    ("uniform", {}),
]


@pytest.mark.parametrize(("mode", "settings"), MODES, ids=["two-pass", "one-pass", "auto-0", "auto-all", "uniform"])
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_every_question_is_answered_as_without_a_session(
    tiny_llava: Any, llava_inputs: Any, mode: Any, settings: dict[str, Any], images: int, attn: str
) -> None:
    model = tiny_llava(images, attn=attn)
    inputs = llava_inputs(model, [images], seed=images)
    questions = [ask(inputs, [count], seed) for seed, count in enumerate((5, 9, 1, 5))]
    predictor = make_predictor(model)
    expected, tokens = [], []
    with SCR(model, config=CONFIG, mode=mode, predictor=predictor, **settings) as scr:
        for question in questions:
            expected.append(fresh(scr, question))
    with SCR(model, config=CONFIG, mode=mode, predictor=predictor, **settings) as scr:
        for question in questions:
            tokens.append(model.generate(**question, max_new_tokens=6, do_sample=False))
    scr = SCR(model, config=CONFIG, mode=mode, predictor=predictor, **settings)
    with torch.no_grad(), scr, scr.image(**inputs) as image:
        for question, (logits, sources) in zip(questions, expected, strict=True):
            assert torch.allclose(image(**question).logits, logits, atol=1e-5, rtol=0)
            assert [report.sources for report in scr.reports] == sources
    scr = SCR(model, config=CONFIG, mode=mode, predictor=predictor, **settings)
    with scr, scr.image(**inputs) as image:
        for question, greedy in zip(questions, tokens, strict=True):
            text = {key: value for key, value in question.items() if key != "pixel_values"}
            assert torch.equal(image.generate(**text, max_new_tokens=6, do_sample=False), greedy)
    if mode != "uniform":
        assert len({str(sources) for _, sources in expected}) > 1  # the questions do choose differently


@pytest.mark.parametrize("seed", range(4))
def test_random_models_heads_and_depths(tiny_llava: Any, llava_inputs: Any, seed: int) -> None:
    model = tiny_llava(
        seed, side=5 + seed % 3, heads=4, kv_heads=(4, 2, 1)[seed % 3], strategy=("default", "full")[seed % 2]
    )
    config = SCRConfig(num_sources=4, strength=1.2, edit_layers=(seed % 2, 4), attention_layers=(1 + seed, 1 + seed))
    inputs = llava_inputs(model, [1 + seed % 2], seed=seed)
    with torch.no_grad(), SCR(model, config=config, mode="two-pass") as scr, scr.image(**inputs) as image:
        for number, count in enumerate((3, 12, 2)):
            question = ask(inputs, [count], number)
            logits, sources = fresh(scr, question)
            assert torch.allclose(image(**question).logits, logits, atol=1e-5, rtol=0)
            assert [report.sources for report in scr.reports] == sources


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("pad", ["left", "right"])
def test_a_batch_whose_questions_differ_in_length(tiny_llava: Any, llava_inputs: Any, attn: str, pad: str) -> None:
    model = tiny_llava(3, attn=attn)
    inputs = same_rows(model, llava_inputs, rows=3, images=2, seed=3)
    with torch.no_grad(), SCR(model, config=CONFIG, mode="two-pass") as scr, scr.image(**inputs) as image:
        for seed, texts in enumerate(([4, 4, 4], [2, 9, 50], [7, 1, 3])):
            question = ask(inputs, texts, seed, pad=pad)
            question["position_ids"] = positions(question)
            logits, sources = fresh(scr, question)
            keep = question["attention_mask"].bool()
            assert torch.allclose(image(**question).logits[keep], logits[keep], atol=1e-5, rtol=0)
            assert [report.sources for report in scr.reports] == sources
            if pad == "left":
                question.pop("position_ids")
                greedy = model.generate(**question, max_new_tokens=5, do_sample=False)
                assert torch.equal(image.generate(**question, max_new_tokens=5, do_sample=False), greedy)


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
        {"prompt_lookup_num_tokens": 3},
        {"num_beams": 3},
        {"num_beams": 2, "use_cache": False},
    ],
    ids=["no-cache", "static-cache", "prompt-lookup", "beams", "beams-no-cache"],
)
@pytest.mark.parametrize("images", [1, 2])
def test_every_kind_of_generate(tiny_llava: Any, llava_inputs: Any, options: dict[str, Any], images: int) -> None:
    model = tiny_llava(5)
    inputs = llava_inputs(model, [images], seed=5)
    with SCR(model, config=CONFIG, mode="two-pass") as scr, scr.image(**inputs) as image:
        for seed, count in enumerate((5, 9, 3)):
            question = ask(inputs, [count], seed)
            expected = model.generate(**question, max_new_tokens=6, do_sample=False, **options)
            tokens = image.generate(**question, max_new_tokens=6, do_sample=False, **options)
            assert torch.equal(tokens, expected)


def test_bfloat16_answers_are_close(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(8, dtype=torch.bfloat16)
    inputs = llava_inputs(model, [1], seed=8)
    with torch.no_grad(), SCR(model, config=CONFIG, mode="two-pass") as scr, scr.image(**inputs) as image:
        for seed in range(3):
            question = ask(inputs, [6], seed)
            logits, sources = fresh(scr, question)
            got = image(**question).logits
            common = set(scr.reports[0].sources) & set(sources[0])
            assert len(common) >= 4  # of 5: a map's neighbours in rank may swap within bf16's rounding
            if set(scr.reports[0].sources) == set(sources[0]):
                assert torch.allclose(got, logits, atol=0.05, rtol=0)


# -- less work -------------------------------------------------------------------------------------------------------


def test_the_image_is_encoded_once_and_later_diagnostics_take_the_text_alone(
    tiny_llava: Any, llava_inputs: Any
) -> None:
    model = tiny_llava(9)
    inputs = llava_inputs(model, [1], seed=9)
    questions = [ask(inputs, [count], seed) for seed, count in enumerate((5, 9, 2))]
    lengths = [question["input_ids"].shape[1] for question in questions]
    encoded: list[int] = []
    hook = model.model.vision_tower.register_forward_hook(lambda *_: encoded.append(1))
    blocks = model.model.language_model.layers
    scr = SCR(model, config=CONFIG, mode="two-pass")
    spies = calls_of(blocks[0]), calls_of(blocks[1]), calls_of(blocks[5])
    with torch.no_grad(), spies[0] as first, spies[1] as second, spies[2] as last, scr, scr.image(**inputs) as image:
        for question in questions:
            image(**question)
        image.generate(**questions[1], max_new_tokens=1)
    hook.remove()
    assert len(encoded) == 1
    assert second == [lengths[0], lengths[0], 9, lengths[1], 2, lengths[2], 9, lengths[1]]
    assert first == last == [*lengths, lengths[1]]


@pytest.mark.parametrize("mode", ["one-pass", "off", "uniform"])
def test_modes_without_a_diagnostic_keep_the_features_alone(tiny_llava: Any, llava_inputs: Any, mode: Any) -> None:
    model = tiny_llava(10)
    inputs = llava_inputs(model, [1], seed=10)
    settings: dict[str, Any] = {"config": CONFIG, "mode": mode, "predictor": make_predictor(model)}
    with torch.no_grad(), SCR(model, **settings) as scr, scr.image(**inputs) as image:
        opened = image.nbytes
        logits = image(**ask(inputs, [4], 0)).logits
        assert image.nbytes == opened
    with SCR(model, **settings) as scr:
        assert torch.equal(logits, fresh(scr, ask(inputs, [4], 0))[0])


def test_two_sessions_at_a_time(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(12)
    prompts = [llava_inputs(model, [1], seed=seed) for seed in (12, 13)]
    with torch.no_grad(), SCR(model, config=CONFIG, mode="two-pass") as scr:
        images = [scr.image(**inputs) for inputs in prompts]
        for seed in range(3):
            for inputs, image in zip(prompts, images, strict=True):
                question = ask(inputs, [6], seed)
                logits, _ = fresh(scr, question)  # calls without a session still work beside them
                assert torch.allclose(image(**question).logits, logits, atol=1e-5, rtol=0)
        images[0].close()
        images[0].close()
        images[1](**ask(prompts[1], [6], 3))
        images[1].close()


def test_the_callers_inputs_and_caches_stay_as_they_are(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(12)
    inputs = llava_inputs(model, [1], seed=12)
    with torch.no_grad(), SCR(model, config=CONFIG, mode="two-pass") as scr, scr.image(**inputs) as image:
        image(**inputs)
        question = ask(inputs, [6], 1)
        before = dict(question)
        step = {"input_ids": torch.tensor([[7]]), "attention_mask": torch.ones(1, 46, dtype=torch.long)}
        results = []
        for call in (image, model):
            output = call(**question, use_cache=True)
            assert output.past_key_values.get_seq_length() == 45
            results.append(model(**step, past_key_values=output.past_key_values).logits)  # a decode step by hand
        assert torch.allclose(*results, atol=1e-5, rtol=0)
        assert question == before


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.fixture
def opened(tiny_llava: Any, llava_inputs: Any) -> Iterator[tuple[SCR, ImageSession, Inputs]]:
    model = tiny_llava(13)
    inputs = llava_inputs(model, [1], seed=13)
    with torch.no_grad(), SCR(model, config=CONFIG, mode="two-pass") as scr, scr.image(**inputs) as image:
        image(**inputs)
        yield scr, image, inputs


def test_another_image_or_another_prefix_is_refused(opened: Any, llava_inputs: Any) -> None:
    scr, image, inputs = opened
    other = ask(inputs, [6], 0)
    ids = other["input_ids"]
    system, fewer, double = ids.clone(), torch.cat([ids[:, :1], ids[:, 2:]], 1), llava_inputs(scr.model, [2], seed=13)
    system[0, 1] += 1
    ones = torch.ones_like
    cases: list[tuple[dict[str, Any], str]] = [
        (other | {"pixel_values": other["pixel_values"] + 0.1}, "pixel_values is not the session's"),
        (other | {"pixel_values": other["pixel_values"].repeat(2, 1, 1, 1)}, "about another image"),
        (other | {"input_ids": system}, "Only what comes after the image may change"),
        ({"input_ids": fewer, "attention_mask": ones(fewer)}, "Only what comes after the image may change"),
        ({key: double[key] for key in ("input_ids", "attention_mask")}, "nor the number of images"),
        ({"input_ids": ids.repeat(2, 1), "attention_mask": ones(ids).repeat(2, 1)}, "1 batch rows.* has 2"),
        ({"input_ids": torch.tensor([[5, 6]])}, "are not the session's"),
        ({"input_ids": ids[:, : 3 + 36]}, "no text after its image"),
        ({"input_ids": torch.cat([ids[:, :1] * 0, ids], 1)}, "pass the processor's attention_mask"),
        (other | {"attention_mask": other["attention_mask"] * (ids != IMAGE_TOKEN)}, "masked tokens within it"),
        (other | {"attention_mask": torch.ones(1, 1, 45, 45)}, r"attention_mask, \[batch, tokens\]"),
        ({"attention_mask": other["attention_mask"]}, "pass input_ids"),
        (other | {"mm_encoder_outputs": {"image": image._features}}, "leave mm_encoder_outputs out"),
        (other | {"past_key_values": scr.model(**inputs, use_cache=True).past_key_values}, "from an empty cache"),
    ]
    for call, words in cases:
        with pytest.raises(errors.SessionError, match=words):
            image(**call)
        with pytest.raises(errors.SessionError, match=words):
            image.generate(**call, max_new_tokens=1)
    logits, _ = fresh(scr, other)
    assert torch.allclose(image(**other).logits, logits, atol=1e-5, rtol=0)  # no refusal did any harm


def test_a_pixel_buffer_that_is_filled_again_is_another_image(opened: Any) -> None:
    _, image, inputs = opened
    inputs["pixel_values"].mul_(2)
    with pytest.raises(errors.SessionError, match="about another image"):
        image(**inputs)


def test_what_a_session_cannot_be_opened_on(
    tiny_llava: Any, llava_inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llava(14)
    scr = SCR(model, config=CONFIG, mode="two-pass")
    with pytest.raises(errors.SessionError, match="about an image"):
        scr.image(**llava_inputs(model, [0]))
    with pytest.raises(errors.SessionError, match="row 1 of the batch has no image"):
        scr.image(**llava_inputs(model, [1, 0]))
    with pytest.raises(errors.SessionError, match=r"prefixes have \[39, 77\] tokens.*one session per row"):
        scr.image(**llava_inputs(model, [1, 2]))
    monkeypatch.delattr(type(model.model), "get_image_features")
    with pytest.raises(errors.UnsupportedModelError, match="ask each question by itself"):
        scr.image(**llava_inputs(model, [1]))


def test_a_session_ends_with_its_block_and_needs_its_scr(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(15)
    inputs = llava_inputs(model, [1], seed=15)
    scr = SCR(model, config=CONFIG, mode="two-pass")
    with torch.no_grad():
        with scr.image(**inputs) as image:
            with pytest.raises(errors.AttachError, match="not attached"):
                image(**inputs)
            with SCR(model, config=CONFIG, mode="uniform"), pytest.raises(errors.AttachError, match="not attached"):
                image(**inputs)
            with scr:
                image(**inputs)
        with scr, pytest.raises(errors.SessionError, match="is closed"):
            image(**inputs)
        with pytest.raises(errors.SessionError, match="is closed"), image:
            pass


def test_an_exception_inside_leaves_model_and_session_clean(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(16)
    inputs = llava_inputs(model, [1], seed=16)
    block = model.model.language_model.layers[2]
    with torch.no_grad():
        vanilla = model(**inputs).logits
        hooks, attributes = hook_count(model), set(model.__dict__)
        forward = block.forward

        def explode(*_: Any, **__: Any) -> Any:
            raise FloatingPointError("inside block 2")

        scr = SCR(model, config=CONFIG, mode="two-pass")
        with scr, pytest.raises(KeyError, match="mine"), scr.image(**inputs) as image:
            block.forward = explode
            with pytest.raises(FloatingPointError, match="inside block 2"):
                image(**inputs)  # within the first diagnostic run: nothing half-recorded is kept
            assert image._kept is not None and image._kept.rows == []
            block.forward = forward
            logits, _ = fresh(scr, inputs)
            assert torch.equal(image(**inputs).logits, logits)
            block.forward = explode
            with pytest.raises(FloatingPointError, match="inside block 2"):
                image.generate(**ask(inputs, [4], 1), max_new_tokens=2)
            block.forward = forward
            question = ask(inputs, [4], 2)
            assert torch.allclose(image(**question).logits, fresh(scr, question)[0], atol=1e-5, rtol=0)
            raise KeyError("mine")
        del block.__dict__["forward"]
        assert image.nbytes == 0
        assert (hook_count(model), set(model.__dict__)) == (hooks, attributes)
        assert torch.equal(model(**inputs).logits, vanilla)
