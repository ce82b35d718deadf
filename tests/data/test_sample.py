from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch

from data.sample import STATES_DTYPES, Sample, quantise
from data.settings import StatesDtype
from tests.data.tiny import assert_same, make_sample


def test_every_number_format_has_a_dtype():
    assert set(STATES_DTYPES) == set(get_args(StatesDtype))


@pytest.mark.parametrize("dtype", STATES_DTYPES.values())
def test_a_sample_is_its_members(dtype: torch.dtype):
    sample = make_sample(7, dtype=dtype)
    assert_same(Sample.from_members(sample.facts(), sample.tensors()), sample)
    with pytest.raises(KeyError, match="attention"):
        Sample.from_members(sample.facts(), {"states": sample.states})


def test_int8_states_are_off_by_half_a_step_of_their_token_at_most():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(50, 64, generator=generator) * torch.logspace(-4, 5, 50)[:, None]
    states[7] = 0
    stored, scales = quantise(states)
    assert stored.abs().amax(-1).tolist() == [127 * (token != 7) for token in range(50)]
    error = (stored * scales[:, None] - states).abs()
    assert (error <= scales[:, None] * 0.5001).all() and error[7].max() == 0


def test_int8_without_scales_and_scales_without_int8_are_rejected():
    whole, small = make_sample(1), make_sample(1, dtype=torch.int8)
    small.check()
    for wrong in (replace(small, scales=None), replace(whole, scales=small.scales)):
        with pytest.raises(ValueError, match="scales of"):
            wrong.check()


def test_contradicting_fields_are_rejected():
    good = make_sample(1)
    bad = replace(good, grids=((3, 3),), entropy=[1.0], attention=good.attention.half())
    with pytest.raises(
        ValueError, match=r"grid \(3, 3\) has 9 patches, states have 6; 1 entropies for 2 prompts and 1 grids.*float16"
    ):
        bad.check()


def several(dtype: torch.dtype = torch.float16) -> Sample:
    """An image of two grids, 1 x 2 and 2 x 2, and two prompts."""
    return replace(make_sample(7, dtype=dtype), grids=((1, 2), (2, 2)), entropy=[1.0, 2.0, 3.0, 4.0])


@pytest.mark.parametrize("dtype", STATES_DTYPES.values())
def test_a_sample_of_several_grids_is_its_members_and_its_parts(dtype: torch.dtype):
    sample = several(dtype)
    assert_same(Sample.from_members(sample.facts(), sample.tensors()), sample)
    assert sample.facts()["grid"] == [[1, 2], [2, 2]]
    with pytest.raises(ValueError, match="sample 000000000007 has 2 grids"):
        _ = sample.grid
    parts = [sample.part(place) for place in range(2)]
    for part in parts:
        part.check()
    assert [(part.grid, part.place, list(part.entropy)) for part in parts] == [
        ((1, 2), 0, [1.0, 3.0]), ((2, 2), 1, [2.0, 4.0])
    ]  # fmt: skip
    assert torch.equal(torch.cat([part.states for part in parts]), sample.states)
    assert torch.equal(torch.cat([part.decoded().states for part in parts]), sample.decoded().states)
    assert torch.equal(torch.cat([part.attention for part in parts], dim=1), sample.attention)
    assert all(torch.equal(part.question, sample.question) for part in parts)


def test_one_grid_is_stored_as_before_there_were_several():
    sample = make_sample(7)
    assert sample.facts()["grid"] == [2, 3] and len(sample.facts()["entropy"]) == 2
    assert sample.part(0) is sample and sample.overview is sample


@pytest.mark.parametrize(
    ("grids", "place"), [(((1, 2), (2, 2)), 1), (((1, 2),) * 3, 2), (((2, 2), (1, 2)), 0), (((2, 3),), 0)]
)
def test_the_overview_is_the_last_of_the_largest_grids(grids: tuple[tuple[int, int], ...], place: int):
    sample = replace(make_sample(7), grids=grids, entropy=[0.0] * (2 * len(grids)))
    sample.check()
    assert sample.overview.place == place and sample.overview.grid == grids[place]


@pytest.mark.parametrize("grid", [[], [2], [[2, 3]], [2, 0], [2, True], [[1, 2], [2]], [[1, 2], 3], "23", None])
def test_other_grids_in_a_record_are_rejected(grid: object):
    sample = make_sample(7)
    with pytest.raises(ValueError, match="grid is"):
        Sample.from_members({**sample.facts(), "grid": grid}, sample.tensors())
