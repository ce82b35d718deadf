from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scr_runtime import PredictorConfig, SourcePredictor, errors
from scr_runtime.network import CONTEXTS, POSITIONS, QUESTIONS, raw_confidence

PAPER: dict[str, Any] = {"position": "none", "question": "none", "context": "none", "components": 1}
REAL_SIZES = [1024, 1536, 2048, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192]


def make(**changes: Any) -> SourcePredictor:
    torch.manual_seed(0)
    small: dict[str, Any] = {"rank": 4, "width": 8, "components": 3}
    return SourcePredictor(PredictorConfig(16, **(small | changes)))


def fitted(**changes: Any) -> SourcePredictor:
    """With statistics of its own, so that folding has something to fold."""
    predictor = make(**changes)
    predictor.set_statistics(torch.randn(16), torch.rand(16) + 0.5, torch.randn(16), torch.rand(16) + 0.5)
    return predictor


def by_hand(predictor: SourcePredictor, states: Tensor, grid: tuple[int, int], question: Tensor) -> Tensor:
    """The class docstring's formula, patch by patch and component by component, in float64."""
    net = copy.deepcopy(predictor).double()
    config, (rows, columns) = net.config, grid
    assert net.hidden.weight.shape[1] == config.features(config.rank or 0)
    result = torch.zeros(states.shape[:2], dtype=torch.float64)
    for image, state in enumerate(states.double()):
        patch = ((state - net.state_mean) / net.state_std) @ net.project.weight.T  # [N, r]
        asked = ((question[image].double() - net.question_mean) / net.question_std) @ net.project.weight.T  # [r]
        out = torch.zeros(rows * columns, config.components, dtype=torch.float64)
        for place in range(rows * columns):
            row, column = divmod(place, columns)
            near = [
                patch[other]
                for other in range(rows * columns)
                if abs(other // columns - row) <= 1 and abs(other % columns - column) <= 1
            ]
            y, x = 2 * row / (rows - 1) - 1, 2 * column / (columns - 1) - 1
            features = [patch[place]]
            if config.question == "concat":
                features.append(asked)
            if net.gate is not None:
                features.append(patch[place] * net.gate(asked))
            if config.context in ("mean", "both"):
                features.append(patch.mean(0))
            if config.context in ("neighbourhood", "both"):
                features.append(torch.stack(near).mean(0))
            if config.position != "none":
                features.append(torch.tensor([y, x, 1 - max(abs(y), abs(x))], dtype=torch.float64))
            if config.position == "fourier":
                waves = [
                    wave(math.pi * frequency * axis)
                    for frequency in (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0)
                    for axis in (y, x)
                    for wave in (math.sin, math.cos)
                ]
                features.append(torch.tensor(waves, dtype=torch.float64))
            out[place] = net.score(torch.nn.functional.gelu(net.hidden(torch.cat(features))))
        if net.weights is None:
            result[image] = out[:, 0]
            continue
        logs = net.weights(asked if config.reads_question else patch.mean(0))
        maps = [out[:, m].softmax(0) for m in range(config.components)]
        result[image] = sum(logs[m].exp() * one for m, one in enumerate(maps)).log()  # type: ignore[union-attr]
    return result


@pytest.mark.parametrize("components", [1, 3])
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("position", POSITIONS)
def test_every_variant_follows_its_formula(position: str, question: str, context: str, components: int) -> None:
    predictor = fitted(position=position, question=question, context=context, components=components)
    states, asked = torch.randn(2, 20, 16) * 2 + 1, torch.randn(2, 16)
    expected = by_hand(predictor, states, (4, 5), asked)
    trained = predictor(states, (4, 5), asked)
    assert torch.allclose(trained.double(), expected, atol=1e-5)
    trained.sum().backward()
    assert all(parameter.grad is not None for parameter in predictor.parameters())
    frozen = predictor.eval().requires_grad_(False)
    for _ in range(2):  # the second call reads what the first has kept
        assert torch.allclose(frozen(states, (4, 5), asked).double(), expected, atol=1e-5)
        scores, spread = frozen.score_and_spread(states, (4, 5), asked)
        assert torch.allclose(scores.double(), expected, atol=1e-5)
        assert spread.shape == (2,)
        assert bool((spread > 0).all())


@pytest.mark.parametrize("hidden_size", REAL_SIZES)
@pytest.mark.parametrize("features", [{}, {"context": "none"}, PAPER], ids=["everything", "default", "paper"])
def test_the_rank_follows_from_the_budget(hidden_size: int, features: dict[str, Any]) -> None:
    predictor = SourcePredictor(PredictorConfig(hidden_size, **features))
    count = predictor.count_parameters()
    assert count == predictor.config._count(predictor.config.rank or 0)
    assert abs(count - 120_000) <= 3_600


def test_the_count_is_right_for_every_variant() -> None:
    for position in POSITIONS:
        for question in QUESTIONS:
            for context in CONTEXTS:
                for components in (1, 5):
                    predictor = make(position=position, question=question, context=context, components=components)
                    assert predictor.count_parameters() == predictor.config._count(4)


def test_a_small_model_gets_no_more_rank_than_it_has() -> None:
    assert PredictorConfig(16).rank == 16
    assert SourcePredictor(PredictorConfig(128)).count_parameters() <= 123_600


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("question", QUESTIONS)
def test_standardising_is_exact_after_folding(dtype: torch.dtype, question: str) -> None:
    predictor = make(question=question)
    states, asked = (torch.randn(2, 12, 16) * 5 + 40).to(dtype), (torch.randn(2, 16) * 3 - 20).to(dtype)
    mean, std = states.float().mean((0, 1)), states.float().std((0, 1))
    plain = predictor((states.float() - mean) / std, (3, 4), (asked.float() + 20) / 3)
    predictor.set_statistics(mean, std, torch.full((16,), -20.0), torch.full((16,), 3.0))
    assert torch.allclose(predictor(states, (3, 4), asked), plain, atol=1e-4)


def test_zero_deviation_is_harmless() -> None:
    predictor = make()
    predictor.set_statistics(torch.zeros(16), torch.zeros(16), torch.zeros(16), torch.zeros(16))
    assert predictor(torch.randn(1, 9, 16), (3, 3), torch.randn(1, 16)).isfinite().all()


def test_each_feature_matters() -> None:
    states, asked = torch.randn(1, 20, 16), torch.randn(1, 16)
    moved = states.clone()
    moved[0, 19] += 10
    order = torch.randperm(20)

    def changes(**features: Any) -> list[bool]:
        """Whether another question, another place, a far and a near patch change a patch's score, up to a shift."""
        net = make(**(PAPER | features))

        def scores(states: Tensor, grid: tuple[int, int], question: Tensor) -> Tensor:
            return net(states, grid, question)[0].detach().log_softmax(0)

        plain, far = scores(states, (4, 5), asked), net(moved, (4, 5), asked)[0]
        own = net(states, (4, 5), asked)[0]
        return [
            not torch.allclose(plain, scores(states, (4, 5), asked + 1), atol=1e-5),
            not torch.allclose(plain[order], scores(states[:, order], (4, 5), asked), atol=1e-5),
            not torch.allclose(own[:10], far[:10], atol=1e-5),  # patch 19 is no neighbour of the first two rows
            not torch.allclose(own[18], far[18], atol=1e-5),
        ]

    assert changes() == [False, False, False, False]
    assert changes(position="linear") == [False, True, False, False]
    assert changes(position="fourier") == [False, True, False, False]
    assert changes(question="concat") == [True, False, False, False]
    assert changes(question="bilinear") == [True, False, False, False]
    assert changes(context="mean") == [False, False, True, True]
    assert changes(context="neighbourhood") == [False, True, False, True]
    assert changes(context="both") == [False, True, True, True]
    assert changes(question="concat", components=3)[0]


def test_extreme_outputs_stay_finite() -> None:
    """A patch that no component wants: its probability underflows float32, its score does not."""
    predictor = make()
    with torch.no_grad():
        predictor.score.weight.mul_(1e4)
    states = torch.randn(1, 20, 16, requires_grad=True)
    scores = predictor(states, (4, 5), torch.randn(1, 16))
    assert float(scores.min().detach()) < -200
    scores.logsumexp(1).sum().backward()
    assert scores.isfinite().all()
    assert states.grad is not None
    assert states.grad.isfinite().all()


def test_wrong_shapes_and_a_missing_question() -> None:
    predictor = make()
    with pytest.raises(ValueError, match="grid of 4 x 4"):
        predictor(torch.randn(1, 20, 16), (4, 4), torch.randn(1, 16))
    with pytest.raises(ValueError, match="pass question"):
        predictor(torch.randn(1, 20, 16), (4, 5))
    with pytest.raises(errors.ConfigurationError, match="rank=17: expected 1 to hidden_size=16"):
        PredictorConfig(16, rank=17)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"position": True}, r"position=True: expected one of \['none', 'linear', 'fourier'\]"),
        ({"question": "film"}, r"question='film': expected one of \['none', 'concat', 'bilinear'\]"),
        ({"context": False}, r"context=False: expected one of \['none', 'mean', 'neighbourhood', 'both'\]"),
        ({"components": 0}, "components=0: expected at least 1"),
        ({"width": 0}, "width=0: expected at least 1"),
    ],
)
def test_unknown_choices_are_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(errors.ConfigurationError, match=words):
        PredictorConfig(16, **wrong)
    with pytest.raises(errors.ConfigurationError, match=words):
        PredictorConfig.from_dict(PredictorConfig(16).to_dict() | wrong)


def test_calibration_interpolates_and_clamps() -> None:
    predictor = make()
    predictor.set_calibration(torch.tensor([0.2, 0.4, 0.8]), torch.tensor([0.1, 0.1, 0.9]), 0.5, 2.5)
    assert (float(predictor.temperature), predictor.threshold) == (2.5, 0.5)
    given = torch.tensor([0.0, 0.2, 0.3, 0.6, 0.8, 1.0])
    assert predictor.calibrate(given).tolist() == pytest.approx([0.1, 0.1, 0.1, 0.5, 0.9, 0.9])
    assert predictor.calibrate(torch.tensor(float("nan"))).isnan()
    knots = torch.tensor([0.2, 0.4])
    with pytest.raises(ValueError, match="ascending"):
        predictor.set_calibration(torch.tensor([0.2, 0.2]), torch.tensor([0.1, 0.2]), 0.5)
    for temperature in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="expected a number over 0"):
            predictor.set_calibration(knots, knots, 0.5, temperature)


@settings(deadline=None, max_examples=100)
@given(st.integers(2, 30), st.integers(0, 10_000), st.floats(0.05, 20.0), st.booleans(), st.data())
def test_raw_confidence_is_the_mean_chance_to_be_above_the_cut(
    patches: int, seed: int, temperature: float, shared: bool, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, patches, generator=generator) * 5
    k = data.draw(st.integers(1, patches - 1))
    eligible = torch.zeros(3, patches, dtype=torch.bool)
    for row in range(3):
        count = data.draw(st.integers(k + 1, patches))
        eligible[row, torch.randperm(patches, generator=generator)[:count]] = True
    if shared:
        eligible[:] = eligible[0]
    found = raw_confidence(scores, eligible[0] if shared else eligible, k, temperature)
    for row in range(3):
        ranked = sorted((float(s) for s, can in zip(scores[row], eligible[row], strict=True) if can), reverse=True)
        cut = (ranked[k - 1] + ranked[k]) / 2
        chances = [1 / (1 + math.exp(-(score - cut) / temperature)) for score in ranked[:k]]
        assert float(found[row]) == pytest.approx(sum(chances) / k, abs=1e-5)
    assert bool(((found >= 0.5 - 1e-6) & (found <= 1)).all())
    assert torch.allclose(raw_confidence(scores + 7, eligible, k, temperature), found, atol=1e-5)
