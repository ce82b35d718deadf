"""The stream: every row once, an order that a seed gives, shares of equal length, damage that is reported."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data.batches import Start
from data.datamodule import ShardDataModule
from data.errors import DamagedShardError, DataError, SettingsError, StreamError
from data.index import write_index
from data.ranks import Rank
from data.settings import ReadingSettings
from data.shards import ShardReader, ShardWriter
from data.stream import StreamedBatches
from tests.data import odd
from tests.data.tiny import make_sample

SHARDS, EACH = 5, 6


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two grids, one to three prompts an image: 60 rows in 5 train shards, and two other splits."""
    folder = tmp_path_factory.mktemp("shards")
    names = {"train": [f"train-{n:05d}" for n in range(SHARDS)]} | {s: [f"{s}-00000"] for s in ("validation", "test")}
    number = 0
    for name in (name for split in names.values() for name in split):
        with ShardWriter(folder, name, "settings") as writer:
            for _ in range(EACH):
                number += 1
                sample = make_sample(number, prompts=1 + number % 3)
                writer.write(replace(sample, grids=((3, 2) if number % 4 else (2, 3),)))
    write_index(folder, names, {}, {})
    return folder


def streamed(shards: Path, *, workers: int = 0, source: str | None = None, **choice: Any) -> StreamedBatches:
    settings = ReadingSettings(batch_size=8, num_workers=workers, cache="stream", stream_from=source)
    return StreamedBatches(shards, settings, **choice)


def rows_of(stream: StreamedBatches) -> list[list[tuple[str, int]]]:
    return [[(sample.key, prompt) for sample, prompt in batch] for batch in stream.rows()]


def all_rows(shards: Path) -> list[tuple[str, int]]:
    reader = ShardReader(shards, "train")
    return [(key, prompt) for key, count in zip(reader.keys, reader.prompts, strict=True) for prompt in range(count)]


@pytest.mark.parametrize("workers", [0, 2])
def test_one_process_sees_each_row_once_in_batches_of_one_grid(shards: Path, workers: int) -> None:
    stream = streamed(shards, seed=1, buffer=4, workers=workers)
    batches = list(stream.rows())
    assert len(batches) == len(stream) and all(len({sample.grid for sample, _ in batch}) == 1 for batch in batches)
    assert all(len(batch) <= 8 for batch in batches)
    seen = [row for batch in rows_of(stream) for row in batch]
    assert sorted(seen) == sorted(all_rows(shards)) and len(seen) == 60


def test_the_order_is_that_of_seed_and_epoch(shards: Path) -> None:
    def order(seed: int, epoch: int) -> list[list[tuple[str, int]]]:
        stream = streamed(shards, seed=seed, buffer=4)
        stream.set_epoch(epoch)
        return rows_of(stream)

    assert order(0, 2) == order(0, 2)
    assert order(0, 2) != order(0, 3) and order(0, 2) != order(1, 2)
    # rows of different shards come in one batch, and not in the order of their tar
    first = [key for key, _ in order(0, 2)[0]]
    assert len({int(key) // EACH for key in first}) > 1 and first != sorted(first)


def test_an_epoch_can_begin_in_its_middle(shards: Path) -> None:
    whole = streamed(shards, seed=1)
    whole.set_epoch(2)
    cut = streamed(shards, seed=1, start=Start(2, 3))
    assert rows_of(cut) == rows_of(whole)[3:]
    for stream in (whole, cut):
        stream.set_epoch(3)
    assert rows_of(cut) == rows_of(whole)


def test_processes_have_equally_many_full_batches_of_their_own_shards(shards: Path) -> None:
    shares = [streamed(shards, seed=1, rank=Rank(number, 2)) for number in range(2)]
    found = [rows_of(share) for share in shares]
    assert [len(batches) for batches in found] == [len(share) for share in shares] == [7, 7]
    assert {len(batch) for batches in found for batch in batches} == {4}
    keys = [{key for batch in batches for key, _ in batch} for batches in found]
    assert not keys[0] & keys[1]
    assert max(Counter(row for batches in found for batch in batches for row in batch).values()) <= 2
    with pytest.raises(SettingsError, match="5 train shards for 6 processes"):
        streamed(shards, rank=Rank(0, 6))


def test_the_data_module_streams_the_train_split_alone(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # the tars of the train split are elsewhere, and come through a command
    for file in shards.iterdir():
        if not file.name.startswith("train") or file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    source = f"pipe:cat {shards}/{{shard}}.tar"
    module = ShardDataModule(tmp_path, ReadingSettings(batch_size=8, cache="stream", stream_from=source))
    assert "the train split is read from pipe:cat" in capsys.readouterr().out
    assert module.count("train") == 60 and module.hidden_size == 5 and module.identity["stream"]
    stored = {(sample.key, p): sample for sample in ShardReader(shards, "train") for p in range(len(sample.prompts))}
    loader, seen = module.train_dataloader(), []
    for batch in loader:
        assert batch["states"].dtype == torch.float16 and batch["weight"] == 1
        for states, attention, question, key in zip(
            batch["states"], batch["attention"], batch["question"], batch["key"], strict=True
        ):
            prompt = next(p for k, p in stored if k == key and torch.equal(stored[k, p].attention[p], attention))
            sample = stored[key, prompt]
            assert torch.equal(sample.states, states) and torch.equal(sample.question[prompt], question)
            assert sample.grid == batch["grid"]
            seen.append((key, prompt))
    assert sorted(seen) == sorted(stored) and len(loader) == 8
    assert isinstance(loader, StreamedBatches) and loader.sampler is loader  # Lightning sets its epoch
    assert sum(len(batch["key"]) for batch in module.val_dataloader()) == module.count("validation")


def test_a_cut_tar_is_an_error_not_fewer_rows(shards: Path, tmp_path: Path) -> None:
    for file in shards.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tar = tmp_path / "train-00002.tar"
    whole = tar.read_bytes()
    for length in (len(whole) // 2, len(whole) // 3 // 512 * 512, 0):
        tar.write_bytes(whole[:length])
        with pytest.raises(DamagedShardError, match=r"train-00002.*ends in sample"):
            list(streamed(tmp_path))
    tar.write_bytes(bytes(len(whole)))
    with pytest.raises(DamagedShardError, match=r"train-00002.*is unreadable"):
        list(streamed(tmp_path))


def test_a_changed_tar_ends_the_epoch(shards: Path, tmp_path: Path) -> None:
    for file in shards.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tar = tmp_path / "train-00002.tar"
    whole = tar.read_bytes()
    for place in range(0, len(whole), 997):
        content = bytearray(whole)
        content[place] ^= 1
        tar.write_bytes(content)
        for source in (None, f"pipe:cat {tmp_path}/{{shard}}.tar"):
            with pytest.raises(DamagedShardError, match="train-00002"):
                list(streamed(tmp_path, source=source))
    tar.write_bytes(whole + b"more")
    with pytest.raises(DamagedShardError, match=r"train-00002: the checksum of its stream is wrong"):
        list(streamed(tmp_path))


def test_damage_in_a_worker_process_is_the_same_error(shards: Path, tmp_path: Path) -> None:
    for file in shards.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tar = tmp_path / "train-00002.tar"
    tar.write_bytes(tar.read_bytes()[:-1000] + bytes([7]) * 1000)
    with pytest.raises(DamagedShardError, match="train-00002"):
        list(streamed(tmp_path, workers=1))
    tar.unlink()
    with pytest.raises(DamagedShardError, match=r"train-00002.* is missing"):
        list(streamed(tmp_path, workers=1))
    with pytest.raises(StreamError, match="exit 3"):
        list(streamed(shards, workers=1, source=f"pipe:cat {shards}/{{shard}}.tar; exit 3"))


@pytest.mark.parametrize("kind", odd.KINDS)
def test_whatever_lies_in_place_of_a_tar_is_an_error_of_ours(shards: Path, tmp_path: Path, kind: str) -> None:
    for file in shards.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    odd.put(tmp_path / "train-00002.tar", kind)
    with pytest.raises(DamagedShardError, match="train-00002"):
        list(streamed(tmp_path))


def test_a_stream_without_end_is_not_read_for_ever(shards: Path) -> None:
    source = f"pipe:cat {shards}/{{shard}}.tar /dev/zero"
    with pytest.raises(DamagedShardError, match="the checksum of its stream is wrong"):
        list(streamed(shards, source=source))


def test_a_command_that_fails_is_an_error(shards: Path) -> None:
    source = f"pipe:cat {shards}/{{shard}}.tar; exit 3"
    with pytest.raises(OSError, match="exit 3") as caught:
        list(streamed(shards, source=source))
    assert isinstance(caught.value, StreamError)
    with pytest.raises(DataError, match="train-0000"):
        list(streamed(shards, source="nope://host/{shard}.tar"))


def test_a_consumer_may_stop_before_the_end(shards: Path) -> None:
    stream = streamed(shards, source=f"pipe:cat {shards}/{{shard}}.tar; sleep 0.01", rank=Rank(0, 2))
    assert len(rows_of(stream)) == 7  # in the middle of a tar: the rest of its output is not read
