"""Shards: states and attention maps at rest. The sample's fields, its writer, its reader and its checks.

A shard is an ordinary webdataset tar of about 50 samples. A sample is one image: two members, keyed by the image id,

    000000000042.safetensors    states     [N, d]  float16 | bfloat16 | float32 | int8: output of block 0 (or of the
                                                   state layer that harvest.json names), per image
                                scales     [N]     float32, only beside int8: a state is its integers times its scale
                                attention  [P, N]  float32, one map per prompt, as captured (not normalised)
                                question   [P, d]  dtype of the states (float32 beside int8), pooled states of the
                                                   prompt's text
    000000000042.json           image_id, file, grid [rows, columns], prompts [P], entropy [P] (nats)

Beside `train-00000.tar` lies `train-00000.json`, its sidecar: byte offsets, counts, the checksum of the tar, and the
images that had to be skipped. It is written last, so a shard with a sidecar is whole. Once all shards are there,
`manifest.json` lists the image ids of each split and the skipped images, and `index.json` all shards; `harvest.json`
has held the settings since the harvest began. Readers go through the offsets into a memory map: no copies, no scan,
any order.

    python -m data.shards verify DIR      checks every byte
    python -m data.shards show DIR        prints a summary and writes a contact sheet of maps over images
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import mmap
import os
import re
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm
from webdataset.writer import TarWriter

from data.errors import DamagedShardError, DataError, UnfinishedHarvestError

FORMAT_VERSION = 1
INDEX = "index.json"
MANIFEST = "manifest.json"
SETTINGS = "harvest.json"
SPLITS = ("train", "validation", "test")
STATES_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "int8": torch.int8,
}
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "I8": torch.int8}
_TAR_BLOCK = 512
_FOREIGN_LEFTOVER_SECONDS = 3600  # a temporary file of another machine that has not grown for this long is given up


@dataclass(frozen=True, eq=False)
class Sample:
    """One image: its states, and one attention map per prompt.

    Attributes:
        image_id: COCO image id.
        file: file name of the image, relative to the images folder.
        states: output of the state layer at the visual tokens. [N, d], fp16 | bf16 | fp32 | int8
        attention: attention from text to patches under each prompt, mean over text rows, heads and layers, not
            normalised. [P, N], fp32
        question: pooled states of each prompt's text. [P, d], dtype of the states, fp32 beside int8
        grid: rows and columns of patches; rows * columns = N.
        prompts: what each map was taken under: dicts with text, label, category, strategy. P of them
        entropy: credit entropy of the states under each prompt, in nats (eq. 2 of arXiv 2602.22469). P values
        scales: what each token's int8 states are to be multiplied with; None for other dtypes. [N], fp32
    """

    image_id: int
    file: str
    states: Tensor
    attention: Tensor
    question: Tensor
    grid: tuple[int, int]
    prompts: Sequence[Mapping[str, Any]]
    entropy: Sequence[float]
    scales: Tensor | None = None

    def decoded(self) -> Sample:
        """The sample as it is used: int8 states become float32, all others stay."""
        if self.scales is None:
            return self
        return replace(self, states=self.states * self.scales[:, None], scales=None)

    @property
    def key(self) -> str:
        """Name of the sample in the tar; without dots, which would end a webdataset key."""
        return f"{self.image_id:012d}"

    def check(self) -> None:
        """Raises ValueError when shapes, dtypes and counts do not belong together."""
        tokens, width = self.states.shape
        prompts = len(self.prompts)
        expected = {"attention": (prompts, tokens), "question": (prompts, width)}
        wrong = [
            f"{name} is {tuple(getattr(self, name).shape)}, expected {shape}"
            for name, shape in expected.items()
            if tuple(getattr(self, name).shape) != shape
        ]
        if self.grid[0] * self.grid[1] != tokens:
            wrong.append(f"grid {self.grid} has {self.grid[0] * self.grid[1]} patches, states have {tokens}")
        if len(self.entropy) != prompts:
            wrong.append(f"{len(self.entropy)} entropies for {prompts} prompts")
        if self.states.dtype not in _DTYPES.values() or self.question.dtype != question_dtype(self.states.dtype):
            wrong.append(f"states are {self.states.dtype}, question {self.question.dtype}")
        scales = None if self.scales is None else (self.scales.dtype, *self.scales.shape)
        if scales != ((torch.float32, tokens) if self.states.dtype == torch.int8 else None):
            wrong.append(f"scales of {self.states.dtype} states are {scales}")
        if self.attention.dtype != torch.float32:
            wrong.append(f"attention is {self.attention.dtype}, expected torch.float32")
        if wrong:
            raise ValueError(f"sample {self.key}: {'; '.join(wrong)}")


def sample_bytes(tokens: int, width: int, prompts: int, states_dtype: torch.dtype) -> int:
    """Bytes of one sample in a tar, by arithmetic: tensors, headers and padding, and 400 bytes of text per prompt."""
    tensors = tokens * width * states_dtype.itemsize + tokens * 4 * (states_dtype == torch.int8)
    tensors += prompts * (tokens * 4 + width * question_dtype(states_dtype).itemsize)
    return tensors + 400 * prompts + 8 * _TAR_BLOCK


def question_dtype(states_dtype: torch.dtype) -> torch.dtype:
    """What questions are stored as beside states of a dtype."""
    return torch.float32 if states_dtype == torch.int8 else states_dtype


def quantise(states: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds states to int8 with one scale per token, so that a token's largest entry becomes 127.

    Args:
        states: [N, d], any floating-point dtype.

    Returns:
        [N, d] int8, and [N] float32 scales.
    """
    wide = states.float()
    scales = (wide.abs().amax(-1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return (wide / scales[:, None]).round().to(torch.int8), scales


def shard_name(split: str, number: int) -> str:
    """Name of a shard without its ending."""
    return f"{split}-{number:05d}"


def canonical_json(value: Any) -> bytes:
    """The one way a value is written as JSON where bytes count."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def planned_shards(splits: Mapping[str, int], shard_size: int) -> dict[str, list[str]]:
    """Names of the shards per split, in order, of `splits` images in shards of `shard_size`."""
    return {split: [shard_name(split, n) for n in range(-(-size // shard_size))] for split, size in splits.items()}


# ------------------------------------------------------------------------------------------------ writing


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that at any moment either the old or the whole new content is there."""
    temporary = temporary_of(path)
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def create_atomically(path: Path, content: bytes) -> bool:
    """Writes a file unless there is one; of several processes that try at once, one succeeds.

    Returns:
        Whether it was this call that made the file.
    """
    if path.exists():  # also where there is no room for a temporary file
        return False
    temporary = temporary_of(path)
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        try:
            os.link(temporary, path)  # fails where something is, unlike a rename
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)
    return True


def temporary_of(path: Path) -> Path:
    """Where a file grows until it is whole; killed writers' ones are found by `remove_leftovers`."""
    # machine and process: on a shared file system, process numbers repeat
    return path.with_name(f"{path.name}.tmp.{socket.gethostname()}.{os.getpid()}")


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

        with ShardWriter(directory, "train-00000", fingerprint) as writer:
            writer.write(sample)

    The tar grows as `train-00000.tar.tmp.<machine>.<pid>`. Leaving the block normally syncs it, renames it, and writes
    the sidecar; leaving it through an exception removes it. Equal samples give equal bytes (mtime is 0).

    Args:
        directory: where the shard goes.
        name: shard name without ending.
        settings_fingerprint: identity of the settings that the samples were made with.
        provenance: how they come about, beyond the settings (library versions, device), for the sidecar.

    Attributes:
        skipped: images that could not be used: dicts with image_id, file and reason, for the sidecar.
    """

    def __init__(
        self, directory: Path, name: str, settings_fingerprint: str, provenance: Mapping[str, Any] | None = None
    ) -> None:
        self.directory = directory
        self.name = name
        self.skipped: list[dict[str, Any]] = []
        self._fingerprint = settings_fingerprint
        self._provenance = dict(provenance or {})
        self._samples: list[dict[str, Any]] = []
        self._target = directory / f"{name}.tar"
        self._temporary = temporary_of(self._target)

    def __enter__(self) -> ShardWriter:
        remove_leftovers(self.directory, self.name)
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
        facts = {
            "image_id": sample.image_id,
            "file": sample.file,
            "grid": list(sample.grid),
            "prompts": [dict(prompt) for prompt in sample.prompts],
            "entropy": list(sample.entropy),
        }
        tensors = {"states": sample.states, "attention": sample.attention, "question": sample.question}
        if sample.scales is not None:
            tensors["scales"] = sample.scales
        members = {
            "json": canonical_json(facts),
            "safetensors": safetensors.torch.save({name: t.contiguous() for name, t in tensors.items()}),
        }
        entry: dict[str, Any] = {"key": sample.key, "grid": list(sample.grid), "prompts": len(sample.prompts)}
        position = self._tar.tarstream.offset
        for ending in sorted(members):  # the order in which TarWriter writes them
            position += _TAR_BLOCK  # USTAR header
            entry[ending] = [position, len(members[ending])]
            position += math.ceil(len(members[ending]) / _TAR_BLOCK) * _TAR_BLOCK
        self._tar.write({"__key__": sample.key, **members})
        if self._tar.tarstream.offset != position:
            raise RuntimeError(f"{self.name}: the tar stands at {self._tar.tarstream.offset}, not {position}")
        self._samples.append(entry)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._tar.close()
                self._file.flush()
                os.fsync(self._file.fileno())
                os.replace(self._temporary, self._target)
                _sync_folder(self.directory)
        finally:
            with contextlib.suppress(OSError):  # a full disk fails once more here; what was written is given up
                self._tar.close()
            with contextlib.suppress(OSError):
                self._file.close()
            self._temporary.unlink(missing_ok=True)
        if kind is None:
            self._write_sidecar()

    def _write_sidecar(self) -> None:
        record = {
            "format_version": FORMAT_VERSION,
            "shard": self.name,
            "settings": self._fingerprint,
            "provenance": self._provenance,
            "bytes": self._stream.size,
            "sha256": self._stream.digest.hexdigest(),
            "rows": sum(entry["prompts"] for entry in self._samples),
            "samples": self._samples,
            "skipped": self.skipped,
        }
        write_atomically(self.directory / f"{self.name}.json", _seal(record))


def write_index(
    directory: Path,
    splits: Mapping[str, Sequence[str]],
    settings: Mapping[str, Any],
    provenance: Mapping[str, Any],
    set_aside: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Any]:
    """Declares a folder finished, all of whose shards are whole: writes what `build_index` makes of its sidecars.

    Whichever process writes manifest and index, the bytes are the same, and each file appears at once or not at all.
    The index is returned.
    """
    sidecars = {name: check_shard(directory, name, full=False) for names in splits.values() for name in names}
    manifest, index = build_index(sidecars, splits, settings, provenance, set_aside)
    write_index_files(directory, manifest, index)
    return index


def write_index_files(directory: Path, manifest: bytes, index: Mapping[str, Any]) -> None:
    """Writes what `build_index` returns: the manifest, then the index."""
    write_atomically(directory / MANIFEST, manifest)
    write_atomically(directory / INDEX, index_bytes(index))


def build_index(
    sidecars: Mapping[str, Mapping[str, Any]],
    splits: Mapping[str, Sequence[str]],
    settings: Mapping[str, Any],
    provenance: Mapping[str, Any],
    set_aside: Mapping[str, Sequence[int]] | None = None,
) -> tuple[bytes, dict[str, Any]]:
    """What declares a harvest finished: the manifest of its images, and all shards with their checksums.

    Args:
        sidecars: of all shards, by name.
        splits: shard names per split, in order.
        settings: what determines the samples.
        provenance: how they came about, without influence on what they mean (paths, the edit's settings). What the
            sidecars say is added (versions, device); where shards differ in it, as `{"mixed": [values]}`.
        set_aside: image ids that belong to no shard, and are to be used for nothing that the shards' images are.

    Returns:
        The bytes of `manifest.json`, and the index. Its `fingerprint` is a checksum over all shards' checksums.
    """
    listed = []
    skipped = []
    ids: dict[str, list[int]] = {}
    made_by: dict[str, dict[bytes, Any]] = {}
    for split, names in splits.items():
        ids[split] = []
        for name in names:
            sidecar = sidecars[name]
            counts = {key: sidecar[key] for key in ("rows", "bytes", "sha256")}
            listed.append({"name": name, "split": split, "samples": len(sidecar["samples"]), **counts})
            skipped += [{**bad, "split": split, "shard": name} for bad in sidecar["skipped"]]
            ids[split] += [int(entry["key"]) for entry in sidecar["samples"]]
            for key, value in sidecar.get("provenance", {}).items():
                made_by.setdefault(key, {})[canonical_json(value)] = value
    manifest = canonical_json({"format_version": FORMAT_VERSION, "splits": ids, "skipped": skipped})
    both = {
        key: next(iter(values.values())) if len(values) == 1 else {"mixed": [values[k] for k in sorted(values)]}
        for key, values in made_by.items()
    }
    index = {
        "format_version": FORMAT_VERSION,
        "fingerprint": hashlib.sha256(canonical_json([[s["name"], s["sha256"]] for s in listed])).hexdigest(),
        "settings": settings,
        "provenance": {**provenance, **both},
        "manifest_sha256": hashlib.sha256(manifest).hexdigest(),
        "skipped": skipped,
        "set_aside": {name: list(kept) for name, kept in (set_aside or {}).items()},
        "shards": listed,
    }
    index["checksum"] = hashlib.sha256(canonical_json(index)).hexdigest()
    return manifest, index


def index_bytes(index: Mapping[str, Any]) -> bytes:
    """An index as it is written."""
    return json.dumps(index, indent=1, sort_keys=True, ensure_ascii=False).encode()


def remove_all(directory: Path) -> None:
    """Removes index, manifest, shards and sidecars of a folder, and nothing else; the index first."""
    (directory / INDEX).unlink(missing_ok=True)
    (directory / MANIFEST).unlink(missing_ok=True)
    for split in SPLITS:
        for file in directory.glob(f"{split}-*"):
            if re.fullmatch(rf"{split}-\d{{5,}}\.(tar|json)(\.tmp\..*)?", file.name):
                file.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    # a rename is on the disk once its folder is
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(directory: Path, name: str | None = None) -> None:
    """Removes what killed writers left behind, of one shard or of the whole folder; files of living writers stay.

    Whether a writer on another machine lives can't be seen: its file goes when it has not grown for an hour.
    """
    shard = rf"({'|'.join(SPLITS)})-\d+\.(tar|json)"
    for leftover in directory.glob(f"{name}.*.tmp.*" if name else "*.tmp.*"):
        target, _, writer = leftover.name.partition(".tmp.")
        if target not in (INDEX, MANIFEST, SETTINGS) and not re.fullmatch(shard, target):
            continue
        machine, _, process = writer.rpartition(".")
        with contextlib.suppress(FileNotFoundError):
            if machine == socket.gethostname() and process.isdigit():
                dead = int(process) == os.getpid() or not _is_alive(int(process))
            else:
                dead = time.time() - leftover.stat().st_mtime > _FOREIGN_LEFTOVER_SECONDS
            if dead:
                leftover.unlink()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


# ------------------------------------------------------------------------------------------------ checking


def _seal(record: dict[str, Any]) -> bytes:
    """JSON of a record with a checksum over itself."""
    return canonical_json({**record, "checksum": hashlib.sha256(canonical_json(record)).hexdigest()})


def read_sidecar(directory: Path, name: str) -> dict[str, Any]:
    """Reads and checks the sidecar of a shard.

    Raises:
        DamagedShardError: it is missing, unreadable, changed, or of another format version.
    """
    try:
        content = (directory / f"{name}.json").read_bytes()
    except FileNotFoundError:
        raise DamagedShardError(name, f"its sidecar {name}.json is missing") from None
    return parse_sidecar(name, content)


def parse_sidecar(name: str, content: bytes) -> dict[str, Any]:
    """`read_sidecar` of bytes."""
    try:
        record = json.loads(content)
        checksum = record.pop("checksum")
        version = record["format_version"]
        intact = checksum == hashlib.sha256(canonical_json(record)).hexdigest()
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DamagedShardError(name, f"its sidecar {name}.json is unreadable ({error})") from error
    if version != FORMAT_VERSION:
        raise DamagedShardError(name, f"it has format version {version}, this release reads {FORMAT_VERSION}")
    if not intact:
        raise DamagedShardError(name, f"its sidecar {name}.json was changed after it was written")
    return record


def check_shard(
    directory: Path, name: str, *, full: bool = True, settings_fingerprint: str | None = None
) -> dict[str, Any]:
    """Checks a shard against its sidecar.

    Args:
        directory: folder of the shard.
        name: shard name without ending.
        full: read every byte and compare checksums; otherwise compare sizes only, which finds a cut shard but not a
            flipped byte.
        settings_fingerprint: settings that the shard has to be made with.

    Returns:
        The sidecar.

    Raises:
        DamagedShardError: says what is wrong, and how to repair it.
    """
    sidecar = read_sidecar(directory, name)
    if settings_fingerprint is not None and sidecar["settings"] != settings_fingerprint:
        raise DamagedShardError(name, "it was made with other settings")
    file = directory / f"{name}.tar"
    try:
        size = file.stat().st_size
    except FileNotFoundError:
        raise DamagedShardError(name, f"{file.name} is missing") from None
    if size != sidecar["bytes"]:
        expected = f"{sidecar['bytes']:,}"
        raise DamagedShardError(
            name, f"{file.name} has {size:,} bytes instead of {expected}: it was cut or overwritten"
        )
    if full:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != sidecar["sha256"]:
            raise DamagedShardError(name, f"the checksum of {file.name} is wrong: bytes changed after it was written")
    return sidecar


def read_index(directory: Path) -> dict[str, Any]:
    """Reads `index.json` of a finished harvest.

    Raises:
        UnfinishedHarvestError: there is none; it names the shards that are missing, if the harvest was begun.
        DataError: it is unreadable, changed, or of another format version.
    """
    directory = Path(directory)
    file = directory / INDEX
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise _unfinished(directory) from None
    return parse_index(file, content)


def parse_index(file: object, content: bytes) -> dict[str, Any]:
    """`read_index` of bytes; `file` is its name in messages."""
    way_out = "Remove it and run the harvest again: shards are kept."
    try:
        index = json.loads(content)
        version = index.get("format_version")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{file} is unreadable ({error}). {way_out}") from error
    if version != FORMAT_VERSION:
        raise DataError(
            f"{file} has format version {version}, this release reads {FORMAT_VERSION}: harvest "
            "again into another folder, or use the release that wrote it."
        )
    rest = {key: value for key, value in index.items() if key != "checksum"}
    if index.get("checksum") != hashlib.sha256(canonical_json(rest)).hexdigest():
        raise DataError(f"{file} was changed after it was written. {way_out}")
    return index


def _unfinished(directory: Path) -> UnfinishedHarvestError:
    try:
        settings = json.loads((directory / SETTINGS).read_bytes())
        planned = planned_shards(settings["splits"], settings["shard_size"])
    except (OSError, ValueError, KeyError, TypeError):
        state = ""  # no harvest was begun here
    else:
        names = [name for split in planned.values() for name in split]
        missing = missing_shards(directory, names)
        state = (
            f"{len(missing):,} of {len(names):,} shards are missing: {few(missing)}. "
            if missing
            else f"All {len(names):,} shards are there, but nobody has listed them yet. "
        )
    return UnfinishedHarvestError(
        f"{directory} holds no finished harvest ({INDEX} is missing). {state}Run `python -m data.harvest` with the "
        "settings of this folder: what is already there is kept."
    )


def missing_shards(directory: Path, names: Sequence[str], settings_fingerprint: str | None = None) -> list[str]:
    """Those of the shards that are not there in full length, with a sidecar (of these settings)."""
    missing = []
    for name in names:
        try:
            check_shard(directory, name, full=False, settings_fingerprint=settings_fingerprint)
        except DamagedShardError:
            missing.append(name)
    return missing


def few(names: Sequence[str], most: int = 10) -> str:
    """Names in a sentence; of a long list, the first."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def damaged_shards(directory: Path) -> list[DamagedShardError]:
    """Reads every byte of a finished harvest, and returns what is wrong with it (nothing, if all is well)."""
    index = read_index(directory)
    problems = []
    seen: dict[str, str] = {}
    with tqdm(total=sum(s["bytes"] for s in index["shards"]), desc="verify", unit="B", unit_scale=True) as progress:
        for shard in index["shards"]:
            try:
                sidecar = check_shard(directory, shard["name"])
                if sidecar["sha256"] != shard["sha256"]:
                    raise DamagedShardError(shard["name"], f"it is not the shard that {INDEX} lists")
                for entry in sidecar["samples"]:
                    if entry["key"] in seen:
                        raise DamagedShardError(shard["name"], f"{entry['key']} is in {seen[entry['key']]} already")
                    seen[entry["key"]] = shard["name"]
            except DamagedShardError as error:
                problems.append(error)
            progress.update(shard["bytes"])
    return problems


def manifest_is_whole(directory: Path, index: Mapping[str, Any]) -> bool:
    """Tells whether `manifest.json` is the one that was written with this index."""
    try:
        return hashlib.sha256((directory / MANIFEST).read_bytes()).hexdigest() == index["manifest_sha256"]
    except FileNotFoundError:
        return False


# ------------------------------------------------------------------------------------------------ reading


class ShardReader:
    """Map-style access to one split of a finished harvest: `reader[i]` is the i-th `Sample`, decoded.

    Tensors are views of a private memory map: nothing is read before it is touched, and writing to them does not reach
    the file. States of int8 are the exception: they come as a float32 copy, and as a view from `stored`. A reader can
    be pickled and forked; each process opens its own maps.

    Args:
        directory: folder of the harvest.
        split: train, validation or test.

    Attributes:
        index: the harvest's `index.json`.
        keys: sample keys, in order.
        grids: patch grid (rows, columns) per sample.
        prompts: prompts per sample.

    Raises:
        UnfinishedHarvestError: no index.
        DamagedShardError: a shard is missing, or its size is wrong.
        ValueError: no such split.
    """

    def __init__(self, directory: str | Path, split: str) -> None:
        self.directory = Path(directory)
        self.index = read_index(self.directory)
        known = sorted({shard["split"] for shard in self.index["shards"]})
        if split not in known:
            raise ValueError(f"{self.directory} has no split {split!r}: it has {', '.join(known) or 'no shards'}")
        self._names = [shard["name"] for shard in self.index["shards"] if shard["split"] == split]
        self._entries: list[tuple[int, dict[str, Any]]] = []
        self.nbytes = 0
        for number, name in enumerate(self._names):
            sidecar = check_shard(self.directory, name, full=False)
            self._entries += [(number, entry) for entry in sidecar["samples"]]
            self.nbytes += sidecar["bytes"]
        self.keys: list[str] = [entry["key"] for _, entry in self._entries]
        self.grids: list[tuple[int, int]] = [(entry["grid"][0], entry["grid"][1]) for _, entry in self._entries]
        self.prompts: list[int] = [entry["prompts"] for _, entry in self._entries]
        self._maps: dict[int, mmap.mmap] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Sample]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Sample:
        return self.stored(number).decoded()

    def stored(self, number: int) -> Sample:
        """The i-th sample as it lies on the disk."""
        shard, entry = self._entries[number]
        buffer = self._map(shard)
        offset, size = entry["json"]
        try:
            facts = json.loads(buffer[offset : offset + size])
            tensors = _tensors_at(buffer, *entry["safetensors"])
            return Sample(
                image_id=facts["image_id"],
                file=facts["file"],
                states=tensors["states"],
                attention=tensors["attention"],
                question=tensors["question"],
                grid=(facts["grid"][0], facts["grid"][1]),
                prompts=facts["prompts"],
                entropy=facts["entropy"],
                scales=tensors.get("scales"),
            )
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise DamagedShardError(self._names[shard], f"sample {entry['key']} is unreadable ({error})") from error

    def _map(self, shard: int) -> mmap.mmap:
        if shard not in self._maps:
            with (self.directory / f"{self._names[shard]}.tar").open("rb") as stream:
                # private (copy on write): torch wants a writable buffer, and the file has to stay as it is
                self._maps[shard] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}


def _tensors_at(buffer: mmap.mmap, offset: int, size: int) -> dict[str, Tensor]:
    """Tensors of a safetensors blob inside a larger buffer, without copying them."""
    header_size = int.from_bytes(buffer[offset : offset + 8], "little")
    if header_size > size - 8:
        raise ValueError("the safetensors header is longer than the member")
    header = json.loads(buffer[offset + 8 : offset + 8 + header_size])
    start = offset + 8 + header_size
    tensors = {}
    for name, facts in header.items():
        if name == "__metadata__":
            continue
        first, last = facts["data_offsets"]
        if start + last > offset + size:
            raise ValueError(f"{name} reaches beyond the member")
        dtype = _DTYPES[facts["dtype"]]
        flat = torch.frombuffer(buffer, dtype=dtype, count=math.prod(facts["shape"]), offset=start + first)
        tensors[name] = flat.view(facts["shape"])
    return tensors


# ------------------------------------------------------------------------------------------------ entry point


def describe(directory: Path) -> str:
    """A few lines about a finished harvest: counts, bytes, shapes, prompts, entropy."""
    index = read_index(directory)
    lines = [f"{directory}: fingerprint {index['fingerprint'][:16]}"]
    for split in dict.fromkeys(shard["split"] for shard in index["shards"]):
        reader = ShardReader(directory, split)
        grids = ", ".join(f"{r} x {c}" for r, c in sorted(set(reader.grids)))
        kinds: Counter[str] = Counter()
        entropies: list[float] = []
        for sample in reader:
            kinds.update(f"{prompt['strategy']}" for prompt in sample.prompts)
            entropies += sample.entropy
        first = reader.stored(0).states
        lines += [
            f"  {split}: {len(reader):,} images, {sum(reader.prompts):,} maps, {reader.nbytes / 1e6:,.1f} MB in "
            f"{len(reader._names)} shards",
            f"    states {tuple(first.shape)} {str(first.dtype).removeprefix('torch.')}, grids {grids}",
            f"    prompts {dict(sorted(kinds.items()))}",
            f"    entropy {min(entropies):.3f} .. {max(entropies):.3f} nats, mean {statistics.fmean(entropies):.3f}",
        ]
    lines.append(f"  skipped images: {len(index['skipped'])}")
    lines += [f"    {bad['file']}: {bad['reason']}" for bad in index["skipped"][:10]]
    return "\n".join(lines)


def contact_sheet(directory: Path, images_dir: Path, file: Path, count: int = 12, side: int = 192) -> Path:
    """Draws the maps of the first images of the test split (else of the last one) over the images.

    One row of the sheet per image: the image, then one overlay per prompt, each map scaled to its own maximum.

    Args:
        directory: a finished harvest.
        images_dir: folder of its images.
        file: PNG to write.
        count: images at most.
        side: pixels per picture.
    """
    from PIL import Image, ImageDraw, ImageOps

    index = read_index(directory)
    splits = list(dict.fromkeys(shard["split"] for shard in index["shards"]))
    reader = ShardReader(directory, "test" if "test" in splits else splits[-1])
    count = min(count, len(reader))
    caption = 16
    sheet = Image.new("RGB", (side * (1 + max(reader.prompts[:count])), (side + caption) * count), "white")
    draw = ImageDraw.Draw(sheet)
    for row in range(count):
        sample = reader[row]
        with Image.open(images_dir / sample.file) as stored:
            picture = ImageOps.exif_transpose(stored).convert("RGB").resize((side, side))
        top = row * (side + caption)
        sheet.paste(picture, (0, top))
        draw.text((4, top + side + 2), sample.file[-28:], fill="black")
        for column, (attention, prompt) in enumerate(zip(sample.attention, sample.prompts, strict=True), start=1):
            heat = (attention / attention.max().clamp_min(1e-12) * 200).to(torch.uint8).reshape(sample.grid)  # [r, c]
            mask = Image.fromarray(heat.numpy()).resize((side, side), Image.Resampling.NEAREST)
            dimmed = Image.blend(picture, Image.new("RGB", picture.size), 0.5)
            overlay = Image.composite(Image.new("RGB", picture.size, (255, 80, 0)), dimmed, mask)
            sheet.paste(overlay, (column * side, top))
            draw.text((column * side + 4, top + side + 2), str(prompt["text"])[:34], fill="black")
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file)
    return file


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m data.shards`."""
    parser = argparse.ArgumentParser(prog="python -m data.shards", description="Looks at a finished harvest.")
    commands = parser.add_subparsers(dest="command", required=True)
    verify = commands.add_parser("verify", help="check every byte")
    verify.add_argument("directory", type=Path)
    show = commands.add_parser("show", help="print a summary, write a contact sheet of maps over images")
    show.add_argument("directory", type=Path)
    show.add_argument("--images", type=Path, help="folder of the images (default: where they were harvested from)")
    show.add_argument("--output", type=Path, help="PNG to write (default: DIR/contact-sheet.png)")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "verify":
            problems = [str(problem) for problem in damaged_shards(arguments.directory)]
            if not manifest_is_whole(arguments.directory, read_index(arguments.directory)):
                problems.append(f"{MANIFEST} is missing or was changed. Run the harvest again: it is written anew.")
            for problem in problems:
                print(problem)
            result = f"{len(problems)} problems" if problems else "every byte is as written"
            print(f"{arguments.directory}: {result}")
            return 1 if problems else 0
        print(describe(arguments.directory))
        images_dir = arguments.images or Path(read_index(arguments.directory)["provenance"]["images_dir"])
        if not images_dir.is_dir():
            print(f"no contact sheet: {images_dir} does not exist, give the images folder with --images")
            return 0
        output = arguments.output or arguments.directory / "contact-sheet.png"
        sheet = contact_sheet(arguments.directory, images_dir, output)
        print(f"maps over images: {sheet}")
        return 0
    except DataError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
