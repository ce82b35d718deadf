"""The folder of a harvest: which shards it has, which are missing, and when it is finished. No model runs here.

One process, several ranks and a Ray cluster share these steps:

    claim(job)                    the folder is ours: it is empty, or it was begun with the same settings (data.claims)
    verified_shards(job, plans)   shards that are whole, every byte read
    check_disk(job, names)        what is missing fits
    publish(job, name)            a finished shard is uploaded, if the job has a URL (`harvest.output`)
    finish(job)                   once all shards are there: manifest and index

With a URL, a shard is there if the folder or the URL has it: shards of other machines are downloaded and checked.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

from tqdm import tqdm

from data.claims import claim as claim  # the first step
from data.claims import difference as difference
from data.errors import DamagedShardError, DataError, HarvestMismatchError, UnreadableFileError
from data.files import RECORD_BYTES, read_bytes
from data.index import (
    INDEX,
    MANIFEST,
    build_index,
    changing,
    check_shard,
    index_bytes,
    parse_index,
    parse_sidecar,
    write_index_files,
)
from data.limits import check_bad_images, check_room
from data.log import log
from data.plan import Job, ShardPlan
from data.records import Index, Sidecar, tokens_of
from data.store import Store

_UPLOADS_AHEAD = 2


# -- which shards are there ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FoundShards:
    """Sidecars of the shards that are there in full length, made with the job's settings, by name.

    Attributes:
        local: in the folder.
        remote: at the URL.
    """

    local: dict[str, Sidecar] = field(default_factory=dict)
    remote: dict[str, Sidecar] = field(default_factory=dict)

    @property
    def anywhere(self) -> dict[str, Sidecar]:
        """Both; where they differ, the URL's, which other machines may have downloaded already."""
        return {**self.local, **self.remote}


def find_shards(job: Job, names: Sequence[str] | None = None) -> FoundShards:
    """Finds all shards of a job, or these; sizes are compared, no byte of a tar is read.

    Raises:
        HarvestMismatchError: the folder has a shard of other settings, which is not touched.
    """
    found = FoundShards()
    names = job.names if names is None else names
    for name in names:
        try:
            sidecar = check_shard(job.directory, name, full=False)
        except DamagedShardError:
            continue
        if sidecar["settings"] != job.settings_digest:
            raise HarvestMismatchError(
                job.directory, {f"digest of the settings in {name}.json": (sidecar["settings"], job.settings_digest)}
            )
        found.local[name] = sidecar
    if store := job.store:
        sizes = store.sizes([f"{name}{ending}" for name in names for ending in (".tar", ".json")])
        for file, content in store.read([file for file in sizes if file.endswith(".json")]).items():
            name = file.removesuffix(".json")
            try:
                sidecar = parse_sidecar(name, content)
            except DamagedShardError:
                continue
            if sidecar["settings"] == job.settings_digest and sidecar["bytes"] == sizes.get(f"{name}.tar"):
                found.remote[name] = sidecar
    return found


def missing_shards(job: Job) -> list[str]:
    """Names of the shards that neither the folder nor the URL has in full length; no bytes are read."""
    found = find_shards(job).anywhere
    return [name for name in job.names if name not in found]


def verified_shards(job: Job, plans: Sequence[ShardPlan], found: FoundShards | None = None) -> dict[str, Sidecar]:
    """Sidecars of those of the plans whose shards are whole, by name; every byte of them is read.

    Shards that are at the URL only are downloaded. A damaged shard loses its sidecar, so that no process takes it for
    whole while it is redone. After a run that stopped for too many bad images, shards with bad images count as
    missing: the files may have been repaired.

    Args:
        job: the job.
        plans: the shards to look at.
        found: what `find_shards` has found; None searches now.

    Raises:
        DiskTooSmallError: what has to be downloaded does not fit.
        HarvestMismatchError: the folder has a shard of other settings.
    """
    found = found or find_shards(job)
    retry = shards_to_retry(job, found)
    names = [plan.name for plan in plans if plan.name not in retry]
    check_room(job, [found.remote[name] for name in names if name in found.remote and name not in found.local])
    present = [name for name in names if name in found.remote or (job.directory / f"{name}.json").exists()]
    kept = {}
    title = "check shards" if job.output is None else "check and fetch shards"
    for name in tqdm(present, desc=title, unit="shard", delay=2, leave=False):
        if sidecar := verified_shard(job, name, found):
            kept[name] = sidecar
    return kept


def shards_to_retry(job: Job, found: FoundShards) -> frozenset[str]:
    """After a run that stopped for too many bad images: the shards that had some."""
    bad = {name: len(sidecar["skipped"]) for name, sidecar in found.anywhere.items()}
    if sum(bad.values()) <= job.allowed_bad:
        return frozenset()
    return frozenset(name for name, count in bad.items() if count)


def verified_shard(job: Job, name: str, found: FoundShards | None = None) -> Sidecar | None:
    """The sidecar of a shard if every byte of it is as written, in the folder or, downloaded, at the URL; else None.

    Where both have one and they differ, the URL's replaces the folder's; one that only the folder has is published.

    Args:
        job: the job.
        name: the shard.
        found: what `find_shards` has found of it; None searches now.
    """
    local = verified_local(job, name)
    store = job.store
    if store is None:
        return local
    remote = (found or find_shards(job, [name])).remote.get(name)
    if remote and local and remote["sha256"] == local["sha256"]:
        return local
    if remote:
        try:
            return store.download_shard(job.directory, name)
        except DamagedShardError as error:
            log(
                "harvest",
                f"shard {name} at {store.url}: {error.reason}; it is {'uploaded again' if local else 'redone'}",
            )
            store.remove([INDEX, f"{name}.json"])
    if local:
        publish(job, name)
    return local


def verified_local(job: Job, name: str) -> Sidecar | None:
    """The sidecar of a shard if every byte of it is as written in the folder; a damaged one loses its sidecar."""
    try:
        return check_shard(job.directory, name, settings_digest=job.settings_digest)
    except DamagedShardError:
        if not (job.directory / f"{name}.json").exists():
            return None
    with changing(job.directory):  # another process may just have replaced it
        try:
            return check_shard(job.directory, name, settings_digest=job.settings_digest)
        except DamagedShardError as error:
            way = "it is redone" + (", or fetched" if job.output else "")
            log("harvest", f"shard {error.name}: {error.reason}; {way}")
            _discard_local(job, name)
            return None


def discard_shards(job: Job, names: Sequence[str]) -> None:
    """Declares shards missing, and the harvest unfinished, in the folder and at the URL: removes their sidecars."""
    with changing(job.directory):
        for name in names:
            _discard_local(job, name)
    if job.store and names:
        job.store.remove([INDEX, *(f"{name}.json" for name in names)])


def _discard_local(job: Job, name: str) -> None:
    (job.directory / INDEX).unlink(missing_ok=True)
    (job.directory / f"{name}.json").unlink(missing_ok=True)


# -- uploads ---------------------------------------------------------------------------------------------------------


def publish(job: Job, name: str) -> None:
    """Uploads a whole shard to the URL; does nothing without one."""
    if store := job.store:
        store.upload_shard(job.directory, name)


@contextmanager
def publishing(job: Job) -> Iterator[Callable[[str], None]]:
    """Publishes finished shards in a thread while the next ones are made.

    Yields a function that takes a shard's name, and waits while two others are being uploaded. Leaving the block
    waits for all, also when it is left through an exception: finished shards are not lost.

    Raises:
        StoreError: an upload failed; raised when the next shard is handed over, or at the end.
    """
    if job.output is None:
        yield lambda name: None
        return
    pending: deque[Future[None]] = deque()
    with ThreadPoolExecutor(1, "harvest-upload") as pool:

        def hand_over(name: str) -> None:
            while len(pending) >= _UPLOADS_AHEAD or (pending and pending[0].done()):
                pending.popleft().result()
            pending.append(pool.submit(publish, job, name))

        yield hand_over
        for upload in pending:
            upload.result()


# -- the end ---------------------------------------------------------------------------------------------------------


def finish(job: Job) -> Index | None:
    """Writes manifest and index if all shards are there; an index that lists these very shards is kept.

    Every process of a job calls this when it has nothing left to do: the last one finds all shards. Two that are last
    together write the same bytes. An index stands beside shards: the folder gets one if all shards are in it, the URL
    if all are there.

    Returns:
        The index, or None as long as shards are missing.

    Raises:
        TooManyBadImagesError: over 1 % (and at least two) of the planned images cannot be used.
    """
    found, store, names = find_shards(job), job.store, job.names
    sidecars = found.anywhere
    all_local = all(name in found.local and found.local[name]["sha256"] == sidecars[name]["sha256"] for name in names)
    if not all_local and (store is None or len(found.remote) < len(names)):
        return None
    check_bad_images(sidecars.values(), job.allowed_bad)
    if store:
        for name in names:
            if name not in found.remote:  # its process ended before the upload
                publish(job, name)
    hashes = {name: sidecars[name]["sha256"] for name in names}
    local = _local_index(job, hashes) if all_local else None
    remote = _remote_index(store, hashes) if store else None
    manifest, index = local or remote or _new_index(job, sidecars)
    if all_local and not local:
        write_index_files(job.directory, manifest, index)
    if store and not remote:
        store.write(MANIFEST, manifest)
        store.write(INDEX, index_bytes(index))
    return index


def _new_index(job: Job, sidecars: Mapping[str, Sidecar]) -> tuple[bytes, Index]:
    splits: dict[str, list[str]] = {}
    for plan in job.plans:
        splits.setdefault(plan.split, []).append(plan.name)
    return build_index(sidecars, splits, job.settings, job.provenance, {"tuning": job.tuning})


def _local_index(job: Job, hashes: Mapping[str, str]) -> tuple[bytes, Index] | None:
    try:
        manifest, index = (read_bytes(job.directory / name, RECORD_BYTES) for name in (MANIFEST, INDEX))
    except UnreadableFileError:
        return None
    return _matching(manifest, index, hashes)


def _remote_index(store: Store, hashes: Mapping[str, str]) -> tuple[bytes, Index] | None:
    contents = store.read([MANIFEST, INDEX])
    return _matching(contents[MANIFEST], contents[INDEX], hashes) if len(contents) == 2 else None


def _matching(manifest: bytes, content: bytes, hashes: Mapping[str, str]) -> tuple[bytes, Index] | None:
    """Manifest and index if they are whole and list these shards."""
    try:
        index = parse_index(INDEX, content)
    except DataError:
        return None
    listed = {shard["name"]: shard["sha256"] for shard in index["shards"]}
    whole_manifest = hashlib.sha256(manifest).hexdigest() == index["manifest_sha256"]
    return (manifest, index) if listed == hashes and whole_manifest else None


@dataclass(frozen=True)
class HarvestSummary:
    """What a run of a harvest came to, in this process.

    Attributes:
        directory: folder of the shards.
        finished: whether all shards are there.
        missing: names of the shards that other processes have to make.
        images: images of this process's shards.
        reused: those of them that were there before.
        samples: their maps.
        tokens: their visual tokens.
        skipped: images that could not be decoded.
        bytes: size of the tars.
        shards: shards of this process.
        shards_reused: those of them that were there before.
        fingerprint: of the data; None as long as the harvest is unfinished.
        settings_fingerprint: digest of the settings, as the sidecars hold it.
        seconds: wall time.
    """

    directory: str
    finished: bool
    missing: list[str]
    images: int
    reused: int
    samples: int
    tokens: int
    skipped: int
    bytes: int
    shards: int
    shards_reused: int
    fingerprint: str | None
    settings_fingerprint: str
    seconds: float


def summarise(
    job: Job, sidecars: Mapping[str, Sidecar], reused: Iterable[str], index: Index | None, seconds: float
) -> HarvestSummary:
    """Counts what this process's shards hold.

    Args:
        job: the job.
        sidecars: of this process's shards, by name.
        reused: names of those that were there before.
        index: of the finished harvest; None as long as other processes' shards are missing.
        seconds: wall time of the run.
    """
    kept = [sidecars[name] for name in reused]
    return HarvestSummary(
        directory=str(job.directory),
        finished=index is not None,
        missing=[] if index else missing_shards(job),
        images=sum(len(sidecar["samples"]) for sidecar in sidecars.values()),
        reused=sum(len(sidecar["samples"]) for sidecar in kept),
        samples=sum(sidecar["rows"] for sidecar in sidecars.values()),
        tokens=sum(tokens_of(entry) for sidecar in sidecars.values() for entry in sidecar["samples"]),
        skipped=sum(len(sidecar["skipped"]) for sidecar in sidecars.values()),
        bytes=sum(sidecar["bytes"] for sidecar in sidecars.values()),
        shards=len(sidecars),
        shards_reused=len(kept),
        fingerprint=index["fingerprint"] if index else None,
        settings_fingerprint=job.settings_digest,
        seconds=seconds,
    )
