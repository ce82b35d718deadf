"""The JSON records beside the tars of a harvest, key by key: sidecar and index. `data.index` reads and writes them."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict


class Entry(TypedDict):
    """A sample, as its shard's sidecar lists it.

    Attributes:
        key: its key in the tar.
        grid: rows and columns of patches.
        prompts: its maps.
        json: offset and size of this member in the tar, in bytes.
        safetensors: the same of the other member.
    """

    key: str
    grid: list[int]
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
