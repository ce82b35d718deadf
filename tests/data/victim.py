"""Harvests that are killed: real processes of the real harvest on the tiny model.

python -m tests.data.victim random|renaming|vanishing|together COCO TARGET [KILLS]

Importing torch and transformers takes longer than these harvests do, so one driver imports them and forks a process
for each harvest.
"""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image as PILImage

from data.errors import HarvestFolderError, HarvestMismatchError
from data.folder import HarvestSummary
from data.harvest import harvest
from data.harvester import Harvester, prepare
from data.images import CocoImages
from data.index import damaged_shards
from data.plan import Job
from data.settings import HarvestSettings
from scr_runtime import SCRConfig, capture
from tests.data import tiny
from tests.data.tiny import contents

SETTINGS = HarvestSettings(samples=60, validation=12, test=9, shard_size=3, batch_size=4)
SHARDS = 20 + 4 + 3


def slow_capture(seconds: float, model: Any, config: SCRConfig, inputs: Mapping[str, Any], rows_per_image: int) -> Any:
    time.sleep(seconds)
    return capture(model, config, inputs, rows_per_image)


class PoisonedImages(CocoImages):
    """Images one of which kills the process that opens it, as a decoder with a bug would."""

    poison = -1

    def open(self, image_id: int) -> PILImage:
        if image_id == self.poison:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().open(image_id)


@functools.cache
def llava() -> tuple[Any, Any]:
    return tiny.build_llava()


def prepared(
    coco: Path,
    target: Path,
    seconds: float = 0.01,
    poison: int = -1,
    output: str | None = None,
    settings: HarvestSettings = SETTINGS,
) -> tuple[Job, Harvester]:
    """What a process starts with; each batch takes so many seconds."""
    torch.set_num_threads(1)
    model, processor = llava()
    images = PoisonedImages(coco / "images", coco / "instances.json")
    images.poison = poison
    return prepare(
        target,
        model=model,
        processor=processor,
        scr=tiny.CONFIG,
        images=images,
        settings=settings,
        output=output,
        capture=functools.partial(slow_capture, seconds),
    )


def prepared_apart(coco: Path, machines: Path, url: str) -> tuple[Job, Harvester]:
    """`prepared` of an actor whose folder no other process has, as on machines without a common file system."""
    return prepared(coco, machines / str(os.getpid()), output=url)


def run(coco: Path, target: Path, seconds: float = 0.01, output: str | None = None) -> HarvestSummary:
    """Harvests in this process."""
    return harvest(*prepared(coco, target, seconds, output=output))


def fork(work: Callable[[], object]) -> int:
    """Runs `work` in a child process; returns its number."""
    child = os.fork()
    if child == 0:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def fails(work: Callable[[], object]) -> bool:
    """Whether `work` ends a process of its own with an error of ours."""

    def refused() -> None:
        try:
            work()
        except (HarvestMismatchError, HarvestFolderError):
            return
        raise AssertionError("it was let in")

    assert not killed(fork(refused))
    return True


def killed(child: int) -> bool:
    """Waits for a process, which has to end well or by SIGKILL."""
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        return True
    assert os.WEXITSTATUS(status) == 0, status
    return False


def at_random_moments(coco: Path, target: Path, seed: int, count: int = 20) -> dict[str, Any]:
    """Kills a harvest so many times, resuming it each time, and lets it finish."""
    moments = random.Random(seed)
    kills, finished_early, leftovers, progress = 0, 0, 0, set()
    while kills < count:
        child = fork(lambda: run(coco, target))
        tars = len(list(target.glob("*.tar"))) + moments.randrange(3)
        end = time.monotonic() + 10
        while len(list(target.glob("*.tar"))) < tars and time.monotonic() < end:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        if killed(child):
            kills += 1
        else:
            finished_early += 1
            assert finished_early < 10 + count
        leftovers += any(".tmp." in name for name in os.listdir(target)) if target.exists() else 0
        progress.add(len(list(target.glob("*.tar"))))
        if len(list(target.glob("*.tar"))) > SHARDS - 3:  # there has to be something to kill
            for file in sorted(target.glob("*.tar"))[moments.randrange(3) :: 3]:
                file.unlink()
    assert not killed(fork(lambda: run(coco, target)))
    return {"kills": kills, "finished early": finished_early, "leftovers": leftovers, "shards seen": sorted(progress)}


def while_renaming(coco: Path, target: Path) -> dict[str, Any]:
    """Kills a harvest right before or right after one of its renames, for many of them in turn."""
    kills = 0
    for number in (1, 18, 2 * SHARDS, 2 * SHARDS + 1, 2 * SHARDS + 2):  # tar, sidecars, manifest, index
        for after in (False, True):
            shutil.rmtree(target, ignore_errors=True)

            def killed_run(number: int = number, after: bool = after) -> None:
                plain, calls = os.replace, 0

                def replace(source: Any, to: Any) -> None:
                    nonlocal calls
                    calls += 1
                    if calls == number and not after:
                        os.kill(os.getpid(), signal.SIGKILL)
                    plain(source, to)
                    if calls == number:
                        os.kill(os.getpid(), signal.SIGKILL)

                os.replace = replace
                run(coco, target, seconds=0)

            kills += killed(fork(killed_run))
            assert not killed(fork(lambda: run(coco, target, seconds=0)))
            if contents(target) != contents(target.with_name("undisturbed")):
                raise AssertionError(f"killed {'after' if after else 'before'} rename {number}: other bytes")
    return {"kills": kills}


def together(coco: Path, target: Path, seed: int) -> dict[str, Any]:
    """Two harvests in one folder at once: both end well, or one of them is killed; and nobody takes it from them."""
    moments = random.Random(seed)
    wide = SETTINGS.model_copy(update={"batch_size": 12})  # the same settings, another rounding
    other = SETTINGS.model_copy(update={"seed": 1})
    kills, refused, same = 0, 0, 0
    for number in range(8):
        shutil.rmtree(target, ignore_errors=True)
        first = fork(lambda: run(coco, target, 0.03))
        time.sleep(moments.uniform(0, 0.6))
        beside = wide if number % 2 else SETTINGS
        second = fork(lambda: harvest(*prepared(coco, target, 0.03, settings=beside)))  # noqa: B023
        if number in (2, 5):
            os.kill(first, signal.SIGKILL)
        time.sleep(0.1)
        refused += fails(lambda: harvest(*prepared(coco, target, settings=other), overwrite=number > 3))  # noqa: B023
        kills += killed(first)
        assert not killed(second)
        assert not damaged_shards(target), number
        assert not [name for name in os.listdir(target) if ".tmp." in name] or number in (2, 5)
        if beside == SETTINGS:
            found = {name: content for name, content in contents(target).items() if ".tmp." not in name}
            same += found == contents(target.with_name("undisturbed"))
    return {"kills": kills, "refused": refused, "same": same}


def on_machines_that_vanish(coco: Path, target: Path, seed: int) -> dict[str, Any]:
    """Kills a harvest eight times, each time with its disk: all that is left is what stood at the URL."""
    moments = random.Random(seed)
    bucket = target.with_name("bucket")
    kills, progress = 0, []
    for number in range(8):
        machine = target.with_name(f"machine{number}")
        child = fork(lambda: run(coco, machine, output=f"file://{bucket}"))  # noqa: B023
        there = len(list(bucket.glob("*.json"))) + moments.randrange(4)
        end = time.monotonic() + 20
        while len(list(bucket.glob("*.json"))) < there and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        kills += killed(child)
        shutil.rmtree(machine, ignore_errors=True)
        progress.append(len(list(bucket.glob("*.json"))))
    assert not killed(fork(lambda: run(coco, target, output=f"file://{bucket}")))
    return {"kills": kills, "progress": progress}


def main() -> None:
    mode, coco, target = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if mode == "ray":
        from data.cluster import harvest_with_ray
        from tests.data import victim  # not from `__main__`, which workers can't import

        settings = HarvestSettings(engine="ray")
        harvest_with_ray(functools.partial(victim.prepared, coco, target, 0.1), settings)
        return
    llava()
    assert not killed(fork(lambda: run(coco, target.with_name("undisturbed"), seconds=0)))
    count = int(sys.argv[4]) if len(sys.argv) > 4 else 20
    ways = {
        "random": lambda: at_random_moments(coco, target, count, count),
        "together": lambda: together(coco, target, 6),
        "renaming": lambda: while_renaming(coco, target),
        "vanishing": lambda: on_machines_that_vanish(coco, target, 5),
    }
    print(json.dumps(ways[mode]()))


if __name__ == "__main__":
    main()
