"""What torch.compile does to hooks: real compilation, with the backend that only traces."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import CompileConfig

from scr_runtime import SCR, SCRConfig, errors

pytestmark = pytest.mark.filterwarnings("ignore")  # dynamo's own, about what it can't trace
CONFIG = SCRConfig(num_sources=5, strength=1.3, edit_layers=(0, 2), attention_layers=(2, 4))


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_language_model_that_was_traced_without_hooks_is_refused(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(1)
    inputs = llava_inputs(model, [1])
    text = torch.randint(3, 90, inputs["input_ids"].shape)
    with torch.no_grad():
        vanilla = model(**inputs).logits
        model.model.language_model.compile(backend="eager")
        with SCR(model, config=CONFIG, mode="uniform") as scr:
            model(input_ids=text, attention_mask=inputs["attention_mask"])  # traced here, and no block has a hook
            with pytest.raises(errors.EditNotFiredError, match=r"\[0, 1, 2\].*but \[\] were.*one by one"):
                model(**inputs)
            assert scr.stats.prefills == 0
        assert torch.allclose(model(**inputs).logits, vanilla, atol=1e-5)


@pytest.mark.parametrize("mode", ["two-pass", "uniform"])
def test_blocks_compiled_one_by_one_are_edited(tiny_llava: Any, llava_inputs: Any, mode: Any) -> None:
    model = tiny_llava(1)
    inputs = llava_inputs(model, [1, 2])
    with torch.no_grad():
        with SCR(model, config=CONFIG, mode=mode):
            expected = model(**inputs).logits
        layers = model.model.language_model.layers
        for index, block in enumerate(layers):
            layers[index] = torch.compile(block, backend="eager")
        model(**inputs)
        with SCR(model, config=CONFIG, mode=mode) as scr:
            assert torch.allclose(model(**inputs).logits, expected, atol=1e-5)
        assert scr.stats.edits == 3


@pytest.mark.parametrize("whole", [False, True], ids=["decode-steps", "whole-forward"])
def test_compiled_decoding_gives_the_same_tokens(tiny_llava: Any, llava_inputs: Any, whole: bool) -> None:
    model = tiny_llava(5)
    inputs = llava_inputs(model, [1], seed=5)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    with SCR(model, config=CONFIG, mode="two-pass") as scr:
        plain = model.generate(**inputs, **options)
        if whole:
            model.forward = torch.compile(model.forward, backend="eager")
        else:
            settings: dict[str, Any] = {"backend": "eager", "fullgraph": True, "mode": None}
            steps = CompileConfig(**settings)
            options |= {"cache_implementation": "static", "compile_config": steps}
        assert torch.equal(model.generate(**inputs, **options), plain)
        assert scr.reports[0].layers_edited == tuple(range(CONFIG.edit_layers[0], CONFIG.edit_layers[1] + 1))
    model.__dict__.pop("forward", None)
    assert not torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), plain)
