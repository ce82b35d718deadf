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
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from tqdm import tqdm

from data.errors import DamagedShardError, DataError, UnfinishedHarvestError
from data.records import Index, ListedShard, Sidecar, SkippedIn
from scr_runtime.files import write_file

FORMAT_VERSION = 1
INDEX = "index.json"
MANIFEST = "manifest.json"
SETTINGS = "harvest.json"
SPLITS = ("train", "validation", "test")
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
    """
    try:
        content = (directory / f"{name}.json").read_bytes()
    except FileNotFoundError:
        raise DamagedShardError(name, f"its sidecar {name}.json is missing") from None
    return parse_sidecar(name, content)


def parse_sidecar(name: str, content: bytes) -> Sidecar:
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
    """
    sidecar = read_sidecar(directory, name)
    if settings_digest is not None and sidecar["settings"] != settings_digest:
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
        "fingerprint": hashlib.sha256(canonical_json([[s["name"], s["sha256"]] for s in listed])).hexdigest(),
        "settings": settings,
        "provenance": {**provenance, **_common_provenance(sidecars.values())},
        "manifest_sha256": hashlib.sha256(manifest).hexdigest(),
        "skipped": skipped,
        "set_aside": {name: list(kept) for name, kept in (set_aside or {}).items()},
        "shards": listed,
    }
    return manifest, cast(Index, _sealed(index))


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
    directory = Path(directory)
    file = directory / INDEX
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise _unfinished(directory) from None
    return parse_index(file, content)


def parse_index(file: object, content: bytes) -> Index:
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
    if index != _sealed({key: value for key, value in index.items() if key != "checksum"}):
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
        missing = [name for name in names if not _is_there(directory, name)]
        state = (
            f"{len(missing):,} of {len(names):,} shards are missing: {abbreviated(missing)}. "
            if missing
            else f"All {len(names):,} shards are there, but the index is not written yet. "
        )
    return UnfinishedHarvestError(
        f"{directory} holds no finished harvest ({INDEX} is missing). {state}Run `python -m data.harvest` with the "
        "settings of this folder: existing shards are kept."
    )


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


# -- damage, leftovers -----------------------------------------------------------------------------------------------


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


def manifest_is_whole(directory: Path, index: Index) -> bool:
    """Whether `manifest.json` is the one that was written with this index."""
    try:
        return hashlib.sha256((directory / MANIFEST).read_bytes()).hexdigest() == index["manifest_sha256"]
    except FileNotFoundError:
        return False


def remove_all(directory: Path) -> None:
    """Removes index, manifest, shards and sidecars of a folder, and nothing else; the index first."""
    (directory / INDEX).unlink(missing_ok=True)
    (directory / MANIFEST).unlink(missing_ok=True)
    for split in SPLITS:
        for file in directory.glob(f"{split}-*"):
            if re.fullmatch(rf"{split}-\d{{5,}}\.(tar|json)(\.tmp\..*)?", file.name):
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
