from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from data.batches import GridBatches, Part, Start
from data.datamodule import ShardDataModule
from data.index import write_index
from data.ranks import Rank
from data.shards import ShardWriter
from tests.data.tiny import make_sample


def test_shuffle_is_a_new_permutation_per_epoch_and_the_same_per_seed():
    def epoch(seed: int, number: int) -> list[Sequence[int]]:
        sampler = GridBatches([(2, 2)] * 50, 8, shuffle=True, seed=seed)
        sampler.set_epoch(number)
        return [part.numbers for part in sampler]

    assert epoch(0, 3) == epoch(0, 3)
    assert epoch(0, 3) != epoch(0, 4) and epoch(0, 3) != epoch(1, 3)
    assert sorted(row for batch in epoch(0, 3) for row in batch) == list(range(50))
    assert len(GridBatches([(2, 2)] * 50, 8, shuffle=True)) == len(epoch(0, 0)) == 7


MIXED = [(2, 2), (3, 2), (2, 2), (2, 3), (3, 2)] * 7 + [(4, 4)]  # one batch has a single row


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_batches_of_one_process(ranks: int):
    whole = list(GridBatches(MIXED, 4, shuffle=True, seed=1))
    shares = [list(GridBatches(MIXED, 4, shuffle=True, seed=1, rank=Rank(rank, ranks))) for rank in range(ranks)]
    assert [len(share) for share in shares] == [len(whole)] * ranks
    for batch, *parts in zip(whole, *shares, strict=True):
        counted = [row for part in parts if part.weight for row in part.numbers]
        assert sorted(counted) == sorted(batch.numbers)
        assert all(part.numbers for part in parts)
        # the mean over ranks of (weight x mean over own rows) is the mean over the batch's rows
        mean = sum(part.weight * sum(part.numbers) / len(part.numbers) for part in parts) / ranks
        assert mean == pytest.approx(sum(batch.numbers) / len(batch.numbers))


@pytest.mark.parametrize("ranks", [2, 3])
def test_in_order_each_row_belongs_to_one_rank(ranks: int):
    samplers = [GridBatches(MIXED, 4, shuffle=False, rank=Rank(rank, ranks)) for rank in range(ranks)]
    parts = [part for sampler in samplers for part in sampler]
    assert all(part.weight == 1 and len({MIXED[row] for row in part.numbers}) == 1 for part in parts)
    assert sorted(row for part in parts for row in part.numbers) == list(range(len(MIXED)))
    assert [len(list(sampler)) for sampler in samplers] == [len(sampler) for sampler in samplers]


def test_an_epoch_can_begin_in_its_middle():
    whole = GridBatches(MIXED, 4, shuffle=True, seed=1)
    whole.set_epoch(3)
    cut = GridBatches(MIXED, 4, shuffle=True, seed=1, start=Start(3, 5))
    assert list(cut) == list(whole)[5:] and len(cut) == len(whole)
    for sampler in (whole, cut):
        sampler.set_epoch(4)
    assert list(cut) == list(whole)


def test_batches_never_mix_grids():
    grids = MIXED[:20]
    sampler = GridBatches(grids, 3, shuffle=True)
    batches = [part.numbers for part in sampler]
    assert all(len({grids[row] for row in batch}) == 1 for batch in batches)
    assert sorted(row for batch in batches for row in batch) == list(range(20)) and len(batches) == len(sampler)


def test_a_batch_of_two_grids_is_rejected(tmp_path: Path):
    with ShardWriter(tmp_path, "train-00000", "settings") as writer:
        first = make_sample(1)
        writer.write(first)
        writer.write(replace(first, image_id=2, grids=((3, 2),)))
    write_index(tmp_path, {"train": ["train-00000"]}, {}, {})
    module = ShardDataModule(tmp_path)
    assert [batch["grid"] for batch in module.loader("train")] == [(2, 3), (3, 2)]
    with pytest.raises(ValueError, match=r"rows of one grid, got \[\(2, 3\), \(3, 2\)\]"):
        module.rows("train")[Part([0, 2])]
