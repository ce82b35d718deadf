from __future__ import annotations

from typing import Any

import pytest
import torch

from evaluation.decoding import Decoding, Reader, seeded, yes_no_tokens
from evaluation.errors import EvaluationError


class Words:
    """A tokenizer of whole words."""

    unk_token_id = 0

    def __init__(self, *words: str) -> None:
        self.ids = {word: index + 1 for index, word in enumerate(words)}

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [self.ids.get(text, 0)] if text.strip() == text else [7, self.ids.get(text.strip(), 0)]


def test_yes_and_no_tokens_in_every_case() -> None:
    assert yes_no_tokens(Words("yes", "No", "no", "Yes")) == ([1, 4], [2, 3])
    with pytest.raises(EvaluationError, match=r"no single token for 'no'.*leave pope out"):
        yes_no_tokens(Words("yes"))


def test_draws_depend_on_their_names_and_leave_the_process_alone() -> None:
    torch.manual_seed(1)
    wanted = torch.rand(1)
    torch.manual_seed(1)
    drawn = []
    for names in ((0, "a"), (0, "a"), (1, "a")):
        with seeded(*names):
            drawn.append(float(torch.rand(1)))
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.rand(1), wanted)


def test_a_reader_of_captions_needs_no_yes_token(scene: Any) -> None:
    reader = Reader(scene[0], Words("a"), Decoding("greedy", 4, margins=False))
    assert reader.text([]) == ""


def test_decoding_in_words_names_what_decides() -> None:
    assert Decoding("greedy", 16).in_words == "greedy, at most 16 tokens"
    assert "temperature 0.7" in Decoding("sampled", 8, (1, 2), 0.7).in_words
    assert "seeds [1, 2]" in Decoding("sampled", 8, (1, 2), 0.7).in_words
