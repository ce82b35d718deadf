"""What lies beside the tars of a harvest, and which shards are whole.

    train-00000.json    sidecar of a shard: byte offsets, counts, the checksum of its tar, the images it skipped. It is
                        written after the tar, so a shard with a sidecar is whole
    harvest.json        the settings, from the beginning of the harvest on
    manifest.json       image ids of each split and the skipped images, written when all shards are there
    index.json          all shards with their checksums, written last: a harvest with an index is finished

Sidecar and index hold a checksum over themselves. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from tqdm import tqdm

from data.checks import check_listed, check_tar, damaged
from data.errors import DamagedShardError, DataError, UnfinishedHarvestError, UnreadableFileError
from data.files import RECORD_BYTES, SETTINGS_BYTES, is_count, open_regular, parse_json, read_bytes, read_json
from data.locks import holding, is_alive
from data.records import SPLITS, Index, ListedShard, Sidecar, SkippedIn, index_problem, sidecar_problem
from scr_runtime.files import write_file

FORMAT_VERSION = 1
INDEX = "index.json"
MANIFEST = "manifest.json"
SETTINGS = "harvest.json"
MOST = 200_000  # shards of a harvest, and samples of a shard: the records about them stay below RECORD_BYTES
_INDEX_WAY_OUT = "Remove it and run the harvest again: shards are kept."
_CHANGE_SECONDS = 600.0  # longest wait for another process that puts a shard in place
_FOREIGN_LEFTOVER_SECONDS = 3600  # a temporary file of another machine that has not grown for so long is removed


def canonical_json(value: Any) -> bytes:
    """The one way a value is written as JSON where bytes count."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def planned_shards(splits: Mapping[str, int], shard_size: int) -> dict[str, list[str]]:
    """Names of the shards per split, in order, of `splits` images in shards of `shard_size`."""
    return {split: [f"{split}-{n:05d}" for n in range(-(-size // shard_size))] for split, size in splits.items()}


def _sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with a checksum over itself."""
    return {**record, "checksum": hashlib.sha256(canonical_json(record)).hexdigest()}


# -- sidecars --------------------------------------------------------------------------------------------------------


def write_sidecar(directory: Path, sidecar: Sidecar) -> None:
    """Declares a shard whole, whose tar is in place."""
    write_file(directory / f"{sidecar['shard']}.json", canonical_json(_sealed(sidecar)))


def read_sidecar(directory: Path, name: str) -> Sidecar:
    """Reads and checks the sidecar of a shard.

    Raises:
        DamagedShardError: it is missing, unreadable, changed, or of another format version.
        HarvestFolderError: the system cannot read it.
    """
    try:
        content = read_bytes(directory / f"{name}.json", RECORD_BYTES)
    except UnreadableFileError as error:
        raise damaged(name, error, f"its sidecar {name}.json") from error
    return parse_sidecar(name, content)


def parse_sidecar(name: str, content: bytes) -> Sidecar:
    """`read_sidecar` of bytes."""
    try:
        record = parse_json(content)
        checksum = record.pop("checksum")
        version = record["format_version"]
        intact = checksum == hashlib.sha256(canonical_json(record)).hexdigest()
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DamagedShardError(name, f"its sidecar {name}.json is unreadable ({error})") from error
    if version != FORMAT_VERSION:
        raise DamagedShardError(name, f"it has format version {version}, this release reads {FORMAT_VERSION}")
    if not intact:
        raise DamagedShardError(name, f"its sidecar {name}.json was changed after it was written")
    if problem := sidecar_problem(record, name):
        raise DamagedShardError(name, f"its sidecar {name}.json is wrong: {problem}")
    return record


def check_shard(directory: Path, name: str, *, full: bool = True, settings_digest: str | None = None) -> Sidecar:
    """Checks a shard against its sidecar.

    Args:
        directory: folder of the shard.
        name: shard name without ending.
        full: read every byte and compare checksums; otherwise compare sizes only, which finds a cut shard but not a
            flipped byte.
        settings_digest: settings that the shard has to be made with; None accepts any.

    Returns:
        The sidecar.

    Raises:
        DamagedShardError: names what is wrong, and how to repair it.
        HarvestFolderError: the system cannot read the shard, which may be whole.
    """
    sidecar = read_sidecar(directory, name)
    if settings_digest is not None and sidecar["settings"] != settings_digest:
        raise DamagedShardError(name, "it was made with other settings")
    try:
        with open_regular(directory / f"{name}.tar") as stream:
            check_tar(stream, sidecar, full=full)
    except UnreadableFileError as error:
        raise damaged(name, error, f"{name}.tar") from error
    return sidecar


# -- manifest and index ----------------------------------------------------------------------------------------------


def build_index(
    sidecars: Mapping[str, Sidecar],
    splits: Mapping[str, Sequence[str]],
    settings: Mapping[str, Any],
    provenance: Mapping[str, Any],
    set_aside: Mapping[str, Sequence[int]] | None = None,
) -> tuple[bytes, Index]:
    """What declares a harvest finished: the manifest of its images, and all shards with their checksums.

    Args:
        sidecars: of all shards, by name.
        splits: shard names per split, in order.
        settings: what determines the samples.
        provenance: how they were made, without influence on their meaning (paths, the edit's settings). What the
            sidecars say is added (versions, device); where shards differ in it, as `{"mixed": [values]}`.
        set_aside: image ids that belong to no shard, and must not be used for anything that the shards' images are
            used for.

    Returns:
        The bytes of `manifest.json`, and the index.
    """
    listed: list[ListedShard] = []
    skipped: list[SkippedIn] = []
    ids: dict[str, list[int]] = {}
    for split, names in splits.items():
        ids[split] = []
        for name in names:
            sidecar = sidecars[name]
            listed.append(
                {
                    "name": name,
                    "split": split,
                    "samples": len(sidecar["samples"]),
                    "rows": sidecar["rows"],
                    "bytes": sidecar["bytes"],
                    "sha256": sidecar["sha256"],
                }
            )
            skipped += [SkippedIn(**bad, split=split, shard=name) for bad in sidecar["skipped"]]
            ids[split] += [int(entry["key"]) for entry in sidecar["samples"]]
    manifest = canonical_json({"format_version": FORMAT_VERSION, "splits": ids, "skipped": skipped})
    index = {
        "format_version": FORMAT_VERSION,
        "fingerprint": _fingerprint(listed),
        "settings": settings,
        "provenance": {**provenance, **_common_provenance(sidecars.values())},
        "manifest_sha256": hashlib.sha256(manifest).hexdigest(),
        "skipped": skipped,
        "set_aside": {name: list(kept) for name, kept in (set_aside or {}).items()},
        "shards": listed,
    }
    return manifest, cast(Index, _sealed(index))


def _fingerprint(shards: Iterable[ListedShard]) -> str:
    return hashlib.sha256(canonical_json([[shard["name"], shard["sha256"]] for shard in shards])).hexdigest()


def _common_provenance(sidecars: Iterable[Sidecar]) -> dict[str, Any]:
    """What all sidecars say; where they differ, their values in a fixed order."""
    found: dict[str, dict[bytes, Any]] = {}
    for sidecar in sidecars:
        for key, value in sidecar.get("provenance", {}).items():
            found.setdefault(key, {})[canonical_json(value)] = value
    return {
        key: next(iter(values.values())) if len(values) == 1 else {"mixed": [values[k] for k in sorted(values)]}
        for key, values in found.items()
    }


def index_bytes(index: Index) -> bytes:
    """An index as it is written."""
    return json.dumps(index, indent=1, sort_keys=True, ensure_ascii=False).encode()


def write_index(
    directory: Path,
    splits: Mapping[str, Sequence[str]],
    settings: Mapping[str, Any],
    provenance: Mapping[str, Any],
    set_aside: Mapping[str, Sequence[int]] | None = None,
) -> Index:
    """Declares a folder finished, all of whose shards are whole: writes what `build_index` makes of its sidecars.

    Whichever process writes manifest and index, the bytes are the same, and each file appears at once or not at all.
    """
    sidecars = {name: check_shard(directory, name, full=False) for names in splits.values() for name in names}
    manifest, index = build_index(sidecars, splits, settings, provenance, set_aside)
    write_index_files(directory, manifest, index)
    return index


def write_index_files(directory: Path, manifest: bytes, index: Index) -> None:
    """Writes what `build_index` returns: the manifest, then the index."""
    write_file(directory / MANIFEST, manifest)
    write_file(directory / INDEX, index_bytes(index))


def read_index(directory: Path) -> Index:
    """Reads `index.json` of a finished harvest.

    Raises:
        UnfinishedHarvestError: there is none; it names the missing shards, if the harvest was begun.
        DataError: it is unreadable, changed, or of another format version.
    """
    file = Path(directory) / INDEX
    try:
        content = read_bytes(file, RECORD_BYTES)
    except UnreadableFileError as error:
        if error.missing:
            raise _unfinished(file.parent) from None
        if error.failed:
            raise
        raise DataError(f"{error}. {_INDEX_WAY_OUT}") from error
    return parse_index(file, content)


def parse_index(file: object, content: bytes) -> Index:
    """`read_index` of bytes; `file` is its name in messages."""
    try:
        index = parse_json(content)
        version = index.get("format_version")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{file} is unreadable ({error}). {_INDEX_WAY_OUT}") from error
    if version != FORMAT_VERSION:
        raise DataError(
            f"{file} has format version {version}, this release reads {FORMAT_VERSION}: harvest "
            "again into another folder, or use the release that wrote it."
        )
    if index != _sealed({key: value for key, value in index.items() if key != "checksum"}):
        raise DataError(f"{file} was changed after it was written. {_INDEX_WAY_OUT}")
    problem = index_problem(index)
    if problem is None and index["fingerprint"] != _fingerprint(index["shards"]):
        problem = "its fingerprint is not that of its shards"
    if problem is not None:
        raise DataError(f"{file} is wrong: {problem}. {_INDEX_WAY_OUT}")
    return index


def _unfinished(directory: Path) -> UnfinishedHarvestError:
    names = _planned_names(directory)
    missing = [name for name in names if not _is_there(directory, name)]
    state = ""  # no harvest was begun here
    if missing:
        state = f"{len(missing):,} of {len(names):,} shards are missing: {abbreviated(missing)}. "
    elif not directory.exists():
        state = "There is no such folder. "
    elif names:
        state = f"All {len(names):,} shards are there, but the index is not written yet. "
    return UnfinishedHarvestError(
        f"{directory} holds no finished harvest ({INDEX} is missing). {state}Run `python -m data.harvest` with the "
        "settings of this folder: existing shards are kept."
    )


def _planned_names(directory: Path) -> list[str]:
    """Names of the shards that a folder's settings plan; none if they cannot be read."""
    try:
        settings = read_json(directory / SETTINGS, SETTINGS_BYTES)
        splits, size = settings["splits"], settings["shard_size"]
        if not is_count(size, 1) or not all(split in SPLITS and is_count(splits[split]) for split in splits):
            return []
        if sum(-(-images // size) for images in splits.values()) > MOST:
            return []
        return [name for names in planned_shards(splits, size).values() for name in names]
    except (UnreadableFileError, KeyError, TypeError, AttributeError):
        return []


def _is_there(directory: Path, name: str) -> bool:
    try:
        check_shard(directory, name, full=False)
    except DamagedShardError:
        return False
    return True


def abbreviated(names: Sequence[str], most: int = 10) -> str:
    """Names in a sentence; of a long list, the first."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# -- damage, leftovers, changes ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def changing(directory: Path) -> Iterator[None]:
    """Lets one process at a time put shards and sidecars in place, or remove them."""
    with holding(directory / SETTINGS, _CHANGE_SECONDS, f"changing shards in {directory}", alone=True):
        yield


def damaged_shards(directory: Path) -> list[DamagedShardError]:
    """Reads every byte of a finished harvest, and returns what is wrong with it (nothing, if all is well)."""
    index = read_index(directory)
    problems = []
    seen: dict[str, str] = {}
    with tqdm(total=sum(s["bytes"] for s in index["shards"]), desc="verify", unit="B", unit_scale=True) as progress:
        for shard in index["shards"]:
            try:
                sidecar = check_shard(directory, shard["name"])
                check_listed(sidecar, shard)
                for entry in sidecar["samples"]:
                    if entry["key"] in seen:
                        raise DamagedShardError(shard["name"], f"{entry['key']} is in {seen[entry['key']]} already")
                    seen[entry["key"]] = shard["name"]
            except DamagedShardError as error:
                problems.append(error)
            progress.update(shard["bytes"])
    return problems


def manifest_is_whole(directory: Path, index: Index) -> bool:
    """Whether `manifest.json` is the one that was written with this index."""
    try:
        return hashlib.sha256(read_bytes(directory / MANIFEST, RECORD_BYTES)).hexdigest() == index["manifest_sha256"]
    except UnreadableFileError:
        return False


def remove_all(directory: Path) -> None:
    """Removes index, manifest, shards and sidecars of a folder, and nothing else; the index first."""
    (directory / INDEX).unlink(missing_ok=True)
    (directory / MANIFEST).unlink(missing_ok=True)
    for split in SPLITS:
        for file in directory.glob(f"{split}-*"):
            ours = re.fullmatch(rf"{split}-\d{{5,}}\.(tar|json)(\.tmp\..*)?", file.name)
            if ours and (file.is_symlink() or not file.is_dir()):
                file.unlink(missing_ok=True)


def remove_leftovers(directory: Path, name: str | None = None) -> None:
    """Removes what killed writers left behind, of one shard or of the whole folder; files of living writers stay.

    Whether a writer on another machine lives can't be seen: its file is removed when it has not grown for an hour.
    """
    shard = rf"({'|'.join(SPLITS)})-\d+\.(tar|json)"
    for leftover in directory.glob(f"{name}.*.tmp.*" if name else "*.tmp.*"):
        target, _, writer = leftover.name.partition(".tmp.")
        if target not in (INDEX, MANIFEST, SETTINGS) and not re.fullmatch(shard, target):
            continue
        machine, _, process = writer.rpartition(".")
        with contextlib.suppress(OSError):  # another process was faster, or it must not be removed
            if machine == socket.gethostname() and re.fullmatch("[0-9]+", process):
                dead = int(process) == os.getpid() or not is_alive(int(process))
            else:
                dead = time.time() - leftover.lstat().st_mtime > _FOREIGN_LEFTOVER_SECONDS
            if dead:
                leftover.unlink()
