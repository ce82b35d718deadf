from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from data.datamodule import GridBatches, Part, ShardDataModule
from data.errors import UnfinishedHarvestError
from data.images import CocoImages
from data.shards import ShardReader, ShardWriter, write_index
from tests.data import tiny
from tests.data.test_shards import make_sample


@pytest.fixture
def harvested(tmp_path: Path, coco: CocoImages, run_harvest: Callable[..., dict[str, Any]]) -> Path:
    run_harvest(tmp_path / "shards", coco)
    return tmp_path / "shards"


@pytest.mark.parametrize("memory_limit", [None, 0])
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_rows_are_what_was_written(harvested: Path, split: str, memory_limit: int | None):
    module = ShardDataModule(harvested, batch_size=7, memory_limit=memory_limit)
    written = {(s.key, p): s for s in ShardReader(harvested, split) for p in range(2)}
    seen = []
    for batch in module.loader(split, shuffle=split == "train"):
        assert batch["states"].dtype == batch["question"].dtype == torch.float16
        assert batch["attention"].dtype == torch.float32 and batch["grid"] == tiny.GRID
        assert len(batch["key"]) == len(batch["states"]) <= 7
        for states, attention, question, key in zip(
            batch["states"], batch["attention"], batch["question"], batch["key"], strict=True
        ):
            stored = written[key, 0]
            prompt = next(p for p in range(2) if torch.equal(stored.attention[p], attention))
            assert torch.equal(stored.states, states) and torch.equal(stored.question[prompt], question)
            seen.append((key, prompt))
    assert sorted(seen) == sorted(written)


def test_memory_and_maps_give_the_same_batches_and_tell_which_it_is(
    harvested: Path, capsys: pytest.CaptureFixture[str]
):
    cached, mapped = ShardDataModule(harvested, seed=5), ShardDataModule(harvested, seed=5, memory_limit=1000)
    assert cached.in_memory and not mapped.in_memory
    said = capsys.readouterr().out
    assert "kept in memory: 0.1 MB are within" in said and "memory maps: 0.1 MB are over the limit of 0 MB" in said
    for one, other in zip(cached.train_dataloader(), mapped.train_dataloader(), strict=True):
        assert torch.equal(one["states"], other["states"]) and one["key"] == other["key"]


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_int8_states_reach_the_batch_as_float32(
    tmp_path: Path, coco: CocoImages, run_harvest: Callable[..., dict[str, Any]], cache: str
):
    run_harvest(tmp_path, coco, states_dtype="int8")
    module = ShardDataModule(tmp_path, cache=cache)
    assert module.in_memory == (cache == "memory")
    states = torch.stack([sample.states for sample in ShardReader(tmp_path, "test") for _ in range(2)])
    [batch] = module.test_dataloader()
    assert batch["states"].dtype == torch.float32 and torch.equal(batch["states"], states)
    assert batch["question"].dtype == torch.float32


def test_the_cache_can_be_chosen(harvested: Path, capsys: pytest.CaptureFixture[str]):
    assert ShardDataModule(harvested, cache="memory", memory_limit=0).in_memory
    assert not ShardDataModule(harvested, cache="none").in_memory
    assert "read through memory maps: trainer.cache=none" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"trainer\.cache='gpu': use auto, device, memory, none, stream"):
        ShardDataModule(harvested, cache="gpu")


class _Strategy:
    def __init__(self, device: str) -> None:
        self.root_device = torch.device(device)


@pytest.mark.parametrize(
    ("cache", "free", "kept"), [("auto", 10**9, True), ("auto", 1000, False), ("device", 0, True)]
)
def test_rows_of_a_fit_live_on_its_device_and_go_with_it(
    harvested: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    cache: str,
    free: int,
    kept: bool,
):
    module = ShardDataModule(harvested, cache=cache)
    monkeypatch.setattr(module, "trainer", type("Trainer", (), {"strategy": _Strategy("cuda:0"), "num_devices": 1})())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 10**10))
    monkeypatch.setattr(module, "rows", lambda split, device=None: places.append((split, device)))
    places: list[Any] = []
    module.setup("fit")
    device = torch.device("cuda:0") if kept else None
    assert places == [("train", device), ("validation", device)]
    if cache == "auto":
        assert f"{'kept' if kept else 'not kept'} on cuda:0: " in capsys.readouterr().out
    module.teardown("fit")
    assert module._device is None


def test_a_fit_on_the_cpu_keeps_the_rows_in_its_memory(
    harvested: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    module = ShardDataModule(harvested, cache="device")
    monkeypatch.setattr(module, "trainer", type("Trainer", (), {"strategy": _Strategy("cpu"), "num_devices": 1})())
    module.setup("fit")
    assert module._device is None and "that is its memory" in capsys.readouterr().out
    assert next(iter(module.train_dataloader()))["states"].device.type == "cpu"


@pytest.mark.parametrize(("devices", "limit", "kept"), [(1, 400_000, True), (2, 400_000, True), (8, 400_000, False)])
def test_auto_counts_what_all_processes_of_a_fit_would_keep(
    harvested: Path, monkeypatch: pytest.MonkeyPatch, devices: int, limit: int, kept: bool
):
    module = ShardDataModule(harvested, memory_limit=limit)
    assert module.in_memory and 2 * module.bytes <= limit < 8 * module.bytes
    trainer = type("Trainer", (), {"strategy": _Strategy("cpu"), "num_devices": devices})()
    monkeypatch.setattr(module, "trainer", trainer)
    module.setup("fit")
    assert module.in_memory == kept


def test_workers_read_the_same_rows(harvested: Path):
    alone, helped = (ShardDataModule(harvested, num_workers=n, memory_limit=0) for n in (0, 1))
    keys = [[batch["key"] for batch in module.val_dataloader()] for module in (alone, helped)]
    assert keys[0] == keys[1]


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
    shares = [list(GridBatches(MIXED, 4, shuffle=True, seed=1, rank=rank, ranks=ranks)) for rank in range(ranks)]
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
    samplers = [GridBatches(MIXED, 4, shuffle=False, rank=rank, ranks=ranks) for rank in range(ranks)]
    parts = [part for sampler in samplers for part in sampler]
    assert all(part.weight == 1 and len({MIXED[row] for row in part.numbers}) == 1 for part in parts)
    assert sorted(row for part in parts for row in part.numbers) == list(range(len(MIXED)))
    assert [len(list(sampler)) for sampler in samplers] == [len(sampler) for sampler in samplers]


def test_an_epoch_can_begin_in_its_middle():
    whole = GridBatches(MIXED, 4, shuffle=True, seed=1)
    whole.set_epoch(3)
    cut = GridBatches(MIXED, 4, shuffle=True, seed=1, start=(3, 5))
    assert list(cut) == list(whole)[5:] and len(cut) == len(whole)
    for sampler in (whole, cut):
        sampler.set_epoch(4)
    assert list(cut) == list(whole)


def test_grids_of_any_order_are_gathered_from_memory_as_from_disk(tmp_path: Path):
    with ShardWriter(tmp_path, "train-00000", "settings") as writer:
        for number in range(9):
            sample = make_sample(number, prompts=1 + number % 3)
            writer.write(type(sample)(**{**sample.__dict__, "grid": (3, 2) if number % 2 else (2, 3)}))
    write_index(tmp_path, {"train": ["train-00000"]}, {}, {})
    held, mapped = (ShardDataModule(tmp_path, batch_size=4, cache=cache) for cache in ("memory", "none"))
    pairs = list(zip(held.train_dataloader(), mapped.train_dataloader(), strict=True))
    assert sum(len(batch["key"]) for batch, _ in pairs) == 18
    for one, other in pairs:
        assert one.keys() == other.keys() and one["key"] == other["key"] and one["grid"] == other["grid"]
        assert all(torch.equal(one[name], other[name]) for name in ("states", "attention", "question"))


def test_batches_never_mix_grids():
    grids = MIXED[:20]
    sampler = GridBatches(grids, 3, shuffle=True)
    batches = [part.numbers for part in sampler]
    assert all(len({grids[row] for row in batch}) == 1 for batch in batches)
    assert sorted(row for batch in batches for row in batch) == list(range(20)) and len(batches) == len(sampler)


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_a_fit_may_see_the_first_images_only(harvested: Path, cache: str):
    module = ShardDataModule(harvested, batch_size=4, cache=cache, train_images=3)
    keys = ShardReader(harvested, "train").keys
    assert module.count("train") == 6 and module.count("test") == 2 * len(ShardReader(harvested, "test"))
    assert {key for batch in module.train_dataloader() for key in batch["key"]} == set(keys[:3])
    assert len(module.test_dataloader()) == len(ShardDataModule(harvested, batch_size=4).test_dataloader())
    assert module.identity != ShardDataModule(harvested, batch_size=4).identity
    module.choose(None, False)
    assert {key for batch in module.train_dataloader() for key in batch["key"]} == set(keys)


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_a_fit_may_see_mean_maps_but_is_judged_by_each_prompts_own(harvested: Path, cache: str):
    module = ShardDataModule(harvested, batch_size=4, cache=cache, mean_maps=True)
    maps = {sample.key: sample.attention for sample in ShardReader(harvested, "train")}
    for batch in module.train_dataloader():
        for key, seen in zip(batch["key"], batch["attention"], strict=True):
            wanted = (maps[key][0] / maps[key][0].sum() + maps[key][1] / maps[key][1].sum()) / 2
            torch.testing.assert_close(seen, wanted)
    plain = ShardDataModule(harvested, batch_size=4)
    for one, other in zip(module.val_dataloader(), plain.val_dataloader(), strict=True):
        assert torch.equal(one["attention"], other["attention"])
    assert module.identity != plain.identity


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_images": 0}, r"trainer\.train_images=0: .* has \d+ images"),
        ({"train_images": 10**6}, "raise harvest.samples"),
        ({"train_images": 2, "cache": "stream"}, "another cache"),
        ({"mean_maps": True, "cache": "stream"}, "another cache"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused(harvested: Path, settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ShardDataModule(harvested, **settings)


def test_a_batch_of_two_grids_is_refused(tmp_path: Path):
    with ShardWriter(tmp_path, "train-00000", "settings") as writer:
        first = make_sample(1)
        writer.write(first)
        writer.write(type(first)(**{**first.__dict__, "image_id": 2, "grid": (3, 2)}))
    write_index(tmp_path, {"train": ["train-00000"]}, {}, {})
    module = ShardDataModule(tmp_path)
    assert [batch["grid"] for batch in module.loader("train")] == [(2, 3), (3, 2)]
    with pytest.raises(ValueError, match=r"rows of one grid, got \[\(2, 3\), \(3, 2\)\]"):
        module.rows("train")[Part([0, 2])]


def test_width_and_fingerprint_are_told(harvested: Path):
    module = ShardDataModule(harvested)
    assert module.hidden_size == tiny.WIDTH and len(module.fingerprint) == 64


def test_an_unfinished_harvest_is_refused(tmp_path: Path):
    with pytest.raises(UnfinishedHarvestError, match="no finished harvest"):
        ShardDataModule(tmp_path)
