"""From a prompt to its answer: the yes margin of the first token, and greedy or sampled text behind it."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evaluation.batches import Prompts, Shared, fresh
from evaluation.errors import EvaluationError
from evaluation.settings import DecodingName


@dataclass(frozen=True)
class Decoding:
    """How answers are made.

    Attributes:
        name: greedy, sampled, or margin: no text.
        max_new_tokens: Longest answer.
        seeds: Of sampled answers, one answer each; `(None,)` otherwise.
        temperature: Of sampled answers.
        margins: Whether the margin of "yes" over "no" is wanted.
    """

    name: DecodingName
    max_new_tokens: int
    seeds: tuple[int | None, ...] = (None,)
    temperature: float = 1.0
    margins: bool = True

    @property
    def in_words(self) -> str:
        """For tables."""
        if self.name == "margin":
            return "sign of the first token's yes margin"
        limit = f"at most {self.max_new_tokens} tokens"
        if self.name == "greedy":
            return f"greedy, {limit}"
        return (
            f"sampled at temperature {self.temperature:g} without top-k and top-p, seeds {list(self.seeds)}, {limit}"
        )


def yes_no_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids that start the answers "yes" and "no", in any case, with or without a space before.

    Raises:
        EvaluationError: If the tokenizer has no single token for one of them.
    """
    found: list[list[int]] = []
    for word in ("yes", "no"):
        ids = set()
        for form in (word, word.capitalize(), word.upper(), f" {word}", f" {word.capitalize()}"):
            tokens = tokenizer.encode(form, add_special_tokens=False)
            if len(tokens) == 1 and tokens[0] != tokenizer.unk_token_id:
                ids.add(tokens[0])
        if not ids:
            raise EvaluationError(
                f"this model's tokenizer has no single token for {word!r}, so that yes and no can't be compared; "
                "leave pope out of evaluation.benchmarks (train.py: evaluation.images=0)"
            )
        found.append(sorted(ids))
    return found[0], found[1]


class Reader:
    """Reads answers off a model.

    Args:
        model: A supported model in eval mode.
        tokenizer: Its processor's.
        decoding: How answers are made.
    """

    def __init__(self, model: Any, tokenizer: Any, decoding: Decoding) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self.decoding = decoding
        self._yes_no = yes_no_tokens(tokenizer) if decoding.margins else None

    @torch.no_grad()
    def read_shared(self, shared: Shared) -> list[float]:
        """[B] yes margins of prompts that share the tokens of their images."""
        logits = self._model(**fresh(shared.prompts.inputs), logits_to_keep=shared.columns).logits
        sequence, column = shared.places.unbind(1)
        return self._margins(logits[sequence, column])

    @torch.no_grad()
    def read(
        self, prompts: Prompts, seed: int | None, salts: Sequence[str], sampled: bool
    ) -> tuple[list[float | None], list[list[int]]]:
        """Margins and tokens of a batch.

        Args:
            prompts: The batch.
            seed: Of a sampled answer.
            salts: What the draws of a batch depend on, beside the seed.
            sampled: Whether the answers are drawn.
        """
        if self.decoding.name == "margin" and not sampled:
            logits = self._model(**fresh(prompts.inputs), logits_to_keep=1).logits[:, -1]
            return list(self._margins(logits)), [[] for _ in range(len(logits))]
        first = _FirstLogits()
        inputs = fresh(prompts.inputs)
        with seeded(seed, *salts) if sampled else _unseeded():
            tokens: Tensor = self._model.generate(
                **inputs, generation_config=self._generation_config(sampled), logits_processor=[first]
            )
        assert first.logits is not None
        margins: list[float | None] = [None] * len(tokens)
        if self.decoding.margins:
            margins = list(self._margins(first.logits))
        return margins, [self._until_end(row) for row in tokens[:, prompts.length :].tolist()]

    def text(self, tokens: Sequence[int]) -> str:
        """Tokens as text, without special ones."""
        return self._tokenizer.decode(tokens, skip_special_tokens=True).strip() if tokens else ""

    def _margins(self, logits: Tensor) -> list[float]:
        assert self._yes_no is not None
        yes, no = self._yes_no
        return (logits[:, yes].float().amax(-1) - logits[:, no].float().amax(-1)).double().tolist()

    def _generation_config(self, sampled: bool) -> Any:
        """The model's own, without anything that reshapes its probabilities but the temperature."""
        config = copy.deepcopy(self._model.generation_config)
        plain = {"num_beams": 1, "repetition_penalty": 1.0, "top_p": 1.0, "no_repeat_ngram_size": 0}
        chosen = (
            {"top_k": 0, "temperature": self.decoding.temperature} if sampled else {"top_k": 50, "temperature": 1.0}
        )
        config.update(**plain, **chosen, do_sample=sampled, max_new_tokens=self.decoding.max_new_tokens)
        if config.pad_token_id is None:
            config.pad_token_id = self._tokenizer.pad_token_id
        return config

    @property
    def _ends(self) -> set[int]:
        ends = self._model.generation_config.eos_token_id
        return set(ends if isinstance(ends, list) else [ends]) - {None}

    def _until_end(self, tokens: list[int]) -> list[int]:
        """Tokens up to the end mark, without it: rows that ended before others are padded."""
        end = next((place for place, token in enumerate(tokens) if token in self._ends), None)
        return tokens if end is None else tokens[:end]


class _FirstLogits:
    """Keeps the logits of the first generated token, before anything reshapes them."""

    def __init__(self) -> None:
        self.logits: Tensor | None = None

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        if self.logits is None:
            self.logits = scores.float().clone()
        return scores


def number_of(*names: object) -> int:
    """A number that depends on these names alone."""
    digest = hashlib.sha256(":".join(map(str, names)).encode()).digest()
    return int.from_bytes(digest[:7], "little")


@contextmanager
def seeded(*names: object) -> Iterator[None]:
    """Draws in the block depend on these names alone; the process's random streams are left as they were."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(number_of(*names))
        yield


@contextmanager
def _unseeded() -> Iterator[None]:
    yield


Parse = Callable[[str], str]


def parse_margin(margin: float) -> str:
    """Greedy decoding between yes and no alone."""
    return "yes" if margin > 0 else "no"


def decoding_identity(decoding: Decoding) -> Mapping[str, Any]:
    """What answers depend on."""
    drawn = {"seeds": list(decoding.seeds), "temperature": decoding.temperature} if decoding.name == "sampled" else {}
    length = {} if decoding.name == "margin" else {"max_new_tokens": decoding.max_new_tokens}
    return {"decoding": decoding.name, "margins": decoding.margins, **drawn, **length}
