"""Image sessions in every family: the answers of an SCR without a session, and later diagnostics on text alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from scr_runtime import SCR, SCRConfig, errors
from tests.scr_runtime.questions import calls_of
from tests.scr_runtime.reference import decoder_blocks
from tests.scr_runtime.tiny_families import TINY, Prompt, Tiny

CONFIG = SCRConfig(num_sources=5, strength=1.3, edit_layers=(0, 2), attention_layers=(2, 4))
GENERATING = [tiny for tiny in TINY.values() if tiny.generates]


def ask(prompt: Prompt, text: int, seed: int, padding: int = 0) -> dict[str, Tensor]:
    """The same images and prefix with other text behind them, and padding before them."""
    end = int(prompt.visual[0].nonzero()[-1]) + 1
    while int(prompt.inputs["input_ids"][0, end]) >= 90:
        end += 1  # an end-of-image token
    words = torch.randint(3, 60, (1, text), generator=torch.Generator().manual_seed(100 + seed))
    question = dict(prompt.inputs)
    for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if key in question:
            new = {"input_ids": words, "attention_mask": torch.ones_like(words)}.get(key, torch.zeros_like(words))
            zeros = torch.zeros(1, padding, dtype=torch.long)
            question[key] = torch.cat([zeros, question[key][:, :end], new], 1)
    return question


def every_attention() -> Any:
    cases = [(tiny, attn) for tiny in GENERATING for attn in tiny.attentions]
    return pytest.mark.parametrize(("tiny", "attn"), cases, ids=[f"{tiny.name}-{attn}" for tiny, attn in cases])


@every_attention()
@pytest.mark.parametrize("images", [1, 2])
def test_every_question_is_answered_as_without_a_session(tiny: Tiny, attn: str, images: int) -> None:
    model = tiny.model(4, attn)
    prompt = tiny.prompt(model, [images], seed=4)
    with torch.no_grad(), SCR(model, config=CONFIG, mode="two-pass") as scr, scr.image(**prompt.inputs) as image:
        for seed, text in enumerate((5, 9, 2)):
            question = ask(prompt, text, seed)
            expected = model(**question).logits
            sources = [report.sources for report in scr.reports]
            with calls_of(decoder_blocks(model)[1]) as lengths:
                assert torch.allclose(image(**question).logits, expected, atol=1e-5, rtol=0)
            assert [report.sources for report in scr.reports] == sources
            whole = question["input_ids"].shape[1]
            behind = whole - 1 - int(prompt.visual[0].nonzero()[-1])  # the text, and what ends an image
            assert lengths == [whole if seed == 0 else behind, whole]


@every_attention()
@pytest.mark.parametrize("beams", [1, 2])
def test_greedy_and_beams_equal_those_without_a_session(tiny: Tiny, attn: str, beams: int) -> None:
    model = tiny.model(5, attn)
    prompt = tiny.prompt(model, [2], seed=5)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
    with SCR(model, config=CONFIG, mode="two-pass") as scr, scr.image(**prompt.inputs) as image:
        for seed, text in enumerate((5, 9, 2)):
            question = ask(prompt, text, seed, padding=3 * seed)
            expected = model.generate(**question, **options)
            question.pop("pixel_values")
            assert torch.equal(image.generate(**question, **options), expected)


def test_a_model_of_remote_code_is_refused() -> None:
    tiny = TINY["qwen-vl"]
    model = tiny.model(0, "own")
    with pytest.raises(errors.UnsupportedModelError, match="ask each question by itself"):
        SCR(model, config=CONFIG, mode="two-pass").image(**tiny.prompt(model, [1]).inputs)
