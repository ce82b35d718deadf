"""Ray as the engine of a harvest: actors that hold a model each, mapped over shard names, with our own writer.

Ray is imported here and nowhere else, and only for `harvest.engine=ray`. It decides where a shard is made; what a
shard is, and when it counts as made, is the same as everywhere (`data.folder`). So a driver that died is started again
like any harvest, and a harvest begun with ranks can be finished with Ray.

Retries are counted here, not by Ray, which would retry a shard whose images kill every actor for ever.
"""

from __future__ import annotations

import importlib
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from tqdm import tqdm

from data.claims import claim, difference, working_in
from data.errors import (
    ClusterError,
    DataError,
    HarvestMismatchError,
    PoisonShardsError,
    TooManyBadImagesError,
    UnfinishedHarvestError,
)
from data.folder import (
    HarvestSummary,
    discard_shards,
    find_shards,
    finish,
    missing_shards,
    publish,
    shards_to_retry,
    summarise,
    verified_shard,
)
from data.harvester import Harvester
from data.index import abbreviated
from data.limits import check_bad_images, check_disk
from data.log import log
from data.plan import Job, ShardPlan
from data.records import Sidecar
from data.settings import HarvestSettings

_WAIT_SECONDS = 1.0
_PATIENCE_SECONDS = 60.0  # then log which resources are missing

Prepare = Callable[[], tuple[Job, Harvester]]


class _Worker:
    """Lives in another process, maybe on another machine."""

    def __init__(self, prepare: Prepare) -> None:
        self.prepare = prepare

    def plan(self) -> Job:
        """Loads the model; the first call. Not in `__init__`, whose errors Ray turns into text."""
        self.job, self.harvester = self.prepare()
        return self.job

    def make(self, plan: ShardPlan, redo: bool) -> tuple[Sidecar, bool]:
        """The sidecar of a shard, and whether it was whole already."""
        self.job.directory.mkdir(parents=True, exist_ok=True)  # with a URL, each machine may have its own
        sidecar = None if redo else verified_shard(self.job, plan.name)
        if sidecar is not None:
            return sidecar, True
        discard_shards(self.job, [plan.name])  # until it is whole again
        sidecar = self.harvester.harvest_shard(plan)
        publish(self.job, plan.name)
        return sidecar, False


def harvest_with_ray(prepare: Prepare, settings: HarvestSettings, *, overwrite: bool = False) -> HarvestSummary:
    """Harvests what is missing in a folder that all workers and this process share, or with a URL that they share.

    Uses the cluster that `RAY_ADDRESS` names, or the one this process is connected to, or starts one on this machine.

    Args:
        prepare: makes job and harvester in each worker: `data.harvester.prepare` with its arguments. It has to be
            picklable, and give the same job everywhere.
        settings: how many workers, their GPUs, and how often a shard is tried again after its worker died or failed.
            A killed worker is replaced. An error in the data (`DataError`) is not tried again.
        overwrite: when the folder was made with other settings, remove its shards and harvest again.

    Raises:
        ClusterError: Ray is not installed, or its workers do not start.
        PoisonShardsError: shards that no attempt could make; all others are whole.
        DataError: as `data.harvest.harvest`.
    """
    try:
        ray: Any = importlib.import_module("ray")  # not `import ray`: type checkers run without it too
    except ImportError as error:
        raise ClusterError(
            'harvest.engine=ray needs Ray, which is not installed: pip install -c constraints.txt -e ".[train,ray]"'
        ) from error
    started = time.perf_counter()
    ours = not ray.is_initialized()
    if ours:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # an actor without GPUs is left as it is
        with _sigterm_kept():
            ray.init(**({} if "RAY_ADDRESS" in os.environ else {"include_dashboard": False}))
    try:
        return _Driver(ray, prepare, settings, overwrite).run(started)
    finally:
        if ours:
            ray.shutdown()


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Puts this process's answer to SIGTERM back: Ray's own prints C++ stacks and aborts."""
    answer = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if answer is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, answer)


class _Driver:
    """Hands shards to idle workers, counts attempts, replaces dead workers."""

    def __init__(self, ray: Any, prepare: Prepare, settings: HarvestSettings, overwrite: bool) -> None:
        self.ray = ray
        self.prepare = prepare
        self.workers = settings.workers
        self.max_retries = settings.max_retries
        self.overwrite = overwrite
        gpus = ray.cluster_resources().get("GPU", 0)
        self.gpus = min(1, gpus) if settings.gpus_per_worker is None else settings.gpus_per_worker
        self.actor_class = ray.remote(_Worker)
        self.starting: dict[Any, Any] = {}  # reference to its first answer -> actor
        self.running: dict[Any, tuple[Any, ShardPlan]] = {}  # reference to a sidecar -> actor, shard
        self.idle: list[Any] = []
        self.failed_starts = 0
        self.job: Job | None = None
        self.queue: deque[ShardPlan] = deque()
        self.attempts: dict[str, int] = {}
        self.failures: dict[str, str] = {}
        self.sidecars: dict[str, Sidecar] = {}
        self.reused: list[str] = []
        self.redo: frozenset[str] = frozenset()
        self.progress: Any = None
        self.opened = ExitStack()  # what is held until the end

    def run(self, started: float) -> HarvestSummary:
        """Makes all shards; `started` is when the harvest began, in seconds of `time.perf_counter`."""
        with self.opened:
            return self._run(started)

    def _run(self, started: float) -> HarvestSummary:
        try:
            self._make_shards()
        finally:
            if self.progress is not None:
                self.progress.close()
            for actor in [*self.starting.values(), *(actor for actor, _ in self.running.values()), *self.idle]:
                self.ray.kill(actor)
        job = self.job
        assert job is not None
        if self.failures:
            raise PoisonShardsError(self.failures, self.max_retries + 1)
        index = finish(job)
        if index is None:
            raise UnfinishedHarvestError(
                f"workers made all shards, but this process does not see {abbreviated(missing_shards(job))} in "
                f"{job.directory}: runs_dir has to be on a file system that all of them share; or set harvest.output "
                "to a URL."
            )
        return summarise(job, self.sidecars, self.reused, index, time.perf_counter() - started)

    def _make_shards(self) -> None:
        for _ in range(self.workers):
            self._start_worker()
        last_answer = time.monotonic()
        while self.job is None or self.queue or self.running:
            references = [*self.starting, *self.running]
            assert references, "shards are left, and there is no worker to make them"
            done, _ = self.ray.wait(references, num_returns=1, timeout=_WAIT_SECONDS)
            for reference in done:
                last_answer = time.monotonic()
                if reference in self.starting:
                    self._on_start(reference)
                else:
                    self._on_shard(reference)
            self._hand_out()
            if not self.running and time.monotonic() - last_answer > _PATIENCE_SECONDS:
                last_answer = time.monotonic()
                self._log_resources()

    def _start_worker(self) -> None:
        actor = self.actor_class.options(num_cpus=1, num_gpus=self.gpus, max_restarts=0).remote(self.prepare)
        self.starting[actor.plan.remote()] = actor

    def _on_start(self, reference: Any) -> None:
        actor = self.starting.pop(reference)
        try:
            job = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            self.ray.kill(actor)
            cause = _cause(error)
            if isinstance(cause, DataError):
                raise cause from error
            self.failed_starts += 1
            if self.failed_starts > self.max_retries:
                raise ClusterError(
                    f"workers do not start ({self.failed_starts} in a row failed): {_first_line(cause)}. See the logs "
                    "of the Ray session, and try `python -m data.harvest` without harvest.engine=ray on that machine."
                ) from error
            self._start_worker()
            return
        self.failed_starts = 0
        if self.job is None:
            self._begin(job)
        elif job.settings != self.job.settings:
            log("harvest", "a worker sees another model, other data or other settings than the first one")
            raise HarvestMismatchError(job.directory, difference(self.job.settings, job.settings))
        self.idle.append(actor)

    def _begin(self, job: Job) -> None:
        self.job = job
        claim(job, self.overwrite)
        self.opened.enter_context(working_in(job))
        self.redo = shards_to_retry(job, find_shards(job))
        missing = missing_shards(job)
        if missing or self.redo:
            log("harvest", f"{len(job.plans) - len(missing):,} of {len(job.plans):,} shards are there, to be checked")
            if job.output is None:  # else the workers' disks count
                check_disk(job, missing)
        lacking = set(missing)  # first what has to be made, then what has to be read
        self.queue.extend(sorted(job.plans, key=lambda plan: plan.name not in lacking))
        self.progress = tqdm(total=job.images, desc=f"harvest, {self.workers} workers", unit="image")

    def _hand_out(self) -> None:
        while self.queue and self.idle:
            actor, plan = self.idle.pop(), self.queue.popleft()
            self.running[actor.make.remote(plan, plan.name in self.redo)] = (actor, plan)

    def _on_shard(self, reference: Any) -> None:
        actor, plan = self.running.pop(reference)
        errors = self.ray.exceptions
        try:
            sidecar, reused = self.ray.get(reference)
        except errors.RayTaskError as error:  # an exception in the worker, which lives
            self.idle.append(actor)
            cause = _cause(error)
            if isinstance(cause, TooManyBadImagesError):
                raise cause from error
            self._on_failure(plan, _first_line(cause), final=isinstance(cause, DataError))
        except errors.RayError as error:
            self._on_failure(plan, f"its worker died ({type(error).__name__})", final=False)
            if self.queue:
                self._start_worker()
        else:
            self.idle.append(actor)
            self.sidecars[plan.name] = sidecar
            if reused:
                self.reused.append(plan.name)
            self.progress.update(len(sidecar["samples"]))
            assert self.job is not None
            check_bad_images(self.sidecars.values(), self.job.allowed_bad)

    def _on_failure(self, plan: ShardPlan, reason: str, final: bool) -> None:
        count = self.attempts[plan.name] = self.attempts.get(plan.name, 0) + 1
        if final or count > self.max_retries:
            self.failures[plan.name] = reason
            log("harvest", f"shard {plan.name} is skipped after {count} attempts: {reason}")
        else:
            self.queue.append(plan)  # behind the others: they are made first
            attempt = f"attempt {count + 1} of {self.max_retries + 1}"
            log("harvest", f"shard {plan.name} is tried again ({attempt}): {reason}")

    def _log_resources(self) -> None:
        has = {name: int(count) for name, count in self.ray.cluster_resources().items() if name in ("CPU", "GPU")}
        log(
            "harvest",
            f"still waiting for a worker to start: {len(self.starting)} are asked for, each takes 1 CPU and "
            f"{self.gpus:g} GPUs; the cluster has {has}",
        )


def _cause(error: BaseException) -> BaseException:
    """What went wrong inside the worker, if Ray knows it."""
    return getattr(error, "cause", None) or error


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"
