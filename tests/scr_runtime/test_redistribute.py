"""Claims and the edit against their sequential wording."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scr_runtime import SCRConfig
from scr_runtime.config import Connectivity
from scr_runtime.redistribute import apply_edit, claim_neighbours, credit_entropy, plan_edit
from scr_runtime.rule import source_rule


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
    grid: tuple[int, int],
    k: int,
    connectivity: Connectivity,
    border: bool,
    seed: int,
    levels: int,
    data: st.DataObject,
) -> None:
    rows, columns = grid
    strength = data.draw(st.floats(1.01, 1.9))
    config = SCRConfig(num_sources=k, strength=strength, connectivity=connectivity, exclude_border=border)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, levels, (2, rows * columns), generator=generator).float()  # many ties
    rule = source_rule(config, grid)
    sources = rule.choose(scores)

    hidden = torch.randn(1, 2 * rows * columns + 3, 4, generator=generator, dtype=torch.float64)
    positions = torch.randperm(hidden.shape[1], generator=generator)[: 2 * rows * columns].view(2, -1)
    expected = hidden.clone()
    for image in range(2):
        chosen = sources[image].tolist()
        ranking = sorted((-float(value), index) for index, value in enumerate(scores[image]) if rule.eligible[index])
        assert chosen == [index for _, index in ranking[: rule.k]]
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
            for rank in range(rule.k)
            for patch, mine in zip(patches[:, image, rank], owned[:, image, rank], strict=True)
            if mine
        }
        assert pairs == set(owner.items())
    apply_edit(hidden, plan_edit(sources, grid, config, positions))
    assert torch.allclose(hidden, expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_activations_are_edited_to_16_bit_accuracy(dtype: torch.dtype) -> None:
    config = SCRConfig(num_sources=6, strength=1.1)
    hidden = (torch.randn(1, 64, 32) * 3000).to(dtype)  # near the top of float16 after squaring, not after the edit
    exact = hidden.double()
    sources = source_rule(config, (8, 8)).choose(torch.rand(1, 64))
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
