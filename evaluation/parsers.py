"""From an answer's text to yes or no: the three rules that published numbers were read with.

They differ: "Yes." is no answer for an exact matcher, and "I don't know" contains "no" for a substring matcher.
"""

from __future__ import annotations

from collections.abc import Callable

from evaluation.settings import ParserName

YES, NO, NEITHER = "yes", "no", "neither"


def official(text: str) -> str:
    """POPE's own evaluate.py: the first sentence, without commas; no if it has the word No, no or not, else yes.

    It never fails to read an answer: an empty one, or one about something else, is a yes.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return NO if {"No", "no", "not"} & set(words) else YES


def exact(text: str) -> str:
    """The whole text, in any case, without blanks around it: so does lmms-eval."""
    found = text.strip().lower()
    return found if found in (YES, NO) else NEITHER


def substring(text: str) -> str:
    """Whether "yes", or else "no", stands anywhere in the text, in any case."""
    found = text.lower()
    return next((word for word in (YES, NO) if word in found), NEITHER)


PARSERS: dict[ParserName, Callable[[str], str]] = {"official": official, "exact": exact, "substring": substring}
