"""The JSON records beside the tars of a harvest, key by key: sidecar and index. `data.index` reads and writes them.

A checksum finds what was changed by accident. Types and ranges are checked all the same: what is read next goes by
these numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NotRequired, TypedDict

from data.files import is_count, is_relative, is_text, shown
from data.grids import grids_of, is_grids_record, patches

SPLITS = ("train", "validation", "test")
_SHARD = re.compile(rf"({'|'.join(SPLITS)})-[0-9]{{5,19}}")
_KEY = re.compile(r"[0-9]{12,19}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Entry(TypedDict):
    """A sample, as its shard's sidecar lists it.

    Attributes:
        key: its key in the tar.
        grid: rows and columns of patches; a list of these for an image that has several grids.
        prompts: its prompts; each gives one map per grid.
        json: offset and size of this member in the tar, in bytes.
        safetensors: the same of the other member.
    """

    key: str
    grid: list[Any]
    prompts: int
    json: list[int]
    safetensors: list[int]


class SkippedImage(TypedDict):
    """An image that could not be decoded, and why."""

    image_id: int
    file: str
    reason: str


class SkippedIn(SkippedImage):
    """A skipped image, and the shard that was to hold it."""

    split: str
    shard: str


class Sidecar(TypedDict):
    """What `<shard>.json` holds, beside its checksum.

    Attributes:
        format_version: of the shard and of this record.
        shard: its name without ending.
        settings: digest of the settings that it was made with.
        provenance: how it was made, beyond the settings.
        bytes: size of the tar.
        sha256: checksum of the tar.
        rows: maps in it.
        samples: the samples, in order.
        skipped: the images that were replaced or left out.
    """

    format_version: int
    shard: str
    settings: str
    provenance: NotRequired[dict[str, Any]]
    bytes: int
    sha256: str
    rows: int
    samples: list[Entry]
    skipped: list[SkippedImage]


class ListedShard(TypedDict):
    """A shard, as the index lists it."""

    name: str
    split: str
    samples: int
    rows: int
    bytes: int
    sha256: str


class Index(TypedDict):
    """What `index.json` holds.

    Attributes:
        format_version: of the harvest.
        fingerprint: checksum over the checksums of all shards: the identity of the data.
        settings: what determines the samples, as in `harvest.json`.
        provenance: how they were made, without influence on their meaning.
        manifest_sha256: checksum of `manifest.json`.
        skipped: images that could not be decoded.
        set_aside: image ids that belong to no shard, by purpose.
        shards: all shards, in order.
        checksum: of this record, without this key.
    """

    format_version: int
    fingerprint: str
    settings: dict[str, Any]
    provenance: dict[str, Any]
    manifest_sha256: str
    skipped: list[SkippedIn]
    set_aside: dict[str, list[int]]
    shards: list[ListedShard]
    checksum: str


def rows_of(entry: Entry) -> int:
    """Maps of a sample: one for each prompt and grid."""
    return entry["prompts"] * len(grids_of(entry["grid"]))


def tokens_of(entry: Entry) -> int:
    """Patches of a sample."""
    return patches(grids_of(entry["grid"]))


# -- what is wrong with a record -------------------------------------------------------------------------------------


def is_shard_name(name: object) -> bool:
    """Whether a value is the name of a shard, and so of files in the harvest's own folder."""
    return isinstance(name, str) and _SHARD.fullmatch(name) is not None


def sidecar_problem(record: Mapping[str, Any], name: str) -> str | None:
    """What is wrong with a record as the sidecar of a shard, in words; None if nothing is."""
    if record.get("shard") != name:
        return f"it is the sidecar of {shown(record.get('shard'))}"
    wrong = _first_wrong(
        record,
        settings=is_text,
        bytes=is_count,
        sha256=_is_sha256,
        rows=is_count,
        samples=_are_entries,
        skipped=_are_skipped,
    )
    if wrong is None and not isinstance(record.get("provenance", {}), dict):
        wrong = "provenance"
    if wrong is not None:
        return f"its {wrong} is {shown(record.get(wrong))}"
    samples = record["samples"]
    if record["rows"] != sum(map(rows_of, samples)):
        return f"it has {record['rows']} rows, and its samples have others"
    if len({entry["key"] for entry in samples}) < len(samples):
        return "a sample comes twice in it"
    place = 0
    for entry in samples:
        for offset, size in (entry["json"], entry["safetensors"]):  # in the order of the tar
            if offset < place:
                return f"the members of sample {entry['key']} overlap others"
            place = offset + size
    return None if place <= record["bytes"] else "its samples reach beyond the end of the tar"


def index_problem(record: Mapping[str, Any]) -> str | None:
    """What is wrong with a record as the index of a harvest, in words; None if nothing is."""
    wrong = _first_wrong(
        record,
        fingerprint=_is_sha256,
        settings=_is_object,
        provenance=_is_object,
        manifest_sha256=_is_sha256,
        skipped=_are_skipped,
        set_aside=lambda value: _is_object(value) and all(_are(ids, is_count) for ids in value.values()),
        shards=lambda value: _are(value, _is_listed),
    )
    if wrong is not None:
        return f"its {wrong} is {shown(record.get(wrong))}"
    names = [shard["name"] for shard in record["shards"]]
    return None if len(set(names)) == len(names) else "it lists a shard twice"


def _first_wrong(record: Mapping[str, Any], **kinds: Callable[[Any], bool]) -> str | None:
    """The first key whose value is missing or not of its kind."""
    return next((key for key, fits in kinds.items() if not fits(record.get(key))), None)


def _are(value: object, kind: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(kind(item) for item in value)


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _is_place(value: object) -> bool:
    return _are(value, is_count) and len(value) == 2  # type: ignore[arg-type]


def _are_entries(value: object) -> bool:
    return _are(value, _is_entry)


def _is_entry(value: object) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("key"), str)
        and _KEY.fullmatch(value["key"]) is not None
        and is_grids_record(value.get("grid"))
        and is_count(value.get("prompts"))
        and _is_place(value.get("json"))
        and _is_place(value.get("safetensors"))
    )


def _are_skipped(value: object) -> bool:
    return _are(
        value,
        lambda image: (
            isinstance(image, dict)
            and is_count(image.get("image_id"))
            and is_relative(image.get("file"))
            and is_text(image.get("reason"))
        ),
    )


def _is_listed(value: object) -> bool:
    return (
        isinstance(value, dict)
        and is_shard_name(value.get("name"))
        and value["name"].startswith(f"{value.get('split')}-")
        and all(is_count(value.get(key)) for key in ("samples", "rows", "bytes"))
        and _is_sha256(value.get("sha256"))
    )
