"""The train split as a stream of its tars: for sets that no machine holds, and tars that lie behind a URL.

Only the index and the sidecars (small JSON files) have to be in the harvest's folder. Tars are read from beginning to
end, sample by sample as the sidecars say, from whatever webdataset's `gopen` opens: files, http(s), `pipe:` commands.

    shards   permuted by (seed, epoch); each process has its share of them
    rows     drawn at random from a buffer of samples
    batches  of one grid each; the incomplete batch of each grid comes last

Bytes are compared with the checksum of their tar as they pass: a changed one ends the epoch when the end of its tar is
reached, not before.

One process sees each row once per epoch. Several see `rows // batch_size` full batches each: a process whose shards
give more skips the rest, and one whose shards give less begins them again.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset.gopen import gopen

from data.batches import BEGINNING, Batch, Start, as_batch, epoch_generator, stack_rows
from data.checks import check_entry, check_listed, damaged, unreadable_as_damage
from data.errors import DamagedShardError, DataError, SettingsError, StreamError, UnreadableFileError
from data.files import open_regular, parse_json
from data.grids import Grid, grids_of
from data.index import read_index, read_sidecar
from data.ranks import Rank
from data.records import Sidecar
from data.sample import Sample
from data.settings import ReadingSettings

_CHUNK = 1 << 20
Row = tuple[Sample, int]  # a part of a sample as stored, and the number of one of its prompts


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
        DamagedShardError: while reading, if a shard is cut or changed, or lacks samples.
        StreamError: while reading, if a tar cannot be opened or its command fails.
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
        listed = [shard for shard in read_index(directory)["shards"] if shard["split"] == "train"]
        if len(listed) < ranks:
            raise SettingsError(
                f"{directory} has {len(listed)} train shards for {ranks} processes: lower trainer.devices"
            )
        self._sidecars: dict[str, Sidecar] = {}
        rows: Counter[Grid] = Counter()
        for shard in listed:
            sidecar = self._sidecars[shard["name"]] = read_sidecar(directory, shard["name"])
            check_listed(sidecar, shard)
            for entry in sidecar["samples"]:
                for grid in grids_of(entry["grid"]):
                    rows[grid] += entry["prompts"]
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
            yield as_batch(stack_rows(rows), rows[0][0].grid, [(sample.key, sample.place) for sample, _ in rows])

    def rows(self) -> Iterator[list[Row]]:
        """The rows of each batch, before they are stacked."""
        generator = epoch_generator(self._seed, self._epoch)
        names = list(self._sidecars)
        names = self._rank.share([names[i] for i in torch.randperm(len(names), generator=generator).tolist()])
        passes = itertools.repeat(names) if self._rank.size > 1 else [names]
        rows = (row for names in passes for row in shuffled(self._read(names), self._buffer, generator))
        skip = self._start.batches if self._epoch == self._start.epoch else 0
        return itertools.islice(_grouped(rows, self._size), skip, self._length)

    def _read(self, names: list[str]) -> Iterator[Row]:
        tars = _Tars([(self._source.replace("{shard}", name), self._sidecars[name]) for name in names])
        workers = min(self._workers, len(names))
        for sample in DataLoader(tars, batch_size=None, num_workers=workers, collate_fn=_unchanged):
            for place in range(len(sample.grids)):
                part = sample.part(place)
                yield from ((part, prompt) for prompt in range(len(sample.prompts)))


class _Tars(IterableDataset[Sample]):
    """Samples of (URL, sidecar) pairs, divided among the workers of a loader.

    The sidecar says where each sample begins and how long it is, so that a missing one is noticed.
    """

    def __init__(self, shards: Sequence[tuple[str, Sidecar]]) -> None:
        self._shards = shards

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        own = self._shards[worker.id :: worker.num_workers] if worker else self._shards
        for url, sidecar in own:
            with _opened(url, sidecar["shard"]) as stream:
                yield from _samples(_Checked(stream, sidecar), sidecar)


@contextlib.contextmanager
def _opened(url: str, name: str) -> Iterator[Any]:
    """A tar behind a path, a URL or a command; whatever goes wrong in reading it is a DataError."""
    stream: Any = None
    try:
        local = not url.startswith("pipe:") and "://" not in url
        stream = open_regular(url) if local else gopen(url, "rb")
        yield stream
    except BaseException as error:
        with contextlib.suppress(OSError):  # a command whose output is not read to its end fails too
            if stream is not None:
                stream.close()
        if isinstance(error, UnreadableFileError):
            raise damaged(name, error, url) from error
        if isinstance(error, DataError) or not isinstance(error, OSError | ValueError):
            raise
        raise _stream_error(name, url, error) from error
    try:
        stream.close()
    except OSError as error:
        raise _stream_error(name, url, error) from error


def _stream_error(name: str, url: str, error: BaseException) -> StreamError:
    return StreamError(f"shard {name}: {url} cannot be read: {error}. See trainer.stream_from.")


class _Checked:
    """Reads a tar in pieces, as long as its sidecar says, and compares its checksum at the end."""

    def __init__(self, stream: Any, sidecar: Sidecar) -> None:
        self._stream = stream
        self._sidecar = sidecar
        self._digest = hashlib.sha256()
        self.place = 0

    def read(self, size: int) -> bytes:
        """So many bytes, fewer at the end; a stream that is shorter than it should be costs no more than it has."""
        pieces = []
        while size > 0 and (piece := self._stream.read(min(size, _CHUNK))):
            pieces.append(piece)
            self._digest.update(piece)
            size -= len(piece)
            self.place += len(piece)
        return b"".join(pieces)

    def finish(self) -> None:
        """Reads the rest.

        Raises:
            DamagedShardError: it is not the tar that the sidecar describes.
        """
        while self.place < self._sidecar["bytes"] and self.read(min(_CHUNK, self._sidecar["bytes"] - self.place)):
            pass
        if self._stream.read(1) or self._digest.hexdigest() != self._sidecar["sha256"]:
            raise DamagedShardError(self._sidecar["shard"], "the checksum of its stream is wrong: bytes have changed")


def _samples(tar: _Checked, sidecar: Sidecar) -> Iterator[Sample]:
    name = sidecar["shard"]
    for entry in sidecar["samples"]:
        members = {}
        for ending, (offset, size) in (("json", entry["json"]), ("safetensors", entry["safetensors"])):  # as written
            tar.read(offset - tar.place)
            members[ending] = tar.read(size)
            if tar.place < offset + size:
                raise DamagedShardError(name, f"its stream ends in sample {entry['key']}")
        with unreadable_as_damage(name, entry["key"]):
            facts = parse_json(members["json"], constants=True)
            try:
                tensors = safetensors.torch.load(members["safetensors"])
            except SafetensorError as error:
                raise ValueError(str(error)) from error
            sample = Sample.from_members(facts, tensors)
            check_entry(sample, entry)
        yield sample
    tar.finish()


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
