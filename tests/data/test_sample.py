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
