"""Image sessions against SCR without one: the same answers, less work, and no question about another image."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from scr_runtime import SCR, ImageSession, PredictorConfig, SCRConfig, SourcePredictor, errors

IMAGE_TOKEN = 99
CONFIG = SCRConfig(num_sources=5, strength=1.3, edit_layers=(0, 2), attention_layers=(2, 4))
Inputs = dict[str, Tensor]


def ask(inputs: Inputs, texts: list[int], seed: int, *, columns: int = 0, pad: str = "left") -> Inputs:
    """The same prefix and pixels with other text behind them; ``texts`` tokens per row, at least ``columns`` wide."""
    generator = torch.Generator().manual_seed(1000 + seed)
    rows: list[list[int]] = []
    for ids, kept, count in zip(inputs["input_ids"], inputs["attention_mask"], texts, strict=True):
        ids = ids[kept.bool()]
        end = int((ids == IMAGE_TOKEN).nonzero()[-1]) + 1
        rows.append([*ids[:end].tolist(), *torch.randint(3, 90, (count,), generator=generator).tolist()])
    width = max(columns, *map(len, rows))
    ids, mask = [], []
    for row in rows:
        fill, kept = [0] * (width - len(row)), [1] * len(row)
        ids.append(fill + row if pad == "left" else row + fill)
        mask.append([0] * len(fill) + kept if pad == "left" else kept + [0] * len(fill))
    return inputs | {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def positions(inputs: Inputs) -> Tensor:
    """As ``generate`` counts them: from the first token behind the padding."""
    return (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)


def same_rows(model: Any, make: Any, rows: int, images: int, seed: int) -> Inputs:
    """A batch whose rows have prefixes of equal length."""
    single = make(model, [images], seed=seed)
    pixels = torch.randn(
        rows * images, *single["pixel_values"].shape[1:], generator=torch.Generator().manual_seed(seed)
    )
    return {
        "input_ids": single["input_ids"].repeat(rows, 1),
        "attention_mask": single["attention_mask"].repeat(rows, 1),
        "pixel_values": pixels,
    }


def make_predictor(model: Any, seed: int = 0, **kwargs: Any) -> SourcePredictor:
    torch.manual_seed(seed)
    size = model.config.text_config.hidden_size
    return SourcePredictor(PredictorConfig(size, rank=8, width=16, **kwargs)).eval()


def fresh(scr: SCR, inputs: Inputs) -> tuple[Tensor, list[list[int]]]:
    with torch.no_grad():
        logits = scr.model(**inputs).logits
    return logits, [report.sources for report in scr.reports]


@contextmanager
def counted(module: torch.nn.Module) -> Iterator[list[int]]:
    """Positions in each call of a module's ``forward``, with or without its hooks."""
    forward, seen = module.forward, []

    def spy(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(hidden.shape[1])
        return forward(hidden, *args, **kwargs)

    module.forward = spy  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        del module.__dict__["forward"]


def hook_count(model: torch.nn.Module) -> int:
    tables = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_forward_hooks_with_kwargs")
    return sum(len(getattr(module, table)) for module in model.modules() for table in tables)


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


def test_padding_that_changes_from_question_to_question(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(4)
    inputs = llava_inputs(model, [1], seed=4)
    with SCR(model, config=CONFIG, mode="two-pass") as scr, scr.image(**inputs) as image:
        for seed, (text, columns) in enumerate(((5, 0), (6, 60), (3, 80), (8, 0))):
            question = ask(inputs, [text], seed, columns=columns)
            expected = model.generate(**question, max_new_tokens=6, do_sample=False)
            sources = scr.reports[0].sources
            assert torch.equal(image.generate(**question, max_new_tokens=6, do_sample=False), expected)
            assert scr.reports[0].sources == sources
        with torch.no_grad():  # a plain forward counts the padding, so the kept keys would be turned wrongly
            padded = ask(inputs, [5], 9, columns=60)
            with pytest.raises(errors.SessionError, match=r"position_ids that count from the first token"):
                image(**padded)
            padded["position_ids"] = positions(padded)
            logits, _ = fresh(scr, padded)
            assert torch.allclose(image(**padded).logits[:, -5:], logits[:, -5:], atol=1e-5, rtol=0)


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


def test_beams_before_and_after_single_rows_in_a_batch(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(6)
    inputs = same_rows(model, llava_inputs, rows=2, images=2, seed=6)
    with SCR(model, config=CONFIG, mode="two-pass") as scr, scr.image(**inputs) as image:
        for seed, beams in enumerate((3, 1, 2)):
            question = ask(inputs, [4 + seed, 6], seed)
            options: dict[str, Any] = {"max_new_tokens": 4, "num_beams": beams, "do_sample": False}
            assert torch.equal(image.generate(**question, **options), model.generate(**question, **options))
        assert image._kept is not None and image._kept.rows == [0, 1]  # beams are not kept three times


def test_auto_keeps_the_prefix_of_the_rows_it_diagnosed(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(7)
    inputs = same_rows(model, llava_inputs, rows=4, images=1, seed=7)
    questions = [ask(inputs, [5 + seed, 5, 8, 5], seed) for seed in range(6)]
    predictor = make_predictor(model)
    sure: list[float] = []
    with torch.no_grad(), SCR(model, config=CONFIG, mode="one-pass", predictor=predictor) as scr:
        for question in questions:
            model(**question, position_ids=positions(question))
            sure += [float(report.confidence or 0) for report in scr.reports]
    threshold = sorted(sure)[len(sure) // 3]
    held: list[list[int]] = []
    scr = SCR(model, config=CONFIG, mode="auto", predictor=predictor, threshold=threshold)
    with torch.no_grad(), scr, scr.image(**inputs) as image:
        for question in questions:
            question["position_ids"] = positions(question)
            logits, sources = fresh(scr, question)
            providers = [report.provider for report in scr.reports]
            keep = question["attention_mask"].bool()
            assert torch.allclose(image(**question).logits[keep], logits[keep], atol=1e-5, rtol=0)
            assert [report.sources for report in scr.reports] == sources
            assert [report.provider for report in scr.reports] == providers
            assert image._kept is not None
            held.append(image._kept.rows)
    assert 0 < len(held[0]) < len(held[-1])  # so that one-pass rows, first diagnostics and later ones were all met
    assert all(len(set(rows)) == len(rows) for rows in held)


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
    spies = counted(blocks[0]), counted(blocks[1]), counted(blocks[5])
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


def test_memory_is_bounded_told_and_released(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(11)
    inputs = llava_inputs(model, [1], seed=11)
    prefix, patches = 3 + 36, 36
    text = model.config.text_config
    with torch.no_grad(), SCR(model, config=CONFIG, mode="two-pass") as scr:
        with scr.image(**inputs) as image:
            opened = image.nbytes
            assert opened == inputs["pixel_values"].nbytes + 4 * patches * 32 + 8 * prefix
            sizes = []
            for seed in range(4):
                image(**ask(inputs, [5 + seed], seed))
                sizes.append(image.nbytes - opened)
            heads = 4 * prefix * text.num_key_value_heads * text.head_dim  # one block's keys
            assert sizes == [7 * heads + 2 * 4 * prefix * text.head_dim + 4 * (prefix - patches) * prefix] * 4
            assert image._kept is not None
            watched = [weakref.ref(tensor) for tensor in image._kept.tensors.values()]
            watched += [weakref.ref(image._features.pooler_output[0]), weakref.ref(image._image["pixel_values"])]
        gc.collect()
        assert [ref() for ref in watched] == [None] * len(watched)
        assert image.nbytes == 0


def test_two_sessions_at_a_time(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(12)
    prompts = [llava_inputs(model, [1], seed=seed) for seed in (12, 13)]
    with torch.no_grad(), SCR(model, config=CONFIG, mode="two-pass") as scr:
        images = [scr.image(**inputs) for inputs in prompts]
        for seed in range(3):
            for inputs, image in zip(prompts, images, strict=True):
                question = ask(inputs, [6], seed)
                logits, _ = fresh(scr, question)  # calls without a session go on beside them
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


def test_a_pixel_buffer_that_is_filled_anew_is_another_image(opened: Any) -> None:
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


def test_an_attention_without_a_mask_tensor_runs_full_diagnostics(
    tiny_llava: Any, llava_inputs: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llava(17)
    inputs = llava_inputs(model, [1], seed=17)
    monkeypatch.setattr("scr_runtime.session._MASKED_BY_TENSOR", ())  # as with flash attention
    with torch.no_grad(), SCR(model, config=CONFIG, mode="two-pass") as scr, scr.image(**inputs) as image:
        for seed in range(2):
            question = ask(inputs, [6], seed)
            assert torch.equal(image(**question).logits, fresh(scr, question)[0])
    assert "every diagnostic run is a full one" in caplog.text
