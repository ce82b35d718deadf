from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix

from data.questions import Question
from evaluation.errors import EvaluationError
from evaluation.methods import TWO_PASS, VANILLA
from evaluation.pope import Answers, _alternate_images, score, yes_no_tokens
from evaluation.settings import EvaluationSettings

DRAWS = EvaluationSettings(bootstrap=500)


def make_answers(margins: dict[str, np.ndarray], truth: np.ndarray, per_image: int = 4) -> Answers:
    count = len(truth)
    return Answers(
        image=np.arange(count) // per_image,
        truth=truth,
        splits={"adversarial": np.arange(count)},
        margins=margins,
        entropy=np.zeros(count),
        confidence=np.linspace(0, 1, count),
        fallback=0.0,
    )


def test_scores_equal_a_confusion_matrix() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random(400) < 0.5
    vanilla, other = rng.normal(size=400) + truth, rng.normal(size=400) + truth
    answers = make_answers({VANILLA: vanilla, TWO_PASS: other}, truth)
    found = score(answers, TWO_PASS, "adversarial", DRAWS)
    tn, fp, fn, tp = confusion_matrix(truth, other > 0).ravel()
    assert found.hr == pytest.approx(fp / (fp + tn))
    assert found.tpr == pytest.approx(tp / (tp + fn))
    assert found.accuracy == pytest.approx((tp + tn) / 400)
    pairs = (other[truth][:, None] > other[~truth][None, :]).mean()  # AUC is the share of pairs in order
    assert found.auc == pytest.approx(pairs)
    before = score(answers, VANILLA, "adversarial", DRAWS)
    assert before.hr_change is None
    assert found.hr_change is not None
    assert found.hr_change.mean == pytest.approx(found.hr - before.hr)
    assert found.hr_change.low < found.hr_change.mean < found.hr_change.high


def test_the_interval_is_paired_and_clustered_by_image() -> None:
    truth = np.tile([True, False], 200)
    rng = np.random.default_rng(1)
    vanilla = rng.normal(size=400)
    same = score(
        make_answers({VANILLA: vanilla, TWO_PASS: vanilla + 0.0}, truth),
        TWO_PASS,
        "adversarial",
        DRAWS,
    )
    assert same.hr_change is not None
    assert (same.hr_change.low, same.hr_change.high) == (0.0, 0.0)  # unpaired resampling would not be that sure
    image = np.repeat(rng.random(100) < 0.5, 4)  # all questions of an image flip together: two absent ones in each
    shifted = {VANILLA: np.ones(400), TWO_PASS: np.where(image, -1.0, 1.0)}
    clustered = score(make_answers(shifted, truth), TWO_PASS, "adversarial", DRAWS).hr_change
    loose = score(make_answers(shifted, truth, per_image=1), TWO_PASS, "adversarial", DRAWS).hr_change
    assert clustered is not None and loose is not None
    assert clustered.high - clustered.low > 1.25 * (loose.high - loose.low)


class Words:
    """A tokenizer of whole words."""

    unk_token_id = 0

    def __init__(self, *words: str) -> None:
        self.ids = {word: index + 1 for index, word in enumerate(words)}

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [self.ids.get(text, 0)] if text.strip() == text else [7, self.ids.get(text.strip(), 0)]


def test_yes_and_no_tokens_in_every_case() -> None:
    assert yes_no_tokens(Words("yes", "No", "no", "Yes")) == ([1, 4], [2, 3])
    with pytest.raises(EvaluationError, match=r"no single token for 'no'.*evaluation\.images=0"):
        yes_no_tokens(Words("yes"))


def test_questions_about_one_image_cannot_be_compared() -> None:
    questions = [Question(image_id, "Is there a dog?", "yes", "dog", "random") for image_id in (1, 1, 1, 2, 3)]
    assert [question.image_id for question in _alternate_images(questions)] == [1, 2, 3, 1, 1]
    with pytest.raises(EvaluationError, match=r"at least 2 images, and there are 1: raise evaluation\.images"):
        _alternate_images(questions[:3])
