"""The kept prefix: what is recorded, which mask a run over the text needs, and where it can't be kept."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from scr_runtime import SCR, SCRConfig, errors
from scr_runtime.attention import AttentionRows
from scr_runtime.prefix import KeptPrefix, NestedRun, Question, text_mask
from tests.scr_runtime.questions import ask, fresh, positions, same_rows
from tests.scr_runtime.reference import make_predictor

CONFIG = SCRConfig(num_sources=5, strength=1.3, edit_layers=(0, 2), attention_layers=(2, 4))


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


def test_memory_is_bounded_reported_and_released(tiny_llava: Any, llava_inputs: Any) -> None:
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


def test_an_attention_without_a_mask_tensor_runs_full_diagnostics(
    tiny_llava: Any, llava_inputs: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llava(17)
    inputs = llava_inputs(model, [1], seed=17)
    monkeypatch.setattr("scr_runtime.attention._MASKED_BY_TENSOR", ())  # as with flash attention
    with torch.no_grad(), SCR(model, config=CONFIG, mode="two-pass") as scr, scr.image(**inputs) as image:
        for seed in range(2):
            question = ask(inputs, [6], seed)
            assert torch.equal(image(**question).logits, fresh(scr, question)[0])
    assert "every diagnostic run is a full one" in caplog.text


def test_rows_are_taken_in_any_order() -> None:
    kept = KeptPrefix(torch.zeros(4, 3, dtype=torch.long))
    assert (kept.length, kept.nbytes) == (3, 4 * 3 * 8)
    kept.add([2], {("key", 1): torch.full((1, 2), 2.0)})
    kept.add([0, 3], {("key", 1): torch.tensor([[0.0, 0.0], [3.0, 3.0]])})
    assert kept.rows == [2, 0, 3]
    assert kept.take(("key", 1), [2, 0, 3]) is kept.tensors["key", 1]  # no copy
    assert kept.take(("key", 1), [3, 2, 3])[:, 0].tolist() == [3.0, 2.0, 3.0]
    assert kept.nbytes == 4 * 3 * 8 + 3 * 2 * 4


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_the_text_sees_what_it_saw_in_the_whole_prompt(kind: str) -> None:
    """Two rows: P = 3 tokens of prefix behind 2 and 0 tokens of padding, S = 8."""
    starts, prefix, length = [2, 0], 3, 8
    keep = torch.ones(2, length, dtype=torch.bool)
    keep[0, :2] = False
    seen = (torch.ones(length, length, dtype=torch.bool).tril() & keep[:, None, :])[:, None]  # [2, 1, S, S]
    lowest = torch.finfo(torch.float32).min
    mask = seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, lowest)
    text = length - prefix - min(starts)
    found = text_mask(mask, torch.zeros(2, length, 4), starts, prefix, text)
    assert found.shape == (2, 1, text, prefix + text)
    for row, start in enumerate(starts):
        for query in range(text):
            place = length - text + query
            for key in range(prefix + text):
                column = start + key if key < prefix else length - text + key - prefix
                again = key >= prefix and column < start + prefix  # in the kept prefix already
                visible = bool(found[row, 0, query, key] == (True if kind == "bool" else 0))
                assert visible == (bool(seen[row, 0, place, column]) and not again)


def test_without_a_mask_the_text_is_causal_behind_the_prefix() -> None:
    found = text_mask(None, torch.zeros(1, 5, 4, dtype=torch.float16), [0], 3, 2)
    assert found.dtype == torch.float16
    assert (found[0, 0] == 0).tolist() == [[True, True, True, True, False], [True] * 5]


def test_a_call_without_a_cache_or_a_rotation_is_run_in_full(caplog: pytest.LogCaptureFixture) -> None:
    question = Question(KeptPrefix(torch.zeros(1, 3, dtype=torch.long)), [0], readable=True)
    rope = (torch.zeros(1, 5, 4), torch.zeros(1, 5, 4))
    for kwargs in (
        {"position_embeddings": rope},
        {"past_key_values": None},
        {"past_key_values": None, "position_embeddings": rope[0]},
    ):
        run = NestedRun(torch.zeros(1, 5, 4), dict(kwargs), AttentionRows((1, 2), 2))
        assert question.enter(run, None, 1) is run
        assert run.finish(run.hidden) is run.hidden
    assert caplog.text.count("every diagnostic run is a full one") == 3
