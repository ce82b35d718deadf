"""A harvest as a job: what is planned, what is there already, what is missing, and when it is finished.

Nothing here runs a model. One process, several ranks and a Ray cluster share these steps:

    claim(job)             the folder is ours: it is empty, or it was begun with the same settings
    take_stock(job, ...)   shards that are there and whole, every byte read
    check_disk(job)        what is missing fits
    publish(job, name)     a finished shard goes to the job's URL, if it has one (`harvest.output`)
    finish(job)            if all shards are there: manifest and index; else nothing

With a URL, "there" means here or at the URL: shards of other machines are fetched from it and checked before they
count.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data import shards
from data.errors import (
    DamagedShardError,
    DataError,
    DiskTooSmallError,
    HarvestMismatchError,
    TooManyBadImagesError,
)
from data.images import seeded_order, split_ids
from data.shards import canonical_json
from data.store import Store

BAD_SHARE = 0.01  # of the planned images may be undecodable
_UPLOADS_AHEAD = 2
_UNSAID = {"state_layer": 0}  # what settings mean that do not name a key


@dataclass(frozen=True)
class ShardPlan:
    """What a shard will hold.

    Attributes:
        name: shard name without ending.
        split: train, validation or test.
        image_ids: its images, in order.
        reserve: images that no other shard may use; they replace undecodable ones, in order.
    """

    name: str
    split: str
    image_ids: tuple[int, ...]
    reserve: tuple[int, ...]


def set_aside(ids: Sequence[int], splits: Mapping[str, int], tuning: int, seed: int) -> list[int]:
    """The images kept for hyper-parameters: the `tuning` ones right behind the splits in the seeded order."""
    return split_ids(ids, {**splits, "tuning": tuning}, seed)["tuning"]


def plan_shards(
    ids: Sequence[int], splits: Mapping[str, int], shard_size: int, seed: int, tuning: int = 0
) -> list[ShardPlan]:
    """Deals images to shards.

    The first `tuning` images behind the splits stay out of all of them. Those that follow in the seeded order are
    dealt out as reserves, one to each shard in turn, so that a shard can replace a bad image without knowing what
    happened to the others.

    Raises:
        NotEnoughImagesError: the splits ask for more than there are ids.
    """
    tuned = len(set_aside(ids, splits, tuning, seed))  # first: it counts all that is asked for
    chosen = split_ids(ids, splits, seed)
    parts = [
        (name, split, tuple(chosen[split][number * shard_size : (number + 1) * shard_size]))
        for split, names in shards.planned_shards(splits, shard_size).items()
        for number, name in enumerate(names)
    ]
    spare = seeded_order(ids, seed, "split")[sum(splits.values()) + tuned :]
    return [ShardPlan(*part, tuple(spare[rank :: len(parts)])) for rank, part in enumerate(parts)]


@dataclass(frozen=True)
class Job:
    """One harvest, without model and images: it can be sent to other processes.

    Attributes:
        directory: folder of the shards.
        plans: all shards, in order.
        settings: what determines the samples.
        provenance: what the index tells about how they came about; the sidecars add to it.
        bytes_per_image: what one image takes, at most.
        tokens_per_image: visual tokens of the first image.
        prompts_per_image: maps per image.
        tuning: images that are set aside for hyper-parameters.
        output: URL of the folder's copy that all machines share; None for none.
    """

    directory: Path
    plans: tuple[ShardPlan, ...]
    settings: Mapping[str, Any]
    provenance: Mapping[str, Any]
    bytes_per_image: int
    tokens_per_image: int
    prompts_per_image: int
    tuning: tuple[int, ...] = ()
    output: str | None = None

    @property
    def store(self) -> Store | None:
        """What is at `output`."""
        return Store(self.output) if self.output else None

    @property
    def fingerprint(self) -> str:
        """Identity of the settings, written into every sidecar."""
        return fingerprint_of(self.settings)

    @property
    def images(self) -> int:
        """Images planned in all."""
        return sum(len(plan.image_ids) for plan in self.plans)

    @property
    def allowed_bad(self) -> int:
        """Undecodable images that the whole harvest may have."""
        return allowed_bad_of(self.images)

    def missing(self) -> list[str]:
        """Names of the shards that are neither here nor at the URL in full length; no bytes are read."""
        found = look(self)
        return [plan.name for plan in self.plans if plan.name not in found.anywhere]


def fingerprint_of(settings: Mapping[str, Any]) -> str:
    """Identity of the settings of a harvest."""
    return hashlib.sha256(canonical_json(settings)).hexdigest()[:16]


def allowed_bad_of(images: int) -> int:
    """Undecodable images that a harvest of so many images may have."""
    return max(1, int(BAD_SHARE * images))


def say(message: str) -> None:
    """Prints a line above the progress bars."""
    tqdm.write(f"harvest: {message}")


@dataclass(frozen=True)
class Found:
    """Sidecars of the shards that are there in full length, made with the job's settings, by name.

    Attributes:
        here: in the folder.
        there: at the URL.
    """

    here: dict[str, dict[str, Any]] = field(default_factory=dict)
    there: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def anywhere(self) -> dict[str, dict[str, Any]]:
        """Both; where they differ, the URL's, which others have taken already."""
        return {**self.here, **self.there}


def look(job: Job, names: Sequence[str] | None = None) -> Found:
    """Looks for all shards of a job, or for these; sizes are compared, no byte of a tar is read."""
    found = Found()
    names = [plan.name for plan in job.plans] if names is None else names
    for name in names:
        try:
            found.here[name] = shards.check_shard(
                job.directory, name, full=False, settings_fingerprint=job.fingerprint
            )
        except DamagedShardError:
            continue
    if store := job.store:
        sizes = store.sizes([f"{name}{ending}" for name in names for ending in (".tar", ".json")])
        for file, content in store.read([file for file in sizes if file.endswith(".json")]).items():
            name = file.removesuffix(".json")
            try:
                sidecar = shards.parse_sidecar(name, content)
            except DamagedShardError:
                continue
            if sidecar["settings"] == job.fingerprint and sidecar["bytes"] == sizes.get(f"{name}.tar"):
                found.there[name] = sidecar
    return found


def claim(job: Job, overwrite: bool = False) -> None:
    """Makes sure that the folder is there and holds these settings; removes shards of others if allowed to.

    Of several processes that begin at once, one writes the settings; the others compare theirs with them. An object
    store has no such arbiter: there, settings are written and read again, and every sidecar names its own. Nothing of
    other settings is ever removed at a URL, which others may use.

    Raises:
        HarvestMismatchError: the folder was begun with other settings, and `overwrite` is False; or the URL was.
    """
    store = job.store
    there = _settings_at(store) if store else None
    if store and there is not None:
        _refuse_others(store, there, job)  # first: a refused job leaves nothing behind
    _claim_folder(job, overwrite)
    if store and there is None:
        store.write(shards.SETTINGS, json.dumps(job.settings, indent=1).encode())
        _refuse_others(store, _settings_at(store) or {}, job)


def _settings_at(store: Store) -> dict[str, Any] | None:
    content = store.read([shards.SETTINGS]).get(shards.SETTINGS)
    if content is None:
        return None
    try:
        return json.loads(content)
    except ValueError:
        return {}  # unreadable settings are other settings


def _refuse_others(store: Store, there: Mapping[str, Any], job: Job) -> None:
    if changes := difference(there, job.settings):
        raise HarvestMismatchError(store.url, changes)


def _claim_folder(job: Job, overwrite: bool) -> None:
    directory = job.directory
    directory.mkdir(parents=True, exist_ok=True)
    shards.remove_leftovers(directory)
    file = directory / shards.SETTINGS
    content = json.dumps(job.settings, indent=1).encode()
    if shards.create_atomically(file, content):
        return
    try:
        stored = json.loads(file.read_bytes())
    except ValueError:
        stored = {}  # unreadable settings are other settings
    changes = difference(stored, job.settings)
    if not changes:
        return
    if not overwrite:
        raise HarvestMismatchError(directory, changes)
    changed = ", ".join(f"{key} {old!r} -> {new!r}" for key, (old, new) in sorted(changes.items()))
    say(f"other settings than those of {directory} ({changed}): harvesting again")
    shards.remove_all(directory)
    shards.write_atomically(file, content)


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with the old and the new value (None where there is none)."""
    before, after = (_flat({**_UNSAID, **settings}) for settings in (old, json.loads(canonical_json(new))))
    keys = before.keys() | after.keys()
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}{key}.") if isinstance(inner, dict) else {f"{prefix}{key}": inner}
    return flat


def take_stock(job: Job, plans: Sequence[ShardPlan]) -> dict[str, dict[str, Any]]:
    """Sidecars of those of the plans whose shards are there and whole, by name; every byte of them is read.

    Shards that are at the URL only are fetched. A damaged shard loses its sidecar, so that nobody takes it for whole
    while it is redone. After a run that stopped for too many bad images, shards with bad images count as missing: the
    files may have been mended.

    Raises:
        DiskTooSmallError: what has to be fetched does not fit.
    """
    found = look(job)
    retry = shards_to_retry(job, found)
    names = [plan.name for plan in plans if plan.name not in retry]
    _check_room(job, [found.there[name] for name in names if name in found.there and name not in found.here])
    present = [name for name in names if name in found.there or (job.directory / f"{name}.json").exists()]
    kept = {}
    title = "check shards" if job.output is None else "check and fetch shards"
    for name in tqdm(present, desc=title, unit="shard", delay=2, leave=False):
        if sidecar := whole(job, name, found):
            kept[name] = sidecar
    return kept


def whole(job: Job, name: str, found: Found | None = None) -> dict[str, Any] | None:
    """The sidecar of a shard if every byte of it is as written, here or, fetched, at the URL; None if it is missing.

    Where both have one and they differ, the URL's replaces the one here; one that is here only is published.

    Args:
        job: the job.
        name: the shard.
        found: what `look` has found of it; None looks now.
    """
    here = _whole_here(job, name)
    store = job.store
    if store is None:
        return here
    there = (found or look(job, [name])).there.get(name)
    if there and here and there["sha256"] == here["sha256"]:
        return here
    if there:
        try:
            return store.download_shard(job.directory, name)
        except DamagedShardError as error:
            say(f"shard {name} at {store.url}: {error.reason}; it is {'uploaded again' if here else 'redone'}")
            store.remove([shards.INDEX, f"{name}.json"])
    if here:
        publish(job, name)
    return here


def _whole_here(job: Job, name: str) -> dict[str, Any] | None:
    try:
        return shards.check_shard(job.directory, name, settings_fingerprint=job.fingerprint)
    except DamagedShardError as error:
        if (job.directory / f"{name}.json").exists():
            say(f"shard {error.name}: {error.reason}; it is redone" + (", or fetched" if job.output else ""))
            _give_up_here(job, name)
        return None


def give_up(job: Job, names: Sequence[str]) -> None:
    """Declares shards missing, and the harvest unfinished, here and at the URL."""
    for name in names:
        _give_up_here(job, name)
    if job.store and names:
        job.store.remove([shards.INDEX, *(f"{name}.json" for name in names)])


def _give_up_here(job: Job, name: str) -> None:
    (job.directory / shards.INDEX).unlink(missing_ok=True)
    (job.directory / f"{name}.json").unlink(missing_ok=True)


def publish(job: Job, name: str) -> None:
    """Puts a whole shard to the URL; does nothing without one."""
    if store := job.store:
        store.upload_shard(job.directory, name)


@contextmanager
def publishing(job: Job) -> Iterator[Callable[[str], None]]:
    """Publishes finished shards in a thread while the next ones are made.

    Yields a function that takes a shard's name, and waits while two others are on their way. Leaving the block waits
    for all, also when it is left through an exception: what is finished is not lost.

    Raises:
        StoreError: an upload failed; when the next shard is handed over, or at the end.
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


def shards_to_retry(job: Job, found: Found) -> frozenset[str]:
    """After a run that stopped for too many bad images: the shards that had some."""
    bad = {name: len(sidecar["skipped"]) for name, sidecar in found.anywhere.items()}
    if sum(bad.values()) <= job.allowed_bad:
        return frozenset()
    return frozenset(name for name, count in bad.items() if count)


def check_bad_images(sidecars: Iterable[Mapping[str, Any]], allowed: int) -> None:
    """Raises TooManyBadImagesError when finished shards had to skip too many images."""
    refuse_bad_images([bad for sidecar in sidecars for bad in sidecar["skipped"]], allowed)


def refuse_bad_images(bad: Sequence[Mapping[str, Any]], allowed: int) -> None:
    """Raises TooManyBadImagesError, with the list, when there are more of them than allowed."""
    if len(bad) > allowed:
        listed = "".join(f"\n  {image['file']}: {image['reason']}" for image in bad)
        raise TooManyBadImagesError(
            f"{len(bad)} images cannot be decoded, at most {allowed} may be skipped ({BAD_SHARE:.0%} of the harvest, "
            f"at least 1):{listed}\nReplace these files, or remove them from the annotations; finished shards stay."
        )


def check_disk(job: Job, missing: Sequence[str]) -> None:
    """Says what is about to be written, by all processes together, and refuses if it cannot fit."""
    names = set(missing)
    count = sum(len(plan.image_ids) for plan in job.plans if plan.name in names)
    needed = count * job.bytes_per_image
    free = shutil.disk_usage(job.directory).free
    say(
        f"{count:,} images x {job.prompts_per_image} prompts, {job.tokens_per_image:,} visual tokens each "
        f"({count * job.tokens_per_image:,} in all), {needed / 1e6:,.1f} MB to write, {free / 1e6:,.0f} MB free"
    )
    if needed > free:
        raise DiskTooSmallError(
            f"the harvest needs {needed / 1e6:,.1f} MB in {job.directory}, {free / 1e6:,.1f} MB are free. Lower "
            "harvest.samples, choose a runs_dir on a larger disk, or free some space."
        )


def _check_room(job: Job, sidecars: Iterable[Mapping[str, Any]]) -> None:
    needed = sum(sidecar["bytes"] for sidecar in sidecars)
    free = shutil.disk_usage(job.directory).free
    if needed > free:
        raise DiskTooSmallError(
            f"the shards that are at {job.output} and not in {job.directory} take {needed / 1e6:,.1f} MB, "
            f"{free / 1e6:,.1f} MB are free. Choose a runs_dir on a larger disk, or free some space."
        )


def finish(job: Job) -> dict[str, Any] | None:
    """Writes manifest and index if all shards are there; an index that fits them already is kept.

    Every process of a job calls this when it has nothing left to do: the last one finds all shards. Two that are last
    together write the same bytes. An index stands beside shards: the folder gets one if all shards are in it, the URL
    if all are there.

    Returns:
        The index, or None as long as shards are missing.

    Raises:
        TooManyBadImagesError: over 1 % (and at least two) of the planned images cannot be decoded.
    """
    found, store = look(job), job.store
    names = [plan.name for plan in job.plans]
    sidecars = found.anywhere
    all_here = all(name in found.here and found.here[name]["sha256"] == sidecars[name]["sha256"] for name in names)
    if not all_here and (store is None or len(found.there) < len(names)):
        return None
    check_bad_images(sidecars.values(), job.allowed_bad)
    if store:
        for name in names:
            if name not in found.there:  # whoever made it was ended before it was uploaded
                publish(job, name)
    hashes = {name: sidecars[name]["sha256"] for name in names}
    here = _index_here(job, hashes) if all_here else None
    there = _index_there(store, hashes) if store else None
    manifest, index = here or there or _new_index(job, sidecars)
    if all_here and not here:
        shards.write_index_files(job.directory, manifest, index)
    if store and not there:
        store.write(shards.MANIFEST, manifest)
        store.write(shards.INDEX, shards.index_bytes(index))
    return index


def _new_index(job: Job, sidecars: Mapping[str, Mapping[str, Any]]) -> tuple[bytes, dict[str, Any]]:
    splits: dict[str, list[str]] = {}
    for plan in job.plans:
        splits.setdefault(plan.split, []).append(plan.name)
    return shards.build_index(sidecars, splits, job.settings, job.provenance, {"tuning": job.tuning})


def _index_here(job: Job, hashes: Mapping[str, str]) -> tuple[bytes, dict[str, Any]] | None:
    manifest, index = job.directory / shards.MANIFEST, job.directory / shards.INDEX
    if not (manifest.exists() and index.exists()):
        return None
    return _fitting(manifest.read_bytes(), index.read_bytes(), hashes)


def _index_there(store: Store, hashes: Mapping[str, str]) -> tuple[bytes, dict[str, Any]] | None:
    contents = store.read([shards.MANIFEST, shards.INDEX])
    return _fitting(contents[shards.MANIFEST], contents[shards.INDEX], hashes) if len(contents) == 2 else None


def _fitting(manifest: bytes, content: bytes, hashes: Mapping[str, str]) -> tuple[bytes, dict[str, Any]] | None:
    """Manifest and index if they are whole and list these shards."""
    try:
        index = shards.parse_index(shards.INDEX, content)
    except DataError:
        return None
    listed = {shard["name"]: shard["sha256"] for shard in index["shards"]}
    whole_manifest = hashlib.sha256(manifest).hexdigest() == index["manifest_sha256"]
    return (manifest, index) if listed == hashes and whole_manifest else None


def summary(
    job: Job, sidecars: Mapping[str, Mapping[str, Any]], reused: Iterable[str], index: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What a run of this process came to; `index` is None as long as other processes' shards are missing."""
    kept = [sidecars[name] for name in reused]
    return {
        "directory": str(job.directory),
        "finished": index is not None,
        "missing": [] if index else job.missing(),
        "images": sum(len(sidecar["samples"]) for sidecar in sidecars.values()),
        "reused": sum(len(sidecar["samples"]) for sidecar in kept),
        "samples": sum(sidecar["rows"] for sidecar in sidecars.values()),
        "tokens": sum(e["grid"][0] * e["grid"][1] for sidecar in sidecars.values() for e in sidecar["samples"]),
        "skipped": sum(len(sidecar["skipped"]) for sidecar in sidecars.values()),
        "bytes": sum(sidecar["bytes"] for sidecar in sidecars.values()),
        "shards": len(sidecars),
        "shards_reused": len(kept),
        "fingerprint": index["fingerprint"] if index else None,
        "settings_fingerprint": job.fingerprint,
    }
