"""A harvest as a job: what is planned, what is there already, what is missing, and when it is finished.

Nothing here runs a model. One process, several ranks and a Ray cluster share these steps:

    claim(job)             the folder is ours: it is empty, or it was begun with the same settings
    take_stock(job, ...)   shards that are there and whole, every byte read
    check_disk(job)        what is missing fits
    finish(job)            if all shards are there: manifest and index; else nothing
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data import shards
from data.errors import (
    DamagedShardError,
    DiskTooSmallError,
    HarvestMismatchError,
    TooManyBadImagesError,
)
from data.images import seeded_order, split_ids
from data.shards import canonical_json

BAD_SHARE = 0.01  # of the planned images may be undecodable
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
    """

    directory: Path
    plans: tuple[ShardPlan, ...]
    settings: Mapping[str, Any]
    provenance: Mapping[str, Any]
    bytes_per_image: int
    tokens_per_image: int
    prompts_per_image: int
    tuning: tuple[int, ...] = ()

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
        """Names of the shards that are not there in full length; no bytes are read."""
        return shards.missing_shards(self.directory, [plan.name for plan in self.plans], self.fingerprint)


def fingerprint_of(settings: Mapping[str, Any]) -> str:
    """Identity of the settings of a harvest."""
    return hashlib.sha256(canonical_json(settings)).hexdigest()[:16]


def allowed_bad_of(images: int) -> int:
    """Undecodable images that a harvest of so many images may have."""
    return max(1, int(BAD_SHARE * images))


def say(message: str) -> None:
    """Prints a line above the progress bars."""
    tqdm.write(f"harvest: {message}")


def claim(job: Job, overwrite: bool = False) -> None:
    """Makes sure that the folder is there and holds these settings; removes shards of others if allowed to.

    Of several processes that begin at once, one writes the settings; the others compare theirs with them.

    Raises:
        HarvestMismatchError: the folder was begun with other settings, and `overwrite` is False.
    """
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

    A damaged shard loses its sidecar, so that nobody takes it for whole while it is redone. After a run that stopped
    for too many bad images, shards with bad images count as missing: the files may have been mended.
    """
    sidecars = {}
    retry = shards_to_retry(job)
    present = [plan.name for plan in plans if (job.directory / f"{plan.name}.json").exists()]
    for name in tqdm(present, desc="check shards", unit="shard", delay=2, leave=False):
        if name not in retry and (sidecar := whole(job, name)):
            sidecars[name] = sidecar
    return sidecars


def whole(job: Job, name: str) -> dict[str, Any] | None:
    """The sidecar of a shard if every byte of it is as written; a damaged shard loses its sidecar."""
    try:
        return shards.check_shard(job.directory, name, settings_fingerprint=job.fingerprint)
    except DamagedShardError as error:
        if (job.directory / f"{name}.json").exists():
            say(f"shard {error.name}: {error.reason}; it is redone")
            give_up(job, name)
        return None


def give_up(job: Job, name: str) -> None:
    """Declares a shard missing, and the harvest unfinished."""
    (job.directory / shards.INDEX).unlink(missing_ok=True)
    (job.directory / f"{name}.json").unlink(missing_ok=True)


def shards_to_retry(job: Job) -> frozenset[str]:
    """After a run that stopped for too many bad images: the shards that had some."""
    bad: dict[str, int] = {}
    for plan in job.plans:
        try:
            bad[plan.name] = len(shards.read_sidecar(job.directory, plan.name)["skipped"])
        except DamagedShardError:
            continue
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


def finish(job: Job) -> dict[str, Any] | None:
    """Writes manifest and index if all shards are there; an index that fits them already is kept.

    Every process of a job calls this when it has nothing left to do: the last one finds all shards. Two that are last
    together write the same bytes.

    Returns:
        The index, or None as long as shards are missing.

    Raises:
        TooManyBadImagesError: over 1 % (and at least two) of the planned images cannot be decoded.
    """
    sidecars = {}
    for plan in job.plans:
        try:
            sidecars[plan.name] = shards.check_shard(
                job.directory, plan.name, full=False, settings_fingerprint=job.fingerprint
            )
        except DamagedShardError:
            return None
    check_bad_images(sidecars.values(), job.allowed_bad)
    try:
        index = shards.read_index(job.directory)
        listed = {shard["name"]: shard["sha256"] for shard in index["shards"]}
        found = {name: sidecar["sha256"] for name, sidecar in sidecars.items()}
        if listed == found and shards.manifest_is_whole(job.directory, index):
            return index
    except shards.DataError:
        pass  # missing or damaged
    splits: dict[str, list[str]] = {}
    for plan in job.plans:
        splits.setdefault(plan.split, []).append(plan.name)
    return shards.write_index(job.directory, splits, job.settings, job.provenance, {"tuning": job.tuning})


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
