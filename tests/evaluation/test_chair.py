from __future__ import annotations

import pytest

from evaluation.chair import Chair, chair
from evaluation.errors import EvaluationError

NAMES = ("cat", "car", "dog", "wine glass", "skis")


def test_the_papers_two_rates_and_recall() -> None:
    captions = ["A dog and a cat.", "a car beside a wine glass", "nothing to see", "skis"]
    truth = [{"dog"}, {"car", "wine glass", "cat"}, {"dog"}, ["skis"]]
    assert chair(captions, NAMES, truth) == Chair(
        chair_s=1 / 4,  # the first names a cat that is not there
        chair_i=1 / 5,
        recall=4 / 6,
        mentioned=5 / 4,
    )


@pytest.mark.parametrize(
    ("caption", "found"),
    [
        ("two dogs, three wine glasses", {"dog", "wine glass"}),
        ("a carrot in a catalogue", set()),
        ("a CAT, a cat and the Cat's friend", {"cat"}),
        ("a hotdog and some glass", set()),
    ],
)
def test_names_are_whole_words_and_count_once(caption: str, found: set[str]) -> None:
    assert chair([caption], NAMES, [found]) == Chair(0.0, 0.0, float(bool(found)), float(len(found)))
    assert chair([caption], NAMES, [set()]).chair_i == float(bool(found))


def test_captions_are_needed_and_one_per_image() -> None:
    with pytest.raises(EvaluationError, match="at least one caption"):
        chair([], NAMES, [])
    with pytest.raises(ValueError, match=r"shorter|longer"):
        chair(["a cat"], NAMES, [set(), {"cat"}])
