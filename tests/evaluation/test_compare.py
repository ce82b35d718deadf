from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from data.chat import chat_inputs
from data.images import CocoImages
from data.questions import STRATEGIES, count_objects, pope_questions
from data.settings import VLMSettings
from data.vlm import load_vlm
from evaluation.compare import compare, measure_reference
from evaluation.errors import EvaluationError
from evaluation.methods import AUTO, ONE_PASS, SHIFT, SWAPPED, TWO_PASS, UNIFORM, VANILLA, Methods
from evaluation.pope import ask
from evaluation.settings import EvaluationSettings
from scenes import CHECKPOINT, ensure_world
from scr_runtime import SCR, PredictorConfig, SCRConfig, SourcePredictor

CONFIG = SCRConfig(num_sources=8, edit_layers=(0, 2), attention_layers=(2, 4))
SETTINGS = EvaluationSettings(images=6, questions_per_image=2, batch_size=4, bootstrap=10, latency_repeats=1)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, CocoImages]:
    root = ensure_world(tmp_path_factory.mktemp("world"), train=2, val=6, seed=3)
    model, processor = load_vlm(VLMSettings(hub_id=str(CHECKPOINT)))
    return model, processor, CocoImages(root / "val", root / "annotations/instances_val.json")


def make_predictor() -> SourcePredictor:
    torch.manual_seed(0)
    return SourcePredictor(PredictorConfig(128, rank=8, width=16, context="both")).eval().requires_grad_(False)


def test_every_method_is_the_runtime_one_question_at_a_time(scene: tuple[Any, Any, CocoImages]) -> None:
    model, processor, images = scene
    predictor = make_predictor()
    reference = measure_reference(model, processor, CONFIG, images, SETTINGS)
    answers = compare(reference, predictor, SETTINGS).answers
    assert set(answers.margins) == {VANILLA, TWO_PASS, ONE_PASS, AUTO, UNIFORM, SWAPPED, SHIFT}
    assert set(answers.splits) == set(STRATEGIES)
    assert (np.diff(answers.image) != 0).all()  # neighbours are about different images
    for rows in answers.splits.values():
        assert answers.truth[rows].mean() == 0.5

    yes, no = processor.tokenizer.convert_tokens_to_ids(["yes", "no"])
    first = reference.quiz.questions[0]
    listed = [pope_questions(images, images.ids, s, 2, 0, count_objects(images)) for s in STRATEGIES]
    assert any(first in questions for questions in listed)
    place = 0
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
    methods = Methods(model, CONFIG)
    logits, reports = methods.logits(model, inputs, (VANILLA, TWO_PASS, SWAPPED))
    own = [report.sources for report in reports[TWO_PASS]]
    assert [report.sources for report in reports[SWAPPED]] == [own[2], own[0], own[1]]
    assert not torch.allclose(logits[SWAPPED], logits[TWO_PASS])


@pytest.mark.parametrize("guarded", [False, True])
def test_auto_is_put_together_as_the_runtime_would(scene: tuple[Any, Any, CocoImages], guarded: bool) -> None:
    model, processor, images = scene
    predictor = make_predictor()
    reference = measure_reference(model, processor, CONFIG, images, SETTINGS)
    raw = torch.tensor([0.5, 1.0])
    predictor.set_calibration(raw, raw, 0.0)
    confidence = np.sort(compare(reference, predictor, SETTINGS).answers.confidence)
    predictor.set_calibration(raw, raw, float(confidence[len(confidence) // 3 : len(confidence) // 3 + 2].mean()))
    if guarded:
        predictor.set_drift(1e-3, 1.0)  # no image is like those of such a fit
    found = compare(reference, predictor, SETTINGS)
    methods = Methods(model, CONFIG, predictor)
    margins, reports = ask(model, processor, methods, (AUTO,), images, reference.quiz, 4)
    np.testing.assert_allclose(found.answers.margins[AUTO], margins[AUTO], atol=1e-4)
    share = np.mean([report.fallback_reason is not None for report in reports[AUTO]])
    assert found.answers.fallback == share == (1 if guarded else pytest.approx(1 / 3, abs=0.08))
    assert found.curve[0].shift_correlation == pytest.approx(found.fidelity[ONE_PASS].shift_correlation)
    assert found.curve[-1].shift_correlation == pytest.approx(1)


def test_too_few_images_are_named(scene: tuple[Any, Any, CocoImages]) -> None:
    with pytest.raises(EvaluationError, match=r"evaluation\.images=7, but there are 6 in .*val: lower it"):
        measure_reference(*scene[:2], CONFIG, scene[2], SETTINGS.model_copy(update={"images": 7}))
