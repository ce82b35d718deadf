"""The train split as a stream of its tars: for sets that no machine holds, and tars that lie behind a URL.

Only the index and the sidecars (small JSON files) have to be in the harvest's folder. Tars are read from beginning to
end, sample by sample as the sidecars say, from whatever webdataset's `gopen` opens: files, http(s), `pipe:` commands.

    shards   permuted by (seed, epoch); each process has its share of them
    rows     drawn at random from a buffer of samples
    batches  of one grid each; the incomplete batch of each grid comes last

One process sees each row once per epoch. Several see `rows // batch_size` full batches each: a process whose shards
give more skips the rest, and one whose shards give less begins them again.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset.gopen import gopen

from data.batches import BEGINNING, Batch, Grid, Start, as_batch, epoch_generator, stack_rows
from data.errors import DamagedShardError, SettingsError
from data.index import read_index, read_sidecar
from data.ranks import Rank
from data.records import Entry
from data.sample import Sample
from data.settings import ReadingSettings

_CHUNK = 1 << 20
Row = tuple[Sample, int]  # a sample as stored, and the number of one of its prompts


class StreamedBatches:
    """Shuffled batches of the train split; their order depends on seed, epoch, buffer and processes alone.

    Args:
        directory: folder with the harvest's index and the sidecars.
        settings: rows per batch, of all processes together; where the tars are; processes that read them.
        seed: of the order.
        buffer: samples among which the next row is drawn.
        rank: this process among those of the fit.
        start: where an interrupted fit resumes; the batches that are skipped are read all the same.

    Raises:
        SettingsError: fewer shards than processes.
        DamagedShardError: while reading, if a shard is cut or lacks samples.
    """

    def __init__(
        self,
        directory: Path,
        settings: ReadingSettings,
        *,
        seed: int = 0,
        buffer: int = 256,
        rank: Rank | None = None,
        start: Start = BEGINNING,
    ) -> None:
        self._rank = rank or Rank()
        ranks = self._rank.size
        names = [shard["name"] for shard in read_index(directory)["shards"] if shard["split"] == "train"]
        if len(names) < ranks:
            raise SettingsError(
                f"{directory} has {len(names)} train shards for {ranks} processes: lower trainer.devices"
            )
        self._entries: dict[str, list[Entry]] = {}
        rows: Counter[Grid] = Counter()
        for name in names:
            self._entries[name] = read_sidecar(directory, name)["samples"]
            for entry in self._entries[name]:
                rows[entry["grid"][0], entry["grid"][1]] += entry["prompts"]
        self._source = settings.stream_from or f"{directory}/{{shard}}.tar"
        self._workers = settings.num_workers
        self._size = -(-settings.batch_size // ranks)
        self._seed, self._buffer = seed, buffer
        self._start = start
        self._epoch = start.epoch
        whole = sum(-(-count // settings.batch_size) for count in rows.values())
        self._length = whole if ranks == 1 else max(rows.total() // settings.batch_size, 1)

    @property
    def sampler(self) -> StreamedBatches:
        """Itself: Lightning calls `set_epoch` of a loader's sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next iteration."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        for rows in self.rows():
            yield as_batch(stack_rows(rows), rows[0][0].grid, [sample.key for sample, _ in rows], 1.0)

    def rows(self) -> Iterator[list[Row]]:
        """The rows of each batch, before they are stacked."""
        generator = epoch_generator(self._seed, self._epoch)
        names = list(self._entries)
        names = self._rank.share([names[i] for i in torch.randperm(len(names), generator=generator).tolist()])
        passes = itertools.repeat(names) if self._rank.size > 1 else [names]
        rows = (row for names in passes for row in shuffled(self._read(names), self._buffer, generator))
        skip = self._start.batches if self._epoch == self._start.epoch else 0
        return itertools.islice(_grouped(rows, self._size), skip, self._length)

    def _read(self, names: list[str]) -> Iterator[Row]:
        tars = _Tars([(name, self._source.replace("{shard}", name), self._entries[name]) for name in names])
        workers = min(self._workers, len(names))
        for sample in DataLoader(tars, batch_size=None, num_workers=workers, collate_fn=_unchanged):
            yield from ((sample, prompt) for prompt in range(len(sample.prompts)))


class _Tars(IterableDataset[Sample]):
    """Samples of (shard, URL, entries of its sidecar) triples, divided among the workers of a loader.

    The sidecar says where each sample begins and how long it is, so that a missing one is noticed.
    """

    def __init__(self, shards: Sequence[tuple[str, str, list[Entry]]]) -> None:
        self._shards = shards

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        own = self._shards[worker.id :: worker.num_workers] if worker else self._shards
        for name, url, entries in own:
            stream = gopen(url, "rb")
            try:
                yield from _samples(name, stream, entries)
            except BaseException:
                with contextlib.suppress(OSError):  # a command whose output is not read to its end fails too
                    stream.close()
                raise
            stream.close()


def _samples(name: str, stream: Any, entries: list[Entry]) -> Iterator[Sample]:
    place = 0
    for entry in entries:
        members = {}
        for ending, (offset, size) in (("json", entry["json"]), ("safetensors", entry["safetensors"])):  # as written
            before = stream.read(offset - place)
            members[ending] = stream.read(size)
            if len(before) < offset - place or len(members[ending]) < size:
                raise DamagedShardError(name, f"its stream ends in sample {entry['key']}")
            place = offset + size
        try:
            facts, tensors = json.loads(members["json"]), safetensors.torch.load(members["safetensors"])
            sample = Sample.from_members(facts, tensors)
        except (ValueError, TypeError, KeyError, SafetensorError) as error:
            raise DamagedShardError(name, f"sample {entry['key']} is unreadable ({error})") from error
        yield sample
    while stream.read(_CHUNK):
        pass


def _unchanged(sample: Any) -> Any:
    return sample


def shuffled(rows: Iterator[Row], size: int, generator: torch.Generator) -> Iterator[Row]:
    """Draws rows at random from a buffer of as many as `size` samples have."""
    buffer: list[Row] = []
    limit = 0
    for row in rows:
        limit = max(limit, size * len(row[0].prompts))
        buffer.append(row)
        if len(buffer) > limit:
            yield _draw(buffer, generator)
    while buffer:
        yield _draw(buffer, generator)


def _draw(buffer: list[Row], generator: torch.Generator) -> Row:
    place = int(torch.randint(len(buffer), (), generator=generator))
    buffer[place], buffer[-1] = buffer[-1], buffer[place]
    return buffer.pop()


def _grouped(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    """Lists of `size` rows that share a grid; the rest of each grid comes last."""
    waiting: dict[Grid, list[Row]] = {}
    for row in rows:
        grid = row[0].grid
        waiting.setdefault(grid, []).append(row)
        if len(waiting[grid]) == size:
            yield waiting.pop(grid)
    yield from waiting.values()
