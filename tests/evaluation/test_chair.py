from __future__ import annotations

from pathlib import Path

import pytest

from evaluation.chair import Chair, chair, drop_unfinished
from evaluation.errors import EvaluationError
from evaluation.synonyms import Vocabulary, vocabulary

NAMES = ("cat", "car", "dog", "wine glass", "skis", "person", "hot dog", "teddy bear", "bear", "toilet")
WORDS = Vocabulary({name: [] for name in NAMES})


def test_the_papers_two_rates_and_recall() -> None:
    captions = ["A dog and a cat.", "a car beside a wine glass", "nothing to see", "skis"]
    truth = [{"dog"}, {"car", "wine glass", "cat"}, {"dog"}, ["skis"]]
    assert chair(captions, WORDS, truth) == Chair(
        chair_s=1 / 4,  # the first names a cat that is not there
        chair_i=1 / 5,
        recall=4 / 6,
        mentioned=5 / 4,
    )


def test_repeated_mentions_count_as_in_the_papers_code_where_asked_for() -> None:
    captions, truth = ["a dog, a dog and a cat, another cat"], [{"dog"}]
    assert chair(captions, WORDS, truth).chair_i == 1 / 2
    found = chair(["a dog, a cat, another cat"], WORDS, truth, repeated=True)
    assert (found.chair_i, found.mentioned, found.recall) == (2 / 3, 2.0, 1.0)


@pytest.mark.parametrize(
    ("caption", "found"),
    [
        ("two dogs, three wine glasses", ["dog", "wine glass"]),
        ("a carrot in a catalogue", []),
        ("a CAT, a cat and the Cat's friend", ["cat", "cat", "cat"]),
        ("a hotdog and some glass", []),
        ("hot dogs", ["hot dog"]),
        ("a teddy bear beside a bear", ["teddy bear", "bear"]),
    ],
)
def test_the_longest_phrase_of_whole_words_counts(caption: str, found: list[str]) -> None:
    assert WORDS.find(caption) == found


@pytest.mark.parametrize(
    ("caption", "found"),
    [
        ("three women and their puppies", ["person", "dog"]),
        ("a hotdog with toilet paper", ["hot dog"]),
        ("the bus stops", []),
    ],
)
def test_the_projects_own_table(caption: str, found: list[str]) -> None:
    assert vocabulary((*NAMES, "bus")).find(caption) == found


def test_the_table_has_all_of_cocos_categories_and_no_word_twice() -> None:
    from evaluation.synonyms import _TABLE, _rows  # pyright: ignore[reportPrivateUsage]

    rows = _rows(_TABLE)
    assert len(rows) == 80
    flat = [word for row in rows for word in row]
    assert len(flat) == len(set(flat))


def test_a_users_file_takes_the_tables_place(tmp_path: Path) -> None:
    file = tmp_path / "synonyms.txt"
    file.write_text("cat, mouser, tom\ndog, hound\n")
    assert vocabulary(NAMES, file).find("a mouser and three hounds, a kitten") == ["cat", "dog"]
    file.write_text("unicorn, horned horse\n")
    with pytest.raises(EvaluationError, match="names none of the 10 categories"):
        vocabulary(NAMES, file)
    with pytest.raises(EvaluationError, match="cannot be read"):
        vocabulary(NAMES, tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("A cat. A dog that", "A cat."),
        ("A cat and a", "A cat and a"),
        ("Is it? Yes!", "Is it? Yes!"),
        ("2.5 m", "2.5 m"),
    ],
)
def test_an_unfinished_last_sentence_can_be_dropped(text: str, kept: str) -> None:
    assert drop_unfinished(text) == kept


def test_captions_are_needed_and_one_per_image() -> None:
    with pytest.raises(EvaluationError, match="at least one caption"):
        chair([], WORDS, [])
    with pytest.raises(ValueError, match=r"shorter|longer"):
        chair(["a cat"], WORDS, [set(), {"cat"}])
