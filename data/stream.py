"""The train split as a stream of its tars: for sets that no machine holds, and tars that lie behind a URL.

Only the index and the sidecars (small JSON files) have to be in the harvest's folder. Tars are read from beginning to
end, sample by sample as the sidecars say, from whatever webdataset's `gopen` opens: files, http(s), `pipe:` commands.

    shards   permuted by (seed, epoch); each process has its share of them
    rows     drawn at random from a buffer of samples
    batches  of one grid each; what is left of each grid comes last

One process sees each row once per epoch. Several see `rows // batch_size` full batches each: a process whose shards
give more leaves the rest out, and one whose shards give less begins them again.
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

from data.errors import DamagedShardError
from data.shards import Sample, read_index, read_sidecar

_CHUNK = 1 << 20
Row = tuple[Sample, int]  # a sample as stored, and the number of one of its prompts


class StreamedRows:
    """Shuffled batches of the train split, as lists of (sample, number of its prompt) on one grid.

    The order depends on seed, epoch, buffer and the number of processes alone.

    Args:
        directory: folder with the harvest's index and the sidecars.
        batch_size: rows per batch, of all processes together.
        seed: of the order.
        buffer: samples among which the next row is drawn.
        source: where tars are, with `{shard}` for a shard's name; None: in the directory.
        num_workers: processes that read tars.
        rank: this process's number.
        ranks: processes of the fit.
        start: epoch to begin with, and how many of its batches to leave out; they are read all the same.

    Raises:
        ValueError: fewer shards than processes.
        DamagedShardError: while reading, if a shard is cut or lacks samples.
    """

    def __init__(
        self,
        directory: Path,
        batch_size: int,
        seed: int = 0,
        buffer: int = 256,
        source: str | None = None,
        num_workers: int = 0,
        rank: int = 0,
        ranks: int = 1,
        start: tuple[int, int] = (0, 0),
    ) -> None:
        names = [shard["name"] for shard in read_index(directory)["shards"] if shard["split"] == "train"]
        if len(names) < ranks:
            raise ValueError(f"{directory} has {len(names)} train shards for {ranks} processes: lower trainer.devices")
        self._entries: dict[str, list[dict[str, Any]]] = {}
        rows: Counter[tuple[int, int]] = Counter()
        for name in names:
            self._entries[name] = read_sidecar(directory, name)["samples"]
            for entry in self._entries[name]:
                rows[entry["grid"][0], entry["grid"][1]] += entry["prompts"]
        self._source = source or f"{directory}/{{shard}}.tar"
        self._size = -(-batch_size // ranks)
        self._seed, self._buffer, self._workers = seed, buffer, num_workers
        self._rank, self._ranks = rank, ranks
        self._start = start
        self._epoch = start[0]
        whole = sum(-(-count // batch_size) for count in rows.values())
        self._length = whole if ranks == 1 else max(rows.total() // batch_size, 1)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next iteration."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[list[Row]]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        names = list(self._entries)
        names = [names[i] for i in torch.randperm(len(names), generator=generator).tolist()][self._rank :: self._ranks]
        passes = itertools.repeat(names) if self._ranks > 1 else [names]
        rows = (row for names in passes for row in shuffled(self._rows(names), self._buffer, generator))
        skip = self._start[1] if self._epoch == self._start[0] else 0
        return itertools.islice(_batches(rows, self._size), skip, self._length)

    def _rows(self, names: list[str]) -> Iterator[Row]:
        tars = _Tars([(name, self._source.replace("{shard}", name), self._entries[name]) for name in names])
        workers = min(self._workers, len(names))
        for sample in DataLoader(tars, batch_size=None, num_workers=workers, collate_fn=_as_it_is):
            yield from ((sample, prompt) for prompt in range(len(sample.prompts)))


class _Tars(IterableDataset[Sample]):
    """Samples of (shard, URL, entries of its sidecar) triples, divided among the workers of a loader.

    The sidecar says where each sample begins and how long it is, so that nothing can be missing unnoticed.
    """

    def __init__(self, shards: Sequence[tuple[str, str, list[dict[str, Any]]]]) -> None:
        self._shards = shards

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        own = self._shards[worker.id :: worker.num_workers] if worker else self._shards
        for name, url, entries in own:
            stream = gopen(url, "rb")
            try:
                yield from _samples(name, stream, entries)
            except BaseException:
                with contextlib.suppress(OSError):  # a command that is not heard to its end fails too
                    stream.close()
                raise
            stream.close()


def _samples(name: str, stream: Any, entries: list[dict[str, Any]]) -> Iterator[Sample]:
    place = 0
    for entry in entries:
        members = {}
        for ending in ("json", "safetensors"):  # the order in which they were written
            offset, size = entry[ending]
            before = stream.read(offset - place)
            members[ending] = stream.read(size)
            if len(before) < offset - place or len(members[ending]) < size:
                raise DamagedShardError(name, f"its stream ends in sample {entry['key']}")
            place = offset + size
        try:
            tensors = safetensors.torch.load(members["safetensors"])
            facts = json.loads(members["json"])
            sample = Sample(**tensors, **{**facts, "grid": (facts["grid"][0], facts["grid"][1])})
        except (ValueError, TypeError, KeyError, SafetensorError) as error:
            raise DamagedShardError(name, f"sample {entry['key']} is unreadable ({error})") from error
        yield sample
    while stream.read(_CHUNK):
        pass


def _as_it_is(sample: Any) -> Any:
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


def _batches(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    waiting: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        grid = row[0].grid
        waiting.setdefault(grid, []).append(row)
        if len(waiting[grid]) == size:
            yield waiting.pop(grid)
    yield from waiting.values()
