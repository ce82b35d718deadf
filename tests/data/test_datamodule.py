from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data.datamodule import ShardDataModule
from data.errors import DamagedShardError, DataError, SettingsError, UnfinishedHarvestError
from data.folder import HarvestSummary
from data.images import CocoImages
from data.index import write_index
from data.sample import Sample
from data.settings import Cache, ReadingSettings
from data.shards import ShardReader, ShardWriter
from tests.data import tiny
from tests.data.tiny import make_sample


@pytest.mark.parametrize("memory_limit", [None, 0])
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_rows_are_what_was_written(undisturbed: Path, split: str, memory_limit: int | None):
    module = ShardDataModule(undisturbed, ReadingSettings(batch_size=7), memory_limit=memory_limit)
    written = {(s.key, p): s for s in ShardReader(undisturbed, split) for p in range(2)}
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


def test_memory_and_maps_give_the_same_batches_and_log_which_it_is(
    undisturbed: Path, capsys: pytest.CaptureFixture[str]
):
    cached, mapped = ShardDataModule(undisturbed, seed=5), ShardDataModule(undisturbed, seed=5, memory_limit=1000)
    assert cached.in_memory and not mapped.in_memory
    logged = " ".join(capsys.readouterr().out.split())
    assert "kept in memory: 0.1 MB are within" in logged
    assert "memory maps: 0.1 MB are over the limit of 0 MB" in logged
    for one, other in zip(cached.train_dataloader(), mapped.train_dataloader(), strict=True):
        assert torch.equal(one["states"], other["states"]) and one["key"] == other["key"]


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_int8_states_reach_the_batch_as_float32(
    tmp_path: Path, coco: CocoImages, run_harvest: Callable[..., HarvestSummary], cache: Cache
):
    run_harvest(tmp_path, coco, states_dtype="int8")
    module = ShardDataModule(tmp_path, ReadingSettings(cache=cache))
    assert module.in_memory == (cache == "memory")
    states = torch.stack([sample.states for sample in ShardReader(tmp_path, "test") for _ in range(2)])
    [batch] = module.test_dataloader()
    assert batch["states"].dtype == torch.float32 and torch.equal(batch["states"], states)
    assert batch["question"].dtype == torch.float32


def test_the_cache_can_be_chosen(undisturbed: Path, capsys: pytest.CaptureFixture[str]):
    assert ShardDataModule(undisturbed, ReadingSettings(cache="memory"), memory_limit=0).in_memory
    assert not ShardDataModule(undisturbed, ReadingSettings(cache="none")).in_memory
    assert "read through memory maps: trainer.cache=none" in " ".join(capsys.readouterr().out.split())


class _Strategy:
    def __init__(self, device: str) -> None:
        self.root_device = torch.device(device)


@pytest.mark.parametrize(
    ("cache", "free", "kept"), [("auto", 10**9, True), ("auto", 1000, False), ("device", 0, True)]
)
def test_rows_of_a_fit_live_on_its_device_and_go_with_it(
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    cache: Cache,
    free: int,
    kept: bool,
):
    module = ShardDataModule(undisturbed, ReadingSettings(cache=cache))
    monkeypatch.setattr(module, "trainer", type("Trainer", (), {"strategy": _Strategy("cuda:0"), "num_devices": 1})())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 10**10))
    monkeypatch.setattr(module, "rows", lambda split, device=None: places.append((split, device)))
    places: list[Any] = []
    module.setup("fit")
    device = torch.device("cuda:0") if kept else None
    assert places == [("train", device), ("validation", device)]
    if cache == "auto":
        assert f"{'kept' if kept else 'not kept'} on cuda:0: " in " ".join(capsys.readouterr().out.split())
    module.teardown("fit")
    assert module._device is None


def test_a_fit_on_the_cpu_keeps_the_rows_in_its_memory(
    undisturbed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    module = ShardDataModule(undisturbed, ReadingSettings(cache="device"))
    monkeypatch.setattr(module, "trainer", type("Trainer", (), {"strategy": _Strategy("cpu"), "num_devices": 1})())
    module.setup("fit")
    assert module._device is None and "shards are kept in its memory" in " ".join(capsys.readouterr().out.split())
    assert next(iter(module.train_dataloader()))["states"].device.type == "cpu"


@pytest.mark.parametrize(("devices", "limit", "kept"), [(1, 400_000, True), (2, 400_000, True), (8, 400_000, False)])
def test_auto_counts_what_all_processes_of_a_fit_would_keep(
    undisturbed: Path, monkeypatch: pytest.MonkeyPatch, devices: int, limit: int, kept: bool
):
    module = ShardDataModule(undisturbed, memory_limit=limit)
    assert module.in_memory and 2 * module.bytes <= limit < 8 * module.bytes
    trainer = type("Trainer", (), {"strategy": _Strategy("cpu"), "num_devices": devices})()
    monkeypatch.setattr(module, "trainer", trainer)
    module.setup("fit")
    assert module.in_memory == kept


def test_workers_read_the_same_rows(undisturbed: Path):
    alone, helped = (ShardDataModule(undisturbed, ReadingSettings(num_workers=n), memory_limit=0) for n in (0, 1))
    keys = [[batch["key"] for batch in module.val_dataloader()] for module in (alone, helped)]
    assert keys[0] == keys[1]


def test_grids_of_any_order_are_gathered_from_memory_as_from_disk(tmp_path: Path):
    with ShardWriter(tmp_path, "train-00000", "settings") as writer:
        for number in range(9):
            sample = make_sample(number, prompts=1 + number % 3)
            writer.write(replace(sample, grids=((3, 2) if number % 2 else (2, 3),)))
    write_index(tmp_path, {"train": ["train-00000"]}, {}, {})
    caches: tuple[Cache, ...] = ("memory", "none")
    held, mapped = (ShardDataModule(tmp_path, ReadingSettings(batch_size=4, cache=cache)) for cache in caches)
    pairs = list(zip(held.train_dataloader(), mapped.train_dataloader(), strict=True))
    assert sum(len(batch["key"]) for batch, _ in pairs) == 18
    for one, other in pairs:
        assert one.keys() == other.keys() and one["key"] == other["key"] and one["grid"] == other["grid"]
        assert all(torch.equal(one[name], other[name]) for name in ("states", "attention", "question"))


def write_tiled(folder: Path) -> dict[tuple[str, int], Sample]:
    """A harvest whose images have one to three grids; its parts by key and place."""
    parts: dict[tuple[str, int], Sample] = {}
    names = {"train": ["train-00000", "train-00001"]}
    for shard, name in enumerate(names["train"]):
        with ShardWriter(folder, name, "settings") as writer:
            for number in range(6 * shard, 6 * shard + 6):
                grids = [((2, 3),), ((1, 2), (2, 2)), ((1, 2), (1, 2), (2, 1))][number % 3]
                sample = tiny.tiled(make_sample(number, prompts=1 + number % 2), *grids)
                writer.write(sample)
                parts |= {(sample.key, place): sample.part(place) for place in range(len(grids))}
    write_index(folder, names, {}, {})
    return parts


@pytest.mark.parametrize("mean_maps", [False, True])
@pytest.mark.parametrize("cache", ["memory", "none", "stream"])
def test_each_grid_of_an_image_is_a_row(tmp_path: Path, cache: Cache, mean_maps: bool):
    if cache == "stream" and mean_maps:
        pytest.skip("a stream has no mean maps")
    parts = write_tiled(tmp_path)
    module = ShardDataModule(tmp_path, ReadingSettings(batch_size=4, cache=cache), mean_maps=mean_maps)
    rows = sum(len(part.prompts) for part in parts.values())
    assert module.count("train") == rows == sum(shard["rows"] for shard in module.index["shards"])
    seen = []
    for batch in module.train_dataloader():
        for row, origin in enumerate(zip(batch["key"], batch["place"], strict=True)):
            part = parts[origin]
            assert batch["grid"] == part.grid and torch.equal(batch["states"][row], part.states)
            shares = part.attention / part.attention.sum(-1, keepdim=True)
            known = shares.mean(0, keepdim=True) if mean_maps else part.attention
            assert torch.isclose(known, batch["attention"][row]).all(-1).any()
            seen.append(origin)
    assert sorted(seen) == sorted(origin for origin, part in parts.items() for _ in part.prompts)


def test_the_first_images_bring_all_their_grids(tmp_path: Path):
    parts = write_tiled(tmp_path)
    module = ShardDataModule(tmp_path, ReadingSettings(batch_size=4, train_images=3))
    seen = {origin for batch in module.train_dataloader() for origin in zip(batch["key"], batch["place"], strict=True)}
    assert seen == {origin for origin in parts if int(origin[0]) < 3} and len(seen) == 6
    assert module.count("train") == 1 + 2 * 2 + 3 and sorted(module.grids("train"))[0] == (1, 2)


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_a_fit_may_see_the_first_images_only(undisturbed: Path, cache: Cache):
    module = ShardDataModule(undisturbed, ReadingSettings(batch_size=4, cache=cache, train_images=3))
    whole = ShardDataModule(undisturbed, ReadingSettings(batch_size=4))
    keys = ShardReader(undisturbed, "train").keys
    assert module.count("train") == 6 and module.count("test") == 2 * len(ShardReader(undisturbed, "test"))
    assert {key for batch in module.train_dataloader() for key in batch["key"]} == set(keys[:3])
    assert len(module.test_dataloader()) == len(whole.test_dataloader())
    assert module.identity != whole.identity
    again = module.for_fit(ReadingSettings(batch_size=4, cache=cache), seed=0, mean_maps=False)
    assert {key for batch in again.train_dataloader() for key in batch["key"]} == set(keys)
    assert again.identity == whole.identity and module.count("train") == 6  # the first one keeps its choice


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_a_fit_may_see_mean_maps_but_is_judged_by_each_prompts_own(undisturbed: Path, cache: Cache):
    module = ShardDataModule(undisturbed, ReadingSettings(batch_size=4, cache=cache), mean_maps=True)
    maps = {sample.key: sample.attention for sample in ShardReader(undisturbed, "train")}
    for batch in module.train_dataloader():
        for key, seen in zip(batch["key"], batch["attention"], strict=True):
            wanted = (maps[key][0] / maps[key][0].sum() + maps[key][1] / maps[key][1].sum()) / 2
            torch.testing.assert_close(seen, wanted)
    plain = ShardDataModule(undisturbed, ReadingSettings(batch_size=4))
    for one, other in zip(module.val_dataloader(), plain.val_dataloader(), strict=True):
        assert torch.equal(one["attention"], other["attention"])
    assert module.identity != plain.identity


@pytest.mark.parametrize(
    ("settings", "mean_maps", "message"),
    [
        (
            ReadingSettings(train_images=21),
            False,
            r"trainer\.train_images=21: .* has 20 images.*raise harvest\.samples",
        ),
        (ReadingSettings(cache="stream"), True, "another cache"),
    ],
)
def test_a_choice_that_cannot_be_made_is_rejected(
    undisturbed: Path, settings: ReadingSettings, mean_maps: bool, message: str
):
    with pytest.raises(SettingsError, match=message):
        ShardDataModule(undisturbed, settings, mean_maps=mean_maps)
    with pytest.raises(SettingsError, match=message):
        ShardDataModule(undisturbed).for_fit(settings, seed=0, mean_maps=mean_maps)


def test_another_choice_shares_what_is_loaded(undisturbed: Path, capsys: pytest.CaptureFixture[str]):
    first = ShardDataModule(undisturbed, ReadingSettings(batch_size=4))
    capsys.readouterr()
    second = first.for_fit(ReadingSettings(batch_size=7), seed=3, mean_maps=True)
    assert second.rows("train") is first.rows("train") and capsys.readouterr().out == ""
    assert (second.settings.batch_size, second.seed, second.mean_maps) == (7, 3, True)
    assert (first.settings.batch_size, first.seed, first.mean_maps) == (4, 0, False)
    fresh = ShardDataModule(undisturbed, ReadingSettings(batch_size=7), seed=3, mean_maps=True)
    assert second.identity == fresh.identity
    for one, other in zip(second.train_dataloader(), fresh.train_dataloader(), strict=True):
        assert one["key"] == other["key"] and torch.equal(one["attention"], other["attention"])
    first.teardown("fit")
    assert second.rows("train") is first.rows("train")  # what lies in memory stays, and stays shared


def test_a_module_travels_to_another_process_without_its_rows(undisturbed: Path):
    module = ShardDataModule(undisturbed, ReadingSettings(batch_size=4), seed=2)
    keys = [batch["key"] for batch in module.train_dataloader()]
    again: ShardDataModule = pickle.loads(pickle.dumps(module))
    assert len(pickle.dumps(module)) < 50_000
    assert [batch["key"] for batch in again.train_dataloader()] == keys


def test_a_module_knows_width_and_fingerprint(undisturbed: Path):
    module = ShardDataModule(undisturbed)
    assert module.hidden_size == tiny.WIDTH and len(module.fingerprint) == 64


def test_an_unfinished_harvest_is_rejected(tmp_path: Path):
    with pytest.raises(UnfinishedHarvestError, match="no finished harvest"):
        ShardDataModule(tmp_path)


def test_damage_in_a_worker_process_is_the_same_error(undisturbed: Path):
    tar = undisturbed / "train-00001.tar"
    tar.write_bytes(tar.read_bytes()[:-1000] + bytes([7]) * 1000)
    module = ShardDataModule(undisturbed, ReadingSettings(batch_size=4, cache="none", num_workers=1))
    with pytest.raises(DamagedShardError, match="train-00001"):
        list(module.train_dataloader())
    with pytest.raises(DamagedShardError, match="train-00001"):
        ShardDataModule(undisturbed, ReadingSettings(batch_size=4, cache="memory")).setup("fit")


@pytest.mark.parametrize(
    "place",
    [{}, {"epoch": 1}, {"epoch": -1, "batches": 0}, {"epoch": "1", "batches": None}, {"epoch": 1.0, "batches": 0}],
)
def test_a_checkpoint_that_does_not_know_its_place_is_refused(undisturbed: Path, place: dict[str, Any]):
    module = ShardDataModule(undisturbed)
    with pytest.raises(DataError, match="remove it, and fit again"):
        module.load_state_dict(place)
    module.load_state_dict({"epoch": 1, "batches": 2})


def test_a_split_without_images_is_reported(tmp_path: Path):
    for name in ("train-00000", "validation-00000"):
        with ShardWriter(tmp_path, name, "settings"):
            pass
    write_index(tmp_path, {"train": ["train-00000"], "validation": ["validation-00000"]}, {}, {})
    with pytest.raises(SettingsError, match="no images to fit to"):
        _ = ShardDataModule(tmp_path).hidden_size
