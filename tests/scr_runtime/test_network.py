from __future__ import annotations

from typing import Any

import pytest
import torch

from scr_runtime import PredictorConfig, SourcePredictor, errors
from scr_runtime.network import raw_confidence


@pytest.mark.parametrize("hidden_size", [1024, 2048, 3584, 4096, 5120, 8192])
@pytest.mark.parametrize(
    "features", [{}, {"question": False, "context": False, "position": False}], ids=["default", "paper"]
)
def test_the_rank_follows_from_the_budget(hidden_size: int, features: dict[str, Any]) -> None:
    predictor = SourcePredictor(PredictorConfig(hidden_size, **features))
    count = predictor.count_parameters()
    assert count == predictor.config._count(predictor.config.rank or 0)
    assert abs(count - 120_000) <= 3_600


def test_a_small_model_gets_no_more_rank_than_it_has() -> None:
    assert PredictorConfig(16).rank == 16
    assert SourcePredictor(PredictorConfig(128)).count_parameters() <= 123_600


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_standardising_is_exact_after_folding(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    predictor = SourcePredictor(PredictorConfig(32, rank=8, width=16, context=False, position=False))
    states, question = (torch.randn(2, 12, 32) * 5 + 40).to(dtype), torch.randn(2, 32)
    mean, std = states.float().mean((0, 1)), states.float().std((0, 1))
    plain = predictor((states.float() - mean) / std, (3, 4), question)
    predictor.set_statistics(mean, std)
    assert torch.allclose(predictor(states, (3, 4), question), plain, atol=1e-4)


def test_zero_deviation_is_harmless() -> None:
    predictor = SourcePredictor(PredictorConfig(8, rank=2, width=4, question=False))
    predictor.set_statistics(torch.zeros(8), torch.zeros(8))
    assert predictor(torch.randn(1, 9, 8), (3, 3)).isfinite().all()


def test_each_feature_matters() -> None:
    torch.manual_seed(0)
    states, question = torch.randn(1, 20, 16), torch.randn(1, 16)
    full = SourcePredictor(PredictorConfig(16, rank=4, width=8))
    scores = full(states, (4, 5), question)
    assert not torch.allclose(scores, full(states, (4, 5), question + 1))
    assert not torch.allclose(scores, full(states, (5, 4), question))  # another grid, other places
    moved = states.clone()
    moved[0, 19] += 10
    assert not torch.allclose(scores[0, :10], full(moved, (4, 5), question)[0, :10])  # the image's mean moved
    bare = SourcePredictor(PredictorConfig(16, rank=4, width=8, position=False, question=False, context=False))
    order = torch.randperm(20)
    assert torch.allclose(bare(states, (4, 5))[:, order], bare(states[:, order], (4, 5)), atol=1e-6)


def test_wrong_shapes_and_a_missing_question() -> None:
    predictor = SourcePredictor(PredictorConfig(16, rank=4))
    with pytest.raises(ValueError, match="grid of 4 x 4"):
        predictor(torch.randn(1, 20, 16), (4, 4), torch.randn(1, 16))
    with pytest.raises(ValueError, match="pass question"):
        predictor(torch.randn(1, 20, 16), (4, 5))
    with pytest.raises(errors.ConfigurationError, match="rank=17: expected 1 to hidden_size=16"):
        PredictorConfig(16, rank=17)


def test_calibration_interpolates_and_clamps() -> None:
    predictor = SourcePredictor(PredictorConfig(16, rank=4))
    predictor.set_calibration(torch.tensor([0.2, 0.4, 0.8]), torch.tensor([0.1, 0.1, 0.9]), 0.5)
    given = torch.tensor([0.0, 0.2, 0.3, 0.6, 0.8, 1.0])
    assert predictor.calibrate(given).tolist() == pytest.approx([0.1, 0.1, 0.1, 0.5, 0.9, 0.9])
    assert predictor.calibrate(torch.tensor(float("nan"))).isnan()
    with pytest.raises(ValueError, match="ascending"):
        predictor.set_calibration(torch.tensor([0.2, 0.2]), torch.tensor([0.1, 0.2]), 0.5)


def test_raw_confidence_is_the_softmax_mass_of_the_sources() -> None:
    scores = torch.log(torch.tensor([[0.1, 0.2, 0.3, 0.4]]))
    eligible = torch.tensor([False, True, True, True])
    assert float(raw_confidence(scores, torch.tensor([[3, 1]]), eligible)) == pytest.approx(0.6 / 0.9)
