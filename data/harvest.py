"""Makes the missing shards of a harvest in this process, alone or as one of several ranks.

    python -m data.harvest model=scene-llava data=scenes harvest.samples=1000

A shard is made whole or not at all, so an interrupted harvest is finished by starting it again: whole shards are kept.
`harvest.json` holds the settings of a folder, `index.json` appears when all is done. Several processes share one
folder: ranks (`data.ranks`) or Ray actors (`data.cluster`). See docs/harvest.md.
"""

from __future__ import annotations

from importlib import import_module

if __name__ == "__main__":  # the command is the pipeline's; before the imports below, which take seconds
    raise SystemExit(import_module("pipeline.commands").harvest())

import time
from collections.abc import Collection, Sequence

from tqdm import tqdm

from data.claims import claim, working_in
from data.errors import UnfinishedHarvestError
from data.folder import (
    HarvestSummary,
    discard_shards,
    find_shards,
    finish,
    missing_shards,
    publishing,
    shards_to_retry,
    summarise,
    verified_local,
    verified_shards,
)
from data.harvester import Harvester
from data.index import abbreviated
from data.limits import check_bad_images, check_disk
from data.log import log
from data.plan import Job, ShardPlan
from data.ranks import Rank
from data.records import Sidecar


def harvest(job: Job, harvester: Harvester, *, overwrite: bool = False, rank: Rank | None = None) -> HarvestSummary:
    """Harvests what is missing in a job's folder.

    With `job.output`, a URL, ranks may have folders of their own: the harvest is finished when all shards are at the
    URL, and a process that needs all of them in its folder (one process alone) downloads the rest.

    Args:
        job: the plan, from `data.harvester.prepare`.
        harvester: makes the shards, from the same call.
        overwrite: when the folder was made with other settings, remove its shards and harvest again.
        rank: this process among several that fill the folder together; it makes its share of the shards, and the rank
            that finds all of them whole finishes the harvest.

    Raises:
        HarvestMismatchError: the folder holds shards of other settings, and `overwrite` is False; or the URL does.
        HarvestFolderError: the folder cannot be used.
        StoreError: the URL cannot be read or written.
        DiskTooSmallError: what is missing does not fit.
        TooManyBadImagesError: over 1 % (and at least two) of the planned images cannot be used.
        StatesOverflowError: states that `harvest.states_dtype` cannot hold.
        UnfinishedHarvestError: another process removed shards during the harvest.
    """
    started = time.perf_counter()
    rank = rank or Rank()
    if overwrite and rank.size > 1:
        raise ValueError("overwrite=True with several ranks: one would remove what another has made")
    claim(job, overwrite)
    with working_in(job):
        return _harvest(job, harvester, rank, started)


def _harvest(job: Job, harvester: Harvester, rank: Rank, started: float) -> HarvestSummary:
    mine = rank.share(job.plans)
    found = find_shards(job)
    sidecars = verified_shards(job, mine, found)
    reused = list(sidecars)
    todo = [plan for plan in mine if plan.name not in sidecars]
    if todo:
        if sidecars:
            log("harvest", f"reusing {len(reused):,} of {len(mine):,} shards in {job.directory}, {len(todo):,} to go")
        title = f"harvest, {rank}" if rank.size > 1 else "harvest"
        reused += _make(job, harvester, todo, sidecars, title, shards_to_retry(job, found))
    elif mine and rank.size == 1:
        log("harvest", f"reusing the finished harvest in {job.directory} ({_images(sidecars):,} images)")
    index = finish(job)
    summary = summarise(job, sidecars, reused, index, time.perf_counter() - started)
    if index is None:
        if rank.size == 1:
            raise UnfinishedHarvestError(
                f"{abbreviated(summary.missing)} vanished from {job.directory} during the harvest: does another "
                "process write there? Run it again: existing shards are kept."
            )
        log("harvest", _unfinished(job, rank, summary.missing))
    elif rank.size > 1:
        log("harvest", f"{rank} is done, and all {len(job.plans):,} shards are there: the harvest is finished")
    return summary


def _make(
    job: Job,
    harvester: Harvester,
    todo: Sequence[ShardPlan],
    sidecars: dict[str, Sidecar],
    title: str,
    redo: Collection[str],
) -> list[str]:
    """Makes and publishes the shards of `todo`; puts their sidecars beside those of the shards that are kept.

    Returns:
        The names of those that another process has made meanwhile.
    """
    names = [plan.name for plan in todo]
    check_disk(job, missing_shards(job) if job.output is None else names)
    known = _images(sidecars)
    total = known + sum(len(plan.image_ids) for plan in todo)
    met: list[str] = []
    with publishing(job) as publish, tqdm(total=total, initial=known, desc=title, unit="image") as progress:
        for plan in todo:
            sidecar = None if plan.name in redo else verified_local(job, plan.name)
            if sidecar is None:
                discard_shards(job, [plan.name])  # until it is whole again
                sidecar = harvester.harvest_shard(plan, progress.update)
            else:
                met.append(plan.name)
                progress.update(len(sidecar["samples"]))
            sidecars[plan.name] = sidecar
            publish(plan.name)
            check_bad_images(sidecars.values(), job.allowed_bad)
    return met


def _images(sidecars: dict[str, Sidecar]) -> int:
    return sum(len(sidecar["samples"]) for sidecar in sidecars.values())


def _unfinished(job: Job, rank: Rank, missing: Sequence[str]) -> str:
    position = {name: number for number, name in enumerate(job.names)}
    ranks = sorted({rank.owner(position[name]) for name in missing})
    return (
        f"{rank} is done. {len(missing):,} of {len(job.plans):,} shards are missing: {abbreviated(missing)} (of "
        f"ranks {abbreviated([str(number) for number in ranks])}). The rank that is done last finishes the harvest; "
        f"if they do not run, start them again, with any number of ranks ({rank.variables or 'RANK, WORLD_SIZE'})."
    )
