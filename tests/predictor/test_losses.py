import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor

from predictor.losses import LOSSES, normalised_target
from predictor.settings import LossName
from scr_runtime.config import SCRConfig
from scr_runtime.rule import SourceRule, source_rule

K = 3


def _rule(eligible: Tensor, k: int) -> SourceRule:
    return SourceRule(SCRConfig(), (1, len(eligible)), eligible, k, None)


def _rows(seed: int = 0) -> tuple[Tensor, Tensor, SourceRule]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(5, 12, generator=generator)
    attention = torch.rand(5, 12, generator=generator) * 0.01
    attention[0, 4] = 0.0
    eligible = torch.ones(12, dtype=torch.bool)
    eligible[[0, 1, 11]] = False
    return scores, attention, _rule(eligible, K)


def _naive_kl(scores: list[float], share: list[float], k: int) -> float:
    total = sum(math.exp(s) for s in scores)
    chances = [math.exp(s) / total for s in scores]
    return sum(p * (math.log(p) - math.log(c)) for c, p in zip(chances, share, strict=True) if p > 0)


def _naive_bce(scores: list[float], share: list[float], k: int) -> float:
    members = sorted(range(len(share)), key=lambda i: (-share[i], i))[:k]
    chances = [1 / (1 + math.exp(-s)) for s in scores]
    return -sum(math.log(c if i in members else 1 - c) for i, c in enumerate(chances)) / len(scores)


def _naive_mse_log(scores: list[float], share: list[float], k: int) -> float:
    return sum((s - math.log(max(p, 1e-6))) ** 2 for s, p in zip(scores, share, strict=True)) / len(scores)


def _naive_lambdarank(scores: list[float], share: list[float], k: int) -> float:
    patches = range(len(share))
    order = sorted(patches, key=lambda i: (-scores[i], i))
    discount = {patch: 1 / math.log2(place + 2) for place, patch in enumerate(order)}
    ideal = sum(p / math.log2(place + 2) for place, p in enumerate(sorted(share, reverse=True)))
    total = 0.0
    for i in sorted(patches, key=lambda i: (-share[i], i))[:k]:
        for j in patches:
            if share[j] < share[i]:
                weight = (share[i] - share[j]) * abs(discount[i] - discount[j]) / ideal
                total += weight * math.log1p(math.exp(scores[j] - scores[i]))
    return total


NAIVE: dict[LossName, Callable[[list[float], list[float], int], float]] = {
    "kl": _naive_kl,
    "bce": _naive_bce,
    "mse_log": _naive_mse_log,
    "lambdarank": _naive_lambdarank,
}


@pytest.mark.parametrize("name", LOSSES)
def test_equals_a_loop(name: LossName) -> None:
    scores, attention, rule = _rows()
    wanted = 0.0
    for row in range(5):
        kept = [i for i in range(12) if rule.eligible[i]]
        total = sum(float(attention[row, i]) for i in kept)
        share = [float(attention[row, i]) / total for i in kept]
        wanted += NAIVE[name]([float(scores[row, i]) for i in kept], share, K) / 5
    assert float(LOSSES[name](scores, attention, rule)) == pytest.approx(wanted, rel=1e-5)


def test_every_loss_has_a_name_and_a_loop() -> None:
    assert set(LOSSES) == set(get_args(LossName)) == set(NAIVE)


@pytest.mark.parametrize("name", LOSSES)
def test_does_not_depend_on_the_scale_of_the_map_nor_on_ineligible_patches(name: LossName) -> None:
    scores, attention, rule = _rows()
    wanted = LOSSES[name](scores, attention, rule)
    other_scores, other_attention = scores.clone(), attention * 7
    other_scores[:, ~rule.eligible] = torch.inf
    other_attention[:, ~rule.eligible] = 1e4
    torch.testing.assert_close(LOSSES[name](other_scores, other_attention, rule), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", LOSSES)
def test_finite_with_gradient_for_zeros_and_large_scores(name: LossName, dtype: torch.dtype) -> None:
    scores, attention, rule = _rows()
    attention[:, 2:8] = 0.0
    attention[1] = 0.0  # a row without a target
    scores = (scores * 1e4).to(dtype).requires_grad_()
    loss = LOSSES[name](scores, attention, rule)
    loss.backward()
    assert loss.dtype == torch.float32
    assert scores.grad is not None
    assert loss.isfinite() and scores.grad.isfinite().all()
    assert not scores.grad[1].any()
    assert not scores.grad[:, ~rule.eligible].any()


@pytest.mark.parametrize("name", LOSSES)
def test_rows_without_attention_do_not_count(name: LossName) -> None:
    scores, attention, rule = _rows()
    wanted = LOSSES[name](scores[:3], attention[:3], rule)
    attention[3:] = 0.0
    torch.testing.assert_close(LOSSES[name](scores, attention, rule), wanted)
    assert LOSSES[name](scores[3:], attention[3:], rule) == 0


def test_kl_and_mse_log_are_zero_at_the_map() -> None:
    _, attention, rule = _rows()
    attention = attention + 1e-3
    scores = normalised_target(attention, rule.eligible).clamp_min(1e-30).log()
    assert float(LOSSES["kl"](scores + 5.0, attention, rule)) == pytest.approx(0, abs=1e-6)
    assert float(LOSSES["mse_log"](scores, attention, rule)) == pytest.approx(0, abs=1e-9)


def test_bce_gives_ties_to_the_lower_index() -> None:
    rule = _rule(torch.ones(6, dtype=torch.bool), 2)
    scores = torch.tensor([[9.0, 9.0, -9.0, -9.0, -9.0, -9.0]])
    assert float(LOSSES["bce"](scores, torch.ones(1, 6), rule)) < 1e-3


@pytest.mark.parametrize("name", ["bce", "lambdarank"])
def test_sources_that_keep_apart_are_what_is_fitted_to(name: LossName) -> None:
    attention = torch.tensor([[1.0, 0.9, 0.8, 0.1, 0.2, 0.3]])  # of a row of patches: the best claims the second
    apart = source_rule(SCRConfig(num_sources=2, exclude_border=False, suppress_claimed=True), (1, 6))
    plain = source_rule(SCRConfig(num_sources=2, exclude_border=False), (1, 6))
    assert (apart.choose(attention).tolist(), plain.choose(attention).tolist()) == ([[0, 2]], [[0, 1]])
    first, second = torch.tensor([[8.0, -8.0, 8.0, -8.0, -8.0, -8.0]]), torch.tensor([[8.0, 8.0] + [-8.0] * 4])
    for rule, right, wrong in ((apart, first, second), (plain, second, first)):
        assert LOSSES[name](right, attention, rule) < LOSSES[name](wrong, attention, rule)


def test_targets_sum_to_one() -> None:
    _, attention, rule = _rows()
    target = normalised_target(attention.half(), rule.eligible)
    torch.testing.assert_close(target.sum(dim=-1), torch.ones(5))
    assert not target[:, ~rule.eligible].any()
