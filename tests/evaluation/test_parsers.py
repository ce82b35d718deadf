from __future__ import annotations

from typing import get_args

import pytest

from evaluation.parsers import PARSERS
from evaluation.settings import ParserName


@pytest.mark.parametrize(
    ("text", "official", "exact", "substring"),
    [
        ("yes", "yes", "yes", "yes"),
        ("No", "no", "no", "no"),
        ("Yes.", "yes", "neither", "yes"),
        ("no, there is a dog", "no", "neither", "no"),
        ("I do not see one. Yes", "no", "neither", "yes"),
        ("A dog. No cat", "yes", "neither", "no"),
        ("I don't know", "yes", "neither", "no"),
        ("", "yes", "neither", "neither"),
        ("a dog", "yes", "neither", "neither"),
        ("NO", "yes", "no", "no"),  # POPE's own words are No, no and not
    ],
)
def test_the_three_rules(text: str, official: str, exact: str, substring: str) -> None:
    assert [PARSERS[name](text) for name in ("official", "exact", "substring")] == [official, exact, substring]


def test_every_setting_has_its_parser() -> None:
    assert set(PARSERS) == set(get_args(ParserName))
