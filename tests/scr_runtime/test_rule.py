"""Which patches are sources, how many, and how clearly: against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scr_runtime import SCRConfig, errors
from scr_runtime.config import Connectivity
from scr_runtime.rule import SourceRule, effective_num_sources, source_rule
from tests.scr_runtime.reference import sources_apart

grids = st.tuples(st.integers(3, 9), st.integers(3, 9))


@st.composite
def rules(draw: st.DrawFn) -> SCRConfig:
    """Every setting that choosing depends on."""
    return SCRConfig(
        num_sources=draw(st.integers(1, 40)),
        source_fraction=draw(st.one_of(st.none(), st.floats(0.01, 0.5))),
        connectivity=draw(st.sampled_from([4, 8])),
        exclude_border=draw(st.booleans()),
        suppress_claimed=draw(st.booleans()),
    )


def loop(scores: Tensor, config: SCRConfig, grid: tuple[int, int]) -> tuple[list[int], int, int]:
    """One image's eligible patches in the order of choice, patch after patch; how many are eligible; and K."""
    rows, columns = grid
    eligible = [
        row * columns + column
        for row in range(rows)
        for column in range(columns)
        if not config.exclude_border or (0 < row < rows - 1 and 0 < column < columns - 1)
    ]
    ranked = [patch for _, patch in sorted((-float(scores[patch]), patch) for patch in eligible)]
    wanted = config.num_sources
    if config.source_fraction is not None:
        wanted = round(config.source_fraction * rows * columns)
    k = max(1, min(wanted, len(eligible) // 2))
    if config.suppress_claimed:
        ranked = sources_apart(ranked, columns, config.connectivity)
    return ranked, len(eligible), k


@settings(deadline=None, max_examples=200)
@given(grids, rules(), st.integers(0, 10_000), st.sampled_from([1, 2, 5, 10_000]), st.floats(0.05, 20.0))
def test_choice_gaps_and_confidence_agree_with_a_loop(
    grid: tuple[int, int], config: SCRConfig, seed: int, levels: int, temperature: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, levels, (3, grid[0] * grid[1]), generator=generator).float()  # few levels: many ties
    rule = source_rule(config, grid)
    chosen, (gaps, sources), confidence = (
        rule.choose(scores), rule.gaps(scores), rule.confidence(scores, temperature)
    )  # fmt: skip
    assert torch.equal(chosen, sources)
    for image in range(3):
        ranked, eligible, k = loop(scores[image], config, grid)
        assert (int(rule.eligible.sum()), rule.k) == (eligible, k)
        assert chosen[image].tolist() == ranked[:k]
        first_out = float(scores[image, ranked[k]]) if k < eligible else -math.inf
        cut = (float(scores[image, ranked[k - 1]]) + first_out) / 2
        expected = [float(scores[image, patch]) - cut for patch in ranked[:k]]
        assert gaps[image].tolist() == pytest.approx(expected, rel=1e-6)
        chances = [1 / (1 + math.exp(-gap / temperature)) if gap / temperature > -700 else 0.0 for gap in expected]
        assert float(confidence[image]) == pytest.approx(sum(chances) / k, abs=1e-5)
    if not config.suppress_claimed:
        assert bool(((confidence >= 0.5 - 1e-6) & (confidence <= 1)).all())
    assert torch.allclose(rule.confidence(scores + 7, temperature), confidence, atol=1e-5)


@settings(deadline=None, max_examples=150)
@given(
    grids,
    st.integers(1, 40),
    st.sampled_from([4, 8]),
    st.booleans(),
    st.integers(0, 10_000),
    st.sampled_from([1, 2, 5, 10_000]),
)
def test_sources_stay_apart_and_fill_up(
    grid: tuple[int, int], k: int, connectivity: Connectivity, border: bool, seed: int, levels: int
) -> None:
    rows, columns = grid
    config = SCRConfig(num_sources=k, connectivity=connectivity, exclude_border=border, suppress_claimed=True)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, levels, (3, rows * columns), generator=generator).float()  # few levels: many ties
    rule = source_rule(config, grid)
    count = rule.k
    sources = rule.choose(scores)
    values, ranked = rule.rank(scores)
    assert torch.equal(ranked[:, :count], sources)
    for image in range(3):
        order = sorted((-float(value), patch) for patch, value in enumerate(scores[image]) if rule.eligible[patch])
        expected = sources_apart([patch for _, patch in order], columns, connectivity)
        assert sources[image].tolist() == expected[:count]
        assert values[image, :count].tolist() == scores[image, sources[image]].tolist()
        assert sorted(ranked[image].tolist()) == list(range(rows * columns))
    fewer = max(count // 2, 1)
    assert torch.equal(rule.rank(scores, fewer)[1][:, :fewer], sources[:, :fewer])


def test_without_suppress_claimed_there_are_no_claims() -> None:
    assert source_rule(SCRConfig(), (6, 6)).claims is None


def test_scores_that_are_not_numbers_come_first() -> None:
    """So that the best K show whether all are finite."""
    scores = torch.rand(1, 36)
    scores[0, 14], scores[0, 28] = float("nan"), float("inf")
    for apart in (False, True):
        rule = source_rule(SCRConfig(num_sources=4, suppress_claimed=apart), (6, 6))
        assert rule.choose(scores)[0, :2].tolist() == [14, 28]


def test_k_is_capped_at_half_of_the_interior() -> None:
    config = SCRConfig(num_sources=32)
    assert effective_num_sources((24, 24), config) == 32
    assert effective_num_sources((8, 8), config) == 18
    assert effective_num_sources((3, 3), config) == 1
    assert effective_num_sources((8, 8), SCRConfig(num_sources=40, exclude_border=False)) == 32
    with pytest.raises(ValueError, match="2 x 9 patches has no patch off its border"):
        effective_num_sources((2, 9), config)


def test_the_border_rule() -> None:
    mask = source_rule(SCRConfig(), (4, 5)).eligible.view(4, 5)
    assert mask.sum() == 6
    assert mask[1:3, 1:4].all()
    assert source_rule(SCRConfig(exclude_border=False), (4, 5)).eligible.all()


def test_equal_scores_go_to_the_lower_index() -> None:
    scores: Tensor = torch.zeros(1, 36)
    rule = source_rule(SCRConfig(num_sources=4), (6, 6))
    assert rule.choose(scores).tolist() == [[7, 8, 9, 10]]


def test_a_single_eligible_patch_is_chosen_without_a_rival() -> None:
    rule = source_rule(SCRConfig(), (3, 3))
    gaps, sources = rule.gaps(torch.rand(2, 9))
    assert sources.tolist() == [[4], [4]]
    assert gaps.tolist() == [[math.inf], [math.inf]]
    assert rule.confidence(torch.rand(2, 9)).tolist() == [1.0, 1.0]


def test_a_rule_is_made_once_and_usable_by_autograd() -> None:
    with torch.inference_mode():
        rule = source_rule(SCRConfig(suppress_claimed=True), (5, 7))
    assert source_rule(SCRConfig(suppress_claimed=True), (5, 7)) is rule
    assert rule.claims is not None
    assert not (rule.eligible.is_inference() or rule.claims.is_inference())
    scores = torch.randn(2, 35, requires_grad=True)
    rule.gaps(scores)[0].sum().backward()
    assert scores.grad is not None


@pytest.mark.parametrize(
    ("config", "grid"),
    [(SCRConfig(), (2, 9)), (SCRConfig(), (9, 1)), (SCRConfig(source_fraction=0.1), (2, 2))],
)
def test_a_grid_without_an_inner_patch_has_no_rule(config: SCRConfig, grid: tuple[int, int]) -> None:
    with pytest.raises(errors.PrefillError, match="set exclude_border=False"):
        source_rule(config, grid)


@settings(deadline=None, max_examples=100)
@given(st.integers(2, 30), st.integers(0, 10_000), st.floats(0.05, 20.0), st.data())
def test_confidence_is_the_mean_chance_to_be_above_the_cut_under_any_mask(
    patches: int, seed: int, temperature: float, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, patches, generator=generator) * 5
    k = data.draw(st.integers(1, patches - 1))
    count = data.draw(st.integers(k + 1, patches))
    eligible = torch.zeros(patches, dtype=torch.bool)
    eligible[torch.randperm(patches, generator=generator)[:count]] = True
    found = SourceRule(SCRConfig(), (1, patches), eligible, k, None).confidence(scores, temperature)
    for row in range(3):
        ranked = sorted((float(score) for score, can in zip(scores[row], eligible, strict=True) if can), reverse=True)
        cut = (ranked[k - 1] + ranked[k]) / 2
        chances = [1 / (1 + math.exp(-(score - cut) / temperature)) for score in ranked[:k]]
        assert float(found[row]) == pytest.approx(sum(chances) / k, abs=1e-5)
    assert bool(((found >= 0.5 - 1e-6) & (found <= 1)).all())
