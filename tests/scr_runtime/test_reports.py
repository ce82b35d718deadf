"""What a report says of an image."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from scr_runtime import SCR, SCRConfig
from scr_runtime.reports import ImageReport
from tests.scr_runtime.reference import make_predictor, reference_images
from tests.scr_runtime.tiny_families import TINY

CONFIG = SCRConfig(num_sources=5, strength=1.3, edit_layers=(0, 2), attention_layers=(2, 4))


def test_a_report_holds_entropy_and_grid(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(24)
    inputs = llava_inputs(model, [1], seed=24)
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).hidden_states[1]
        with SCR(model, config=CONFIG, mode="two-pass") as scr:
            model(**inputs)
    (report,) = scr.reports
    norms = hidden[0, reference_images(model, inputs)[0][1]].norm(dim=-1)
    share = norms / norms.sum()
    entropy = float(-(share * share.log()).sum())
    assert report.entropy == pytest.approx(entropy, abs=1e-5)
    assert report.entropy_normalised == pytest.approx(entropy / 3.58351893845611, abs=1e-5)
    assert (report.grid, report.layers_edited, report.confidence) == ((6, 6), (0, 1, 2), None)


def test_a_predictors_judgement_is_reported(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(24)
    predictor = make_predictor(model)
    inputs = llava_inputs(model, [2, 1], seed=24)
    for limit in (None, 1e9):
        if limit is not None:
            predictor.set_drift(0.5, limit)
        with torch.no_grad(), SCR(model, config=CONFIG, mode="one-pass", predictor=predictor) as scr:
            model(**inputs)
        assert scr._last is not None and scr._last.choice is not None
        (choice,) = scr._last.choice
        assert choice.scores.predicted is not None
        judged = predictor.judge(choice.scores.predicted, choice.scores.spread, choice.scores.rule)
        assert [report.confidence for report in scr.reports] == judged.confidence.tolist()
        assert [report.drift for report in scr.reports] == (judged.drift.tolist() if limit else [None] * 3)
        assert [report.fallback_reason for report in scr.reports] == [None] * 3


@pytest.mark.parametrize("name", ["llava", "llava-full", "llava-next", "qwen2-vl", "internvl"])
@pytest.mark.parametrize("pad", ["left", "right"])
def test_a_report_names_its_row_image_and_grid(name: str, pad: str) -> None:
    tiny = TINY[name]
    model = tiny.model()
    prompt = tiny.prompt(model, [1, 2, 3], pad=pad)
    with torch.no_grad(), SCR(model, config=CONFIG, mode="two-pass") as scr:
        model(**prompt.inputs)
    wanted = [
        (row, image, place, grid)
        for row, pictures in enumerate(prompt.pictures)
        for image, picture in enumerate(pictures)
        for place, (grid, _) in enumerate(picture.grids)
    ]
    assert [(one.row, one.image, one.place, one.grid) for one in scr.reports] == wanted


def test_images_without_a_token_between_them_are_two(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(24)
    inputs = llava_inputs(model, [2], seed=24)
    keep = torch.ones_like(inputs["input_ids"][0], dtype=torch.bool)
    visual = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten()
    keep[visual[35] + 1 : visual[36]] = False  # the words between the images
    inputs |= {name: inputs[name][:, keep] for name in ("input_ids", "attention_mask")}
    with torch.no_grad(), SCR(model, config=CONFIG, mode="two-pass") as scr:
        model(**inputs)
    assert [(one.row, one.image, one.place) for one in scr.reports] == [(0, 0, 0), (0, 1, 0)]


def test_a_long_reason_is_cut_in_the_report_s_line() -> None:
    report = ImageReport(
        provider="two-pass", fallback_reason="no predictor: " + "words " * 80, sources=[5], confidence=None,
        entropy=2.0, entropy_normalised=0.5, grid=(4, 6), layers_edited=(0, 1),
    )  # fmt: skip
    assert "because no predictor: words" in repr(report) and repr(report).endswith("words...>")
    assert len(repr(report)) < 250
