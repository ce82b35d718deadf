"""CIDEr-D against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from evaluation.cider import cider_d, ngrams, words


def test_words_are_lower_case_and_bare() -> None:
    assert words("A dog's 2 cats, on-top!") == ["a", "dog's", "2", "cats", "on", "top"]
    assert ngrams("a b a") == {("a",): 2, ("b",): 1, ("a", "b"): 1, ("b", "a"): 1, ("a", "b", "a"): 1}


def test_a_copy_of_the_only_reference_scores_ten() -> None:
    same = "a small dog sleeps here"
    references = {1: [same], 2: ["two red cars drive by"]}
    assert cider_d({1: same, 2: "nothing of it"}, references) == pytest.approx({1: 10.0, 2: 0.0})


def test_by_hand() -> None:
    # Two images, so every n-gram of one image alone weighs ln 2, and one of both weighs 0 ("a").
    found = cider_d({1: "a dog", 2: "a cat"}, {1: ["a dog runs"], 2: ["a cat"]})
    # image 1: 1-grams: candidate (a: 0, dog: w), reference (a: 0, dog: w, runs: w): cosine 1 / sqrt 2
    #          2-grams: candidate (a dog: w), reference (a dog: w, dog runs: w): 1 / sqrt 2; 3- and 4-grams: 0
    # lengths in 2-grams 1 and 2: exp(-1 / 72)
    assert found[1] == pytest.approx(10 * (2 / math.sqrt(2)) / 4 * math.exp(-1 / 72))
    assert found[2] == pytest.approx(10 * 2 / 4)  # equal, but there are no 3- and 4-grams


def test_repeating_a_word_is_clipped() -> None:
    references = {1: ["dog here now"], 2: ["other words entirely"]}
    found = cider_d({1: "dog dog dog", 2: "x"}, references)
    # 1-grams: candidate (dog: 3w), reference three words of w: min(3w, w) * w / (3w * sqrt(3) w)
    assert found[1] == pytest.approx(10 / 4 / (3 * math.sqrt(3)))


def test_the_mean_over_references() -> None:
    references = {1: ["red kite flies", "blue boat"], 2: ["other words entirely"]}
    alone = cider_d({1: "red kite flies", 2: "x"}, {**references, 1: ["red kite flies"]})[1]
    assert alone == pytest.approx(7.5)  # no 4-grams
    assert cider_d({1: "red kite flies", 2: "x"}, references)[1] == pytest.approx(7.5 / 2)
