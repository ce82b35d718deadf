from __future__ import annotations

import copy
import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from scr_runtime import PredictorConfig, SourcePredictor
from scr_runtime.config import ContextFeatures, PositionFeatures, QuestionFeatures

POSITIONS, QUESTIONS, CONTEXTS = get_args(PositionFeatures), get_args(QuestionFeatures), get_args(ContextFeatures)

PAPER: dict[str, Any] = {"position": "none", "question": "none", "context": "none", "components": 1}
REAL_SIZES = [1024, 1536, 2048, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192]


def make(**changes: Any) -> SourcePredictor:
    torch.manual_seed(0)
    small: dict[str, Any] = {"rank": 4, "width": 8, "context": "both", "components": 3}
    return SourcePredictor(PredictorConfig(16, **(small | changes)))


def fitted(**changes: Any) -> SourcePredictor:
    """With random statistics, so that folding has something to fold."""
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
@pytest.mark.parametrize("features", [{"context": "both"}, {}, PAPER], ids=["everything", "default", "paper"])
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


def test_a_small_model_gets_no_more_rank_than_it_has() -> None:
    assert SourcePredictor(PredictorConfig(128)).count_parameters() <= 123_600


def usual(hidden: int = 32) -> SourcePredictor:
    """As it is deployed: no gradients."""
    torch.manual_seed(0)
    config = PredictorConfig(hidden, rank=8, width=16, context="both")
    return SourcePredictor(config).eval().requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_16_bit_activations_are_scored_in_float32(dtype: torch.dtype) -> None:
    predictor = usual()
    states = (torch.randn(2, 36, 32) * 3000 + 20000).to(dtype)  # their squares overflow float16
    mean, std = states.float().mean((0, 1)), states.float().std((0, 1))
    predictor.set_statistics(mean, std, torch.zeros(32), torch.ones(32))
    question = torch.randn(2, 32)
    scores, spread = predictor.score_and_spread(states, (6, 6), question)
    plain = usual()
    expected = plain.score_and_spread((states.float() - mean) / std, (6, 6), question)[1]
    assert scores.dtype == spread.dtype == torch.float32
    assert torch.equal(scores, predictor(states, (6, 6), question))
    assert torch.allclose(spread, expected, rtol=1e-3)


def test_the_fold_follows_the_weights() -> None:
    predictor = usual()
    states, question = torch.randn(1, 36, 32), torch.randn(1, 32)
    first = predictor(states, (6, 6), question)
    assert predictor._fold() is predictor._fold()
    predictor.set_statistics(torch.ones(32), torch.ones(32) * 2, torch.zeros(32), torch.ones(32))
    second = predictor(states, (6, 6), question)
    assert torch.allclose(second, usual()((states - 1) / 2, (6, 6), question), atol=1e-5)
    with torch.no_grad():
        predictor.project.weight.mul_(2)
    assert not torch.equal(second, predictor(states, (6, 6), question))
    predictor.load_state_dict(usual().state_dict())
    assert torch.equal(first, predictor(states, (6, 6), question))
    with torch.inference_mode():
        inside = usual()  # inference tensors have no version: never kept
        assert torch.equal(inside(states, (6, 6), question), first)
        assert inside._kept_fold is None


def test_the_tensors_of_a_folder_keep_their_names_and_order() -> None:
    """Format 2 of a predictor folder."""
    assert list(make().state_dict()) == [
        "state_mean", "state_std", "question_mean", "question_std", "temperature", "calibration_raw",
        "calibration_expected", "project.weight", "gate.weight", "gate.bias", "weights.weight", "weights.bias",
        "hidden.weight", "hidden.bias", "score.weight", "score.bias",
    ]  # fmt: skip
