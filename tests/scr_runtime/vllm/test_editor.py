"""The edit of a flattened batch against the transformers runtime's edit of each prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from scr_runtime import SCR, PredictorConfig, SCRConfig, SourcePredictor
from scr_runtime.families import FAMILIES
from scr_runtime.grids import ImageGrid
from scr_runtime.vllm.editor import Editor
from scr_runtime.vllm.images import NO_GRID, NO_QUESTION, PARTIAL, Feature, Part, family_grids, images_of
from scr_runtime.vllm.settings import EngineSettings, RequestSettings
from tests.conftest import IMAGE_TOKEN, make_inputs, make_tiny_llava

CONFIG = SCRConfig(num_sources=4, strength=1.5, edit_layers=(1, 3), attention_layers=(2, 4), state_layer=1)
TOKENS = 36


def make_predictor(question: Any) -> SourcePredictor:
    torch.manual_seed(1)
    predictor = SourcePredictor(PredictorConfig(32, rank=4, width=8, question=question)).eval()
    predictor.set_statistics(torch.randn(32), torch.rand(32) + 1, torch.randn(32), torch.rand(32) + 1)
    predictor.set_calibration(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]), 0.6)
    return predictor.requires_grad_(False)


class Flat:
    """A batch as an engine flattens it: all prompts one after the other, each state in two summands."""

    def __init__(self, images: list[int]) -> None:
        self.model: Any = make_tiny_llava(0)
        self.rows: list[dict[str, Tensor]] = []
        for index, count in enumerate(images):
            self.rows.append(make_inputs(self.model, [count], seed=index, text=4 + index))

    def features(self, row: int) -> list[Feature]:
        visual = (self.rows[row]["input_ids"][0] == IMAGE_TOKEN).nonzero().flatten().tolist()
        return [Feature(visual[first], TOKENS, {}) for first in range(0, len(visual), TOKENS)]

    def parts(self, **changes: Any) -> list[Part]:
        parts, start = list[Part](), 0
        for row, inputs in enumerate(self.rows):
            length = inputs["input_ids"].shape[1]
            parts.append(Part(start, 0, length, length, self.features(row), **changes))
            start += length
        return parts

    def run(self, editor: Editor, begin: Any) -> list[Tensor]:
        """Runs all prompts, and edits their states behind each block as one flattened batch; the states at the end."""
        blocks = self.model.model.language_model.layers
        begin()
        states = [self.prompt_states(inputs) for inputs in self.rows]
        for layer, block in enumerate(blocks):
            states = [block_output(self.model, block, one) for one in states]
            whole = torch.cat(states)
            hidden = torch.randn(whole.shape, generator=torch.Generator().manual_seed(layer))
            residual = whole - hidden
            if layer in editor.layers:
                editor.after_block(layer, hidden, residual)
            states = list((hidden + residual).split([len(one) for one in states]))
        return states

    def prompt_states(self, inputs: dict[str, Tensor]) -> Tensor:
        model = self.model.model
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        if "pixel_values" in inputs:
            features = torch.cat(list(model.get_image_features(inputs["pixel_values"]).pooler_output))
            embeds = embeds.masked_scatter((inputs["input_ids"] == IMAGE_TOKEN)[..., None], features)
        return embeds[0]

    def expected(self, predictor: SourcePredictor, row: int, **changes: Any) -> tuple[Tensor, list[Any]]:
        """The transformers runtime's states behind the last block, and its reports."""
        config = dataclasses.replace(CONFIG, **changes)
        with SCR(self.model, predictor=predictor, config=config, mode="one-pass") as scr:
            made = self.model.model(**self.rows[row], output_hidden_states=True)
        norm = self.model.model.language_model.norm
        return made.last_hidden_state[0], [scr.reports, norm]


def block_output(model: Any, block: Any, states: Tensor) -> Tensor:
    places = torch.arange(len(states))[None]
    rotary = model.model.language_model.rotary_emb(states[None], places)
    output = block(states[None], attention_mask=None, position_ids=places, position_embeddings=rotary)
    return (output[0] if isinstance(output, tuple) else output)[0]


def make_editor(predictor: SourcePredictor, **settings: Any) -> Editor:
    return Editor(predictor, CONFIG, EngineSettings("here", **settings), FAMILIES["llava"])


def begin(editor: Editor, parts: list[Part], predictor: SourcePredictor, model: Any) -> Any:
    grids = family_grids("llava", model.config)
    return lambda: editor.begin(images_of(parts, grids, reads_question=predictor.config.reads_question))


@pytest.mark.parametrize("question", ["none", "bilinear"])
@torch.no_grad()
def test_a_flattened_batch_is_edited_as_each_prompt_by_itself(question: Any) -> None:
    predictor, flat = make_predictor(question), Flat([1, 0, 2, 1])
    editor = make_editor(predictor)
    states = flat.run(editor, begin(editor, [part for part in flat.parts() if part.features], predictor, flat.model))
    reports: list[Any] = []
    for row, mine in enumerate(states):
        theirs, (its_reports, norm) = flat.expected(predictor, row)
        torch.testing.assert_close(norm(mine), theirs, atol=2e-5, rtol=1e-5)
        reports += its_reports
    stats = editor.stats()
    assert (stats.steps, stats.images, stats.edits) == (1, 4, 3)
    assert stats.mean_confidence == pytest.approx(sum(report.confidence for report in reports) / 4, abs=1e-5)
    assert stats.low_confidence == sum(report.confidence < 0.6 for report in reports)


@torch.no_grad()
def test_rows_without_an_image_are_not_written_to() -> None:
    predictor, flat = make_predictor("none"), Flat([1, 0])
    editor = make_editor(predictor)
    begin(editor, flat.parts(), predictor, flat.model)()
    length = sum(inputs["input_ids"].shape[1] for inputs in flat.rows)
    hidden, residual = torch.randn(length, 32), torch.randn(length, 32)
    before = hidden.clone(), residual.clone()
    editor.after_block(1, hidden, residual)
    first = flat.features(0)[0].start
    visual = torch.zeros(length, dtype=torch.bool)
    visual[first : first + TOKENS] = True
    assert torch.equal(hidden[~visual], before[0][~visual]) and torch.equal(residual[~visual], before[1][~visual])
    assert not torch.equal((hidden + residual)[visual], (before[0] + before[1])[visual])


@torch.no_grad()
def test_workers_choose_by_the_states_of_the_first_one() -> None:
    predictor, flat = make_predictor("none"), Flat([1])
    seen: list[Tensor] = []

    def edited_rows(share: Callable[[Tensor], Tensor]) -> Tensor:
        editor = Editor(predictor, CONFIG, EngineSettings("here"), FAMILIES["llava"], share)
        begin(editor, flat.parts(), predictor, flat.model)()
        hidden, residual = torch.randn(2, flat.rows[0]["input_ids"].shape[1], 32)
        before = hidden + residual
        editor.after_block(1, hidden, residual)
        return (hidden + residual - before).abs().amax(-1) > 1e-6

    def first(read: Tensor) -> Tensor:
        seen.append(read)
        return read

    torch.manual_seed(0)
    chosen = edited_rows(first)
    assert torch.equal(chosen, edited_rows(lambda read: seen[0]))
    assert not torch.equal(chosen, edited_rows(lambda read: read))


@torch.no_grad()
def test_a_request_has_its_own_strength_and_may_be_left_alone() -> None:
    predictor, flat = make_predictor("bilinear"), Flat([1, 1, 1])
    editor, parts = make_editor(predictor), flat.parts()
    parts[0] = dataclasses.replace(parts[0], asked=RequestSettings(strength=1.2))
    parts[1] = dataclasses.replace(parts[1], asked=RequestSettings(edited=False))
    states = flat.run(editor, begin(editor, parts, predictor, flat.model))
    for row, strength in enumerate((1.2, 1.0, 1.5)):
        theirs, (_, norm) = flat.expected(predictor, row, strength=strength)
        torch.testing.assert_close(norm(states[row]), theirs, atol=2e-5, rtol=1e-5)
    assert editor.stats().switched_off == 1 and editor.stats().images == 2


@pytest.mark.parametrize(("threshold", "edited"), [(0.0, True), (1.0, False)])
@torch.no_grad()
def test_low_confidence_is_counted_and_skipped_if_asked(threshold: float, edited: bool) -> None:
    predictor, flat = make_predictor("bilinear"), Flat([1, 1])
    states: dict[str, list[Tensor]] = {}
    for policy in ("edit", "skip"):
        editor = make_editor(predictor, threshold=threshold, on_low_confidence=policy)
        states[policy] = flat.run(editor, begin(editor, flat.parts(), predictor, flat.model))
        assert editor.stats().low_confidence == (0 if edited else 2)
    strength = CONFIG.strength if edited else 1.0
    for row in range(2):
        theirs, (_, norm) = flat.expected(predictor, row, strength=strength)
        torch.testing.assert_close(norm(states["skip"][row]), theirs, atol=2e-5, rtol=1e-5)
        assert torch.equal(states["skip"][row], states["edit"][row]) == edited


@torch.no_grad()
def test_scores_that_are_not_finite_edit_nothing() -> None:
    predictor, flat = make_predictor("none"), Flat([1])
    predictor.score.bias.fill_(torch.nan)
    editor = make_editor(predictor)
    states = flat.run(editor, begin(editor, flat.parts(), predictor, flat.model))
    theirs, (_, norm) = flat.expected(make_predictor("none"), 0, strength=1.0)
    torch.testing.assert_close(norm(states[0]), theirs, atol=2e-5, rtol=1e-5)
    stats = editor.stats()
    assert (stats.not_finite, stats.low_confidence, stats.mean_confidence) == (1, 0, None)


def test_a_step_without_images_is_left_alone() -> None:
    editor = make_editor(make_predictor("none"))
    editor.drop()
    hidden, residual = torch.ones(3, 32), torch.ones(3, 32)
    editor.after_block(1, hidden, residual)
    assert bool((hidden == 1).all()) and bool((residual == 1).all()) and editor.stats().steps == 0


GRID = ImageGrid((6, 6))


def found(part: Part, *, reads_question: bool) -> Any:
    return images_of([part], lambda data: [GRID], reads_question=reads_question)


def test_an_image_in_parts_is_left_out() -> None:
    feature = Feature(3, TOKENS, {})
    for computed, scheduled in ((0, 20), (10, 60)):
        step = found(Part(0, computed, scheduled, 60, [feature]), reads_question=False)
        assert step.images == [] and step.left_out == {PARTIAL: 1}


def test_a_question_that_is_not_complete_leaves_its_image_out() -> None:
    feature = Feature(3, TOKENS, {})
    for scheduled, prompt in ((45, 60), (39, 39)):
        part = Part(0, 0, scheduled, prompt, [feature])
        assert found(part, reads_question=True).left_out == {NO_QUESTION: 1}
        assert len(found(part, reads_question=False).images) == 1


def test_other_media_and_other_sizes_are_left_out() -> None:
    for feature in (Feature(3, TOKENS, None), Feature(3, TOKENS + 1, {})):
        assert found(Part(0, 0, 60, 60, [feature]), reads_question=False).left_out == {NO_GRID: 1}


def test_the_question_is_the_prompts_text_behind_the_image_and_not_what_was_generated() -> None:
    features = [Feature(2, TOKENS, {}), Feature(40, TOKENS, {})]
    step = found(Part(100, 0, 85, 80, features), reads_question=True)  # 5 tokens were generated before a preemption
    assert [image.row for image in step.images] == [102, 140]
    assert [image.questions for image in step.images] == [(138, 139, *range(176, 180)), tuple(range(176, 180))]


def test_an_image_behind_a_cached_prefix_is_found() -> None:
    step = found(Part(7, 32, 60, 92, [Feature(2, 20, {}), Feature(40, TOKENS, {})]), reads_question=False)
    assert [image.row for image in step.images] == [7 + 8]
