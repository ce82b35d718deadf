"""What stops a harvest: too many images that cannot be used, or too small a disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from data.errors import DiskTooSmallError, TooManyBadImagesError
from data.log import log
from data.plan import BAD_SHARE, Job
from data.records import Sidecar, SkippedImage


def check_bad_images(sidecars: Iterable[Sidecar], allowed: int) -> None:
    """Raises TooManyBadImagesError when finished shards had to skip too many images."""
    check_skipped([bad for sidecar in sidecars for bad in sidecar["skipped"]], allowed)


def check_skipped(skipped: Sequence[SkippedImage], allowed: int) -> None:
    """Raises TooManyBadImagesError, with the list, when more images were skipped than allowed."""
    if len(skipped) > allowed:
        listed = "".join(f"\n  {image['file']}: {image['reason']}" for image in skipped)
        raise TooManyBadImagesError(
            f"{len(skipped)} images cannot be used, at most {allowed} may be skipped ({BAD_SHARE:.0%} of the "
            f"harvest, at least 1):{listed}\nReplace these files, or remove them from the annotations; finished "
            "shards stay."
        )


def check_disk(job: Job, missing: Sequence[str]) -> None:
    """Logs what is about to be written, by all processes together.

    Raises:
        DiskTooSmallError: it does not fit.
    """
    names = set(missing)
    count = sum(len(plan.image_ids) for plan in job.plans if plan.name in names)
    needed = count * job.bytes_per_image
    free = shutil.disk_usage(job.directory).free
    fewest, mean, most = job.tokens_per_image
    about = "about " if fewest < most else ""
    of = f"; {fewest:,} to {most:,} in the images that were looked at" if fewest < most else ""
    to_write = f"{'at most ' if about else ''}{needed / 1e6:,.1f} MB to write"
    log(
        "harvest",
        f"{count:,} images x {job.prompts_per_image} prompts, {about}{mean:,} visual tokens each "
        f"({about}{count * mean:,} in all{of}), {to_write}, {free / 1e6:,.0f} MB free",
    )
    require_space(job.directory, needed, at_most=bool(about))


def require_space(directory: Path, needed: int, *, at_most: bool) -> None:
    """Checks that bytes fit on a folder's disk.

    Args:
        directory: the folder, or one that will be made.
        needed: how many bytes.
        at_most: whether it may turn out to be less.

    Raises:
        DiskTooSmallError: they don't.
    """
    existing = next(place for place in (directory, *directory.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise DiskTooSmallError(
            f"the harvest needs {'up to ' if at_most else ''}{needed / 1e6:,.1f} MB in {directory}, "
            f"{free / 1e6:,.1f} MB are free. Lower harvest.samples, choose a runs_dir on a larger disk, or free some "
            "space."
        )


def check_room(job: Job, sidecars: Iterable[Sidecar]) -> None:
    """Raises DiskTooSmallError when shards that have to be downloaded do not fit."""
    needed = sum(sidecar["bytes"] for sidecar in sidecars)
    free = shutil.disk_usage(job.directory).free
    if needed > free:
        raise DiskTooSmallError(
            f"the shards that are at {job.output} and not in {job.directory} take {needed / 1e6:,.1f} MB, "
            f"{free / 1e6:,.1f} MB are free. Choose a runs_dir on a larger disk, or free some space."
        )
