from __future__ import annotations

from data.wording import question_text, with_article


def test_article():
    assert question_text("umbrella") == "Is there an umbrella in the image?"
    assert question_text("dining table") == "Is there a dining table in the image?"
    assert with_article("apple") == "an apple"
