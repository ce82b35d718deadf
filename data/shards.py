"""Shards: ordinary webdataset tars of about 50 samples (`data.sample`), their writer and their reader.

Beside `train-00000.tar` lies `train-00000.json`, its sidecar (`data.index`): byte offsets, counts, the checksum of
the tar, and the images that were skipped. It is written last, so a shard with a sidecar is whole. Readers go through
the offsets into a memory map: no copies, no scan, any order.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

import safetensors.torch
import torch
from torch import Tensor
from webdataset.writer import TarWriter

from data.checks import check_entry, check_listed, check_once, damaged, unreadable_as_damage
from data.errors import DamagedShardError, SettingsError, UnreadableFileError
from data.files import is_count, open_regular, parse_json
from data.grids import Grid, grids_of, grids_record
from data.index import (
    FORMAT_VERSION,
    canonical_json,
    changing,
    check_shard,
    read_index,
    remove_leftovers,
    write_sidecar,
)
from data.records import Entry, Sidecar, SkippedImage, rows_of
from data.sample import TAR_BLOCK, Sample
from scr_runtime.files import replace_file, temporary_path

_HEADER_BYTES = 1 << 16  # of a sample's safetensors member: it lists four tensors
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "I8": torch.int8}  # of safetensors


class _HashingStream:
    """Write-only stream that checksums what passes."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        self.size += len(content)
        return self._stream.write(content)


class ShardWriter:
    """Writes one shard; nothing under its name exists before all of it does.

        with ShardWriter(directory, "train-00000", settings_digest) as writer:
            writer.write(sample)

    The tar grows under a temporary name. Leaving the block normally syncs it, renames it, and writes the sidecar;
    leaving it through an exception removes it. Equal samples give equal bytes (mtime is 0). Of two processes that
    finish the same shard at once, one comes after the other: tar and sidecar belong together.

    Args:
        directory: folder of the shard.
        name: shard name without ending.
        settings_digest: identity of the settings that the samples were made with.
        provenance: how they were made, beyond the settings (library versions, device), for the sidecar.
        keep: leave a whole shard of these settings as it is, if another process has put one there meanwhile.

    Attributes:
        skipped: images that could not be used, for the sidecar.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        settings_digest: str,
        provenance: Mapping[str, Any] | None = None,
        *,
        keep: bool = False,
    ) -> None:
        self.directory = directory
        self.name = name
        self.skipped: list[SkippedImage] = []
        self._settings_digest = settings_digest
        self._provenance = dict(provenance or {})
        self._keep = keep
        self._entries: list[Entry] = []

    def __enter__(self) -> ShardWriter:
        remove_leftovers(self.directory, self.name)
        self._temporary = temporary_path(self.directory / f"{self.name}.tar")
        self._file = self._temporary.open("wb")
        self._stream = _HashingStream(self._file)
        self._tar = TarWriter(cast(BinaryIO, self._stream), encoder=False, mtime=0)
        return self

    def write(self, sample: Sample) -> None:
        """Appends a sample.

        Raises:
            ValueError: the sample's fields contradict each other.
        """
        sample.check()
        members = {"json": canonical_json(sample.facts()), "safetensors": safetensors.torch.save(sample.tensors())}
        places: dict[str, list[int]] = {}
        position = self._tar.tarstream.offset
        for ending in sorted(members):  # the order in which TarWriter writes them
            position += TAR_BLOCK  # USTAR header
            places[ending] = [position, len(members[ending])]
            position += math.ceil(len(members[ending]) / TAR_BLOCK) * TAR_BLOCK
        self._tar.write({"__key__": sample.key, **members})
        if self._tar.tarstream.offset != position:
            raise RuntimeError(f"{self.name}: the tar stands at {self._tar.tarstream.offset}, not {position}")
        self._entries.append(
            {
                "key": sample.key,
                "grid": grids_record(sample.grids),
                "prompts": len(sample.prompts),
                "json": places["json"],
                "safetensors": places["safetensors"],
            }
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._tar.close()
                self._file.close()
                with changing(self.directory):
                    self._put_in_place()
        finally:
            with contextlib.suppress(OSError, ValueError):  # after an exception, which reports a full disk
                self._tar.close()
            with contextlib.suppress(OSError):
                self._file.close()
            self._temporary.unlink(missing_ok=True)

    def _put_in_place(self) -> None:
        if self._keep:
            with contextlib.suppress(DamagedShardError):
                check_shard(self.directory, self.name, settings_digest=self._settings_digest)
                return
        (self.directory / f"{self.name}.json").unlink(missing_ok=True)  # it belongs to the tar that goes
        replace_file(self._temporary, self.directory / f"{self.name}.tar")
        write_sidecar(self.directory, self._sidecar())

    def _sidecar(self) -> Sidecar:
        return {
            "format_version": FORMAT_VERSION,
            "shard": self.name,
            "settings": self._settings_digest,
            "provenance": self._provenance,
            "bytes": self._stream.size,
            "sha256": self._stream.digest.hexdigest(),
            "rows": sum(map(rows_of, self._entries)),
            "samples": self._entries,
            "skipped": self.skipped,
        }


class ShardReader:
    """Map-style access to one split of a finished harvest: `reader[i]` is the i-th `Sample`, decoded.

    Tensors are views of a private memory map, and writing to them does not reach the file. States of int8 are the
    exception: they come as a float32 copy, and as a view from `stored`. When a sample of a shard is first asked for,
    every byte of its tar is compared with the checksum, unless this process has compared it before. A reader can be
    pickled and forked; each process opens its own maps.

    Args:
        directory: folder of the harvest.
        split: train, validation or test.

    Attributes:
        index: the harvest's `index.json`.
        keys: sample keys, in order.
        grids: patch grids (rows, columns) per sample.
        prompts: prompts per sample.
        nbytes: bytes of the split's tars.

    Raises:
        UnfinishedHarvestError: no index.
        DamagedShardError: a shard is missing, its size is wrong, or it is not the one that the index lists; from
            then on, when a sample is read: bytes of its shard have changed.
        SettingsError: no such split.
    """

    def __init__(self, directory: str | Path, split: str) -> None:
        self.directory = Path(directory)
        self.index = read_index(self.directory)
        known = sorted({shard["split"] for shard in self.index["shards"]})
        if split not in known:
            raise SettingsError(f"{self.directory} has no split {split!r}: it has {', '.join(known) or 'no shards'}")
        self.names: list[str] = []
        self._sidecars: list[Sidecar] = []
        self._entries: list[tuple[int, Entry]] = []  # number of the shard, place in it
        self.nbytes = 0
        for listed in self.index["shards"]:
            if listed["split"] == split:
                sidecar = check_shard(self.directory, listed["name"], full=False)
                check_listed(sidecar, listed)
                self._entries += [(len(self.names), entry) for entry in sidecar["samples"]]
                self.names.append(listed["name"])
                self._sidecars.append({**sidecar, "samples": []})
                self.nbytes += sidecar["bytes"]
        self.keys: list[str] = [entry["key"] for _, entry in self._entries]
        self.grids: list[tuple[Grid, ...]] = [grids_of(entry["grid"]) for _, entry in self._entries]
        self.prompts: list[int] = [entry["prompts"] for _, entry in self._entries]
        self._maps: dict[int, mmap.mmap] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Sample]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Sample:
        return self.stored(number).decoded()

    def stored(self, number: int) -> Sample:
        """The i-th sample as it lies on the disk.

        Raises:
            DamagedShardError: bytes of its shard have changed after it was written.
        """
        shard, entry = self._entries[number]
        buffer = self._map(shard)
        offset, size = entry["json"]
        with unreadable_as_damage(self.names[shard], entry["key"]):
            facts = parse_json(buffer[offset : offset + size], constants=True)
            sample = Sample.from_members(facts, _tensors_at(buffer, *entry["safetensors"]))
            check_entry(sample, entry)
            return sample

    def _map(self, shard: int) -> mmap.mmap:
        if shard not in self._maps:
            name = self.names[shard]
            try:
                with open_regular(self.directory / f"{name}.tar") as stream:
                    check_once(stream, self._sidecars[shard])
                    # private (copy on write): torch wants a writable buffer, and the file has to stay as it is
                    self._maps[shard] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
            except UnreadableFileError as error:
                raise damaged(name, error, f"{name}.tar") from error
        return self._maps[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}


def _tensors_at(buffer: mmap.mmap, offset: int, size: int) -> dict[str, Tensor]:
    """Tensors of a safetensors blob inside a larger buffer, without copying them."""
    header_size = int.from_bytes(buffer[offset : offset + 8], "little")
    if header_size > min(size - 8, _HEADER_BYTES):
        raise ValueError(f"the safetensors header claims {header_size:,} bytes")
    header = parse_json(buffer[offset + 8 : offset + 8 + header_size])
    start = offset + 8 + header_size
    tensors = {}
    for name, facts in header.items():
        if name == "__metadata__":
            continue
        dtype, shape = _DTYPES[facts["dtype"]], facts["shape"]
        first, last = facts["data_offsets"]
        if not all(is_count(number) for number in (*shape, first, last)):
            raise ValueError(f"{name} has shape {shape} at {first} to {last}")
        count = math.prod(shape)
        if last - first != count * dtype.itemsize or start + last > offset + size:
            raise ValueError(f"{name} of shape {shape} does not fill the bytes {first} to {last} of the member")
        flat = torch.frombuffer(buffer, dtype=dtype, count=count, offset=start + first)
        tensors[name] = flat.view(shape)
    return tensors
