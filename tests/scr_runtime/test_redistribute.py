"""Sources, claims and the edit against their sequential wording."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scr_runtime import SCRConfig
from scr_runtime.redistribute import (
    apply_edit,
    claim_neighbours,
    claims_of,
    credit_entropy,
    effective_num_sources,
    eligible_patches,
    plan_edit,
    rank_patches,
    select_sources,
)
from tests.scr_runtime.reference import sources_apart


def sequential_owner(sources: list[int], rows: int, columns: int, connectivity: int) -> dict[int, int]:
    """Neighbour -> source, by the paper's rule: in descending attention, each source claims what is left."""
    owner: dict[int, int] = {}
    for source in sources:
        for row in range(source // columns - 1, source // columns + 2):
            for column in range(source % columns - 1, source % columns + 2):
                if connectivity == 4 and abs(row - source // columns) + abs(column - source % columns) > 1:
                    continue
                if not (0 <= row < rows and 0 <= column < columns):
                    continue
                patch = row * columns + column
                if patch not in sources and patch not in owner:
                    owner[patch] = source
    return owner


grids = st.tuples(st.integers(3, 9), st.integers(3, 9))


@settings(deadline=None, max_examples=150)
@given(
    grids,
    st.integers(1, 40),
    st.sampled_from([4, 8]),
    st.booleans(),
    st.integers(0, 10_000),
    st.integers(1, 5),
    st.data(),
)
def test_claims_and_edit_follow_the_sequential_rule(
    grid: tuple[int, int], k: int, connectivity: int, border: bool, seed: int, levels: int, data: st.DataObject
) -> None:
    rows, columns = grid
    strength = data.draw(st.floats(1.01, 1.9))
    config = SCRConfig(num_sources=k, strength=strength, connectivity=connectivity, exclude_border=border)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, levels, (2, rows * columns), generator=generator).float()  # many ties
    eligible = eligible_patches(grid, border)
    count = effective_num_sources(grid, config)
    sources = select_sources(scores, eligible, count)

    hidden = torch.randn(1, 2 * rows * columns + 3, 4, generator=generator, dtype=torch.float64)
    positions = torch.randperm(hidden.shape[1], generator=generator)[: 2 * rows * columns].view(2, -1)
    expected = hidden.clone()
    for image in range(2):
        chosen = sources[image].tolist()
        ranking = sorted((-float(value), index) for index, value in enumerate(scores[image]) if eligible[index])
        assert chosen == [index for _, index in ranking[:count]]
        owner = sequential_owner(chosen, rows, columns, connectivity)
        assert not set(owner) & set(chosen)
        for patch, source in owner.items():
            expected[0, positions[image, patch]] += (strength - 1) * hidden[0, positions[image, source]]
        for source in chosen:
            expected[0, positions[image, source]] = hidden[0, positions[image, source]] / strength
        patches, owned = claim_neighbours(sources, grid, connectivity)
        assert (patches[0, image] - image * rows * columns).tolist() == chosen
        pairs = {
            (int(patch) - image * rows * columns, chosen[rank])
            for rank in range(count)
            for patch, mine in zip(patches[:, image, rank], owned[:, image, rank], strict=True)
            if mine
        }
        assert pairs == set(owner.items())
    apply_edit(hidden, plan_edit(sources, grid, config, positions))
    assert torch.allclose(hidden, expected, atol=1e-6)


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
    grid: tuple[int, int], k: int, connectivity: int, border: bool, seed: int, levels: int
) -> None:
    rows, columns = grid
    config = SCRConfig(num_sources=k, connectivity=connectivity, exclude_border=border, suppress_claimed=True)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, levels, (3, rows * columns), generator=generator).float()  # few levels: many ties
    eligible = eligible_patches(grid, border)
    claims = claims_of(grid, config)
    count = effective_num_sources(grid, config)
    sources = select_sources(scores, eligible, count, claims)
    values, ranked = rank_patches(scores, eligible, count, claims)
    assert torch.equal(ranked[:, :count], sources)
    for image in range(3):
        order = sorted((-float(value), patch) for patch, value in enumerate(scores[image]) if eligible[patch])
        expected = sources_apart([patch for _, patch in order], columns, connectivity)
        assert sources[image].tolist() == expected[:count]
        assert values[image, :count].tolist() == scores[image, sources[image]].tolist()
        assert sorted(ranked[image].tolist()) == list(range(rows * columns))
    fewer = max(count // 2, 1)
    assert torch.equal(select_sources(scores, eligible, fewer, claims), sources[:, :fewer])
    rows_of_masks = select_sources(scores, eligible.expand(3, -1), count, claims)
    assert torch.equal(rows_of_masks, sources)


def test_without_suppress_claimed_there_is_nothing_to_pass_along() -> None:
    assert claims_of((6, 6), SCRConfig()) is None


def test_scores_that_are_not_numbers_come_first_also_apart() -> None:
    """So that the best K tell whether all are finite."""
    scores = torch.rand(1, 36)
    scores[0, 14], scores[0, 28] = float("nan"), float("inf")
    claims = claims_of((6, 6), SCRConfig(suppress_claimed=True))
    assert select_sources(scores, eligible_patches((6, 6), True), 4, claims)[0, :2].tolist() == [14, 28]


def test_k_is_capped_at_half_of_the_interior() -> None:
    config = SCRConfig(num_sources=32)
    assert effective_num_sources((24, 24), config) == 32
    assert effective_num_sources((8, 8), config) == 18
    assert effective_num_sources((3, 3), config) == 1
    assert effective_num_sources((8, 8), SCRConfig(num_sources=40, exclude_border=False)) == 32
    with pytest.raises(ValueError, match="2 x 9 patches has no patch off its border"):
        effective_num_sources((2, 9), config)


def test_the_border_rule() -> None:
    mask = eligible_patches((4, 5), True).view(4, 5)
    assert mask.sum() == 6
    assert mask[1:3, 1:4].all()
    assert eligible_patches((4, 5), False).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_activations_are_edited_to_16_bit_accuracy(dtype: torch.dtype) -> None:
    config = SCRConfig(num_sources=6, strength=1.1)
    hidden = (torch.randn(1, 64, 32) * 3000).to(dtype)  # near the top of float16 after squaring, not after the edit
    exact = hidden.double()
    sources = select_sources(torch.rand(1, 64), eligible_patches((8, 8), True), 6)
    plan = plan_edit(sources, (8, 8), config, torch.arange(64)[None])
    apply_edit(hidden, plan)
    apply_edit(exact, plan)
    assert hidden.isfinite().all()
    step = torch.finfo(dtype).eps
    assert ((hidden.double() - exact).abs() <= 2 * step * exact.abs() + step * 3000).all()


def test_entropy_of_equal_and_of_single_credit() -> None:
    assert credit_entropy(torch.ones(2, 576)).tolist() == pytest.approx([6.35611] * 2, abs=1e-4)  # ln 576
    single = torch.zeros(576)
    single[3] = 5.0
    assert float(credit_entropy(single)) == 0.0


def test_equal_scores_go_to_the_lower_index() -> None:
    scores: Tensor = torch.zeros(1, 36)
    assert select_sources(scores, eligible_patches((6, 6), True), 4).tolist() == [[7, 8, 9, 10]]
