"""Every kind of call on one tiny model with an SCR, and what each gives alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from scr_runtime import SCR, SCRConfig
from tests.conftest import make_inputs, make_tiny_llava
from tests.scr_runtime.leftovers import snapshot
from tests.scr_runtime.questions import ask

CONFIG = SCRConfig(num_sources=5, strength=1.3, edit_layers=(0, 2), attention_layers=(2, 4))
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}


def same(one: Tensor, other: Tensor) -> bool:
    if one.dtype == torch.int64:
        return torch.equal(one, other)
    return torch.allclose(one, other, atol=1e-5, rtol=0)


class Calls:
    """Every kind of call about several prompts, with what it gives alone."""

    def __init__(self, mode: Any = "two-pass", **settings: Any) -> None:
        self.model: Any = make_tiny_llava(18)
        self.prompts = [make_inputs(self.model, images, seed=seed) for seed, images in enumerate(([1], [2], [1, 1]))]
        self.text = {"input_ids": torch.randint(3, 90, (1, 60), generator=torch.Generator().manual_seed(1))}
        self.scr = SCR(self.model, config=CONFIG, mode=mode, **settings)
        self.model(**self.prompts[0])  # transformers installs its output recorders at the first call
        self.before = snapshot(self.model)
        self.scr.attach()
        self.session = self.scr.image(**self.prompts[0])
        self.questions = [ask(self.prompts[0], [count], seed) for seed, count in enumerate((5, 9, 3))]
        self.calls: dict[str, Callable[[], Tensor]] = {
            "text": lambda: self.logits(self.text),
            "text-generate": lambda: self.model.generate(**self.text, **GREEDY),
        }
        for number, prompt in enumerate(self.prompts):
            self.calls |= {
                f"image-{number}": lambda prompt=prompt: self.logits(prompt),
                f"base-{number}": lambda prompt=prompt: self.model.model(**prompt).last_hidden_state,
                f"generate-{number}": lambda prompt=prompt: self.model.generate(**prompt, **GREEDY),
                f"uncached-{number}": lambda prompt=prompt: self.model.generate(**prompt, **GREEDY, use_cache=False),
                f"beams-{number}": lambda prompt=prompt: self.model.generate(**prompt, **GREEDY, num_beams=2),
            }
        for number, question in enumerate(self.questions):
            self.calls |= {
                f"question-{number}": lambda question=question: self.session(**question).logits,
                f"session-generate-{number}": lambda question=question: self.session.generate(**question, **GREEDY),
            }
        with torch.no_grad():
            self.alone = {name: call() for name, call in self.calls.items()}

    def logits(self, inputs: Any) -> Tensor:
        return self.model(**inputs).logits

    def check(self, name: str) -> None:
        with torch.no_grad():
            assert same(self.calls[name](), self.alone[name]), name

    def close(self) -> None:
        self.session.close()
        self.scr.detach()
        assert snapshot(self.model) == self.before
