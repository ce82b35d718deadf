from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix

from data.images import CocoImages
from data.questions import STRATEGIES
from data.vlm import chat_inputs, load_vlm
from evaluation.methods import AUTO, ONE_PASS, SHIFT, SWAPPED, TWO_PASS, UNIFORM, VANILLA, Methods
from evaluation.pope import Answers, ask, score, yes_no_tokens
from scenes import CHECKPOINT, ensure_world
from scr_runtime import SCR, PredictorConfig, SCRConfig, SourcePredictor

CONFIG = SCRConfig(num_sources=8, edit_layers=(0, 2), attention_layers=(2, 4))


def make_answers(margins: dict[str, np.ndarray], truth: np.ndarray, per_image: int = 4) -> Answers:
    count = len(truth)
    return Answers(
        image=np.arange(count) // per_image,
        truth=truth,
        splits={"adversarial": np.arange(count)},
        margins=margins,
        entropy=np.zeros(count),
        fallback=0.0,
    )


def test_scores_equal_a_confusion_matrix() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random(400) < 0.5
    vanilla, other = rng.normal(size=400) + truth, rng.normal(size=400) + truth
    answers = make_answers({VANILLA: vanilla, TWO_PASS: other}, truth)
    found = score(answers, TWO_PASS, "adversarial", bootstrap=500, seed=0)
    tn, fp, fn, tp = confusion_matrix(truth, other > 0).ravel()
    assert found.hr == pytest.approx(fp / (fp + tn))
    assert found.tpr == pytest.approx(tp / (tp + fn))
    assert found.accuracy == pytest.approx((tp + tn) / 400)
    pairs = (other[truth][:, None] > other[~truth][None, :]).mean()  # AUC is the share of pairs in order
    assert found.auc == pytest.approx(pairs)
    before = score(answers, VANILLA, "adversarial", bootstrap=500, seed=0)
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
        bootstrap=200,
        seed=0,
    )
    assert same.hr_change is not None
    assert (same.hr_change.low, same.hr_change.high) == (0.0, 0.0)  # unpaired resampling would not be that sure
    image = np.repeat(rng.random(100) < 0.5, 4)  # all questions of an image flip together: two absent ones in each
    shifted = {VANILLA: np.ones(400), TWO_PASS: np.where(image, -1.0, 1.0)}
    clustered = score(make_answers(shifted, truth), TWO_PASS, "adversarial", bootstrap=500, seed=0).hr_change
    loose = score(make_answers(shifted, truth, per_image=1), TWO_PASS, "adversarial", bootstrap=500, seed=0).hr_change
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
    with pytest.raises(ValueError, match="no single token for 'no'"):
        yes_no_tokens(Words("yes"))


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, CocoImages]:
    root = ensure_world(tmp_path_factory.mktemp("world"), train=2, val=6, seed=3)
    model, processor = load_vlm(str(CHECKPOINT))
    return model, processor, CocoImages(root / "val", root / "annotations/instances_val.json")


def make_predictor() -> SourcePredictor:
    torch.manual_seed(0)
    return SourcePredictor(PredictorConfig(128, rank=8, width=16)).eval().requires_grad_(False)


def test_every_method_is_the_runtime_one_question_at_a_time(scene: tuple[Any, Any, CocoImages]) -> None:
    model, processor, images = scene
    predictor = make_predictor()
    answers = ask(
        model,
        processor,
        Methods(model, predictor, CONFIG),
        images,
        images.ids,
        questions_per_image=2,
        batch_size=4,
        seed=0,
    )
    assert set(answers.margins) == {VANILLA, TWO_PASS, ONE_PASS, AUTO, UNIFORM, SWAPPED, SHIFT}
    assert set(answers.splits) == set(STRATEGIES)
    assert (np.diff(answers.image) != 0).all()  # neighbours are about different images
    for rows in answers.splits.values():
        assert answers.truth[rows].mean() == 0.5

    yes, no = processor.tokenizer.convert_tokens_to_ids(["yes", "no"])
    from data.questions import count_objects, pope_questions

    first = pope_questions(images, images.ids, "adversarial", 2, 0, count_objects(images))[0]
    place = answers.splits["adversarial"][0]
    inputs = chat_inputs(processor, [images.open(first.image_id)], [first.text])
    with torch.no_grad():
        for name, scr in (
            (VANILLA, SCR(model, mode="off")),
            (TWO_PASS, SCR(model, config=CONFIG, mode="two-pass")),
            (ONE_PASS, SCR(model, config=CONFIG, mode="one-pass", predictor=predictor)),
        ):
            with scr:
                logits = model(**inputs).logits[0, -1]
            assert answers.margins[name][place] == pytest.approx(float(logits[yes] - logits[no]), abs=1e-3)
    shift = answers.margins[SHIFT] - answers.margins[VANILLA]
    assert np.ptp(shift) < 1e-9
    assert shift.mean() == pytest.approx((answers.margins[TWO_PASS] - answers.margins[VANILLA]).mean())


def test_swapped_edits_with_the_sources_of_the_row_before(scene: tuple[Any, Any, CocoImages]) -> None:
    model, processor, images = scene
    inputs = chat_inputs(processor, [images.open(i) for i in images.ids[:3]], ["Is there a dog in the image?"] * 3)
    methods = Methods(model, make_predictor(), CONFIG)
    logits, reports = methods.logits(model, inputs)
    own = [report.sources for report in reports[TWO_PASS]]
    assert [report.sources for report in reports[SWAPPED]] == [own[2], own[0], own[1]]
    assert not torch.allclose(logits[SWAPPED], logits[TWO_PASS])
