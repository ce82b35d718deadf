"""Runs the diagnostic over training images and keeps states and attention maps as shards.

    python -m data.harvest model=scene-llava data=scenes harvest.samples=1000

The unit of work is a shard: which images it holds follows from the settings alone, and `Harvester.harvest_shard`
gives the same bytes whenever and however often it runs. So an interrupted harvest is finished by starting it again;
shards that are there and whole are kept. `harvest.json` holds the settings of a folder, `index.json` appears when all
is done. Several processes share one folder: ranks (`data.ranks`) or Ray actors (`data.cluster`). See docs/harvest.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import platform
import queue
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from PIL.Image import Image as PILImage
from torch import Tensor
from tqdm import tqdm

from data import jobs, shards, vlm
from data.errors import CorruptImageError, DataError, StatesOverflowError, UnfinishedHarvestError
from data.images import CocoImages
from data.jobs import Job, ShardPlan, plan_shards
from data.questions import DEFAULT_MIX, Question, count_objects, image_prompts
from data.ranks import Rank, exclusively, rank_of_this_process
from data.shards import Sample, ShardWriter
from scr_runtime import SCRConfig
from scr_runtime import capture as run_diagnostic

if TYPE_CHECKING:
    from configs.schema import TrainConfig

SETTINGS_VERSION = 1  # raised when equal settings come to mean other samples
_RENDERING_SECONDS = 1800.0  # that a process waits at most for another that renders the embedded world
_PREFETCHED_BATCHES = 2
_T = TypeVar("_T")

Capture = Callable[[Any, SCRConfig, Mapping[str, Any], int], Sequence[Any]]  # see scr_runtime.capture


@dataclass(frozen=True)
class _Batch:
    """Whole images with all their prompts; rows are the prompts of the first image, of the second, and so on."""

    image_ids: list[int]
    prompts: list[list[Question]]  # per image
    inputs: Mapping[str, Any]
    rows_per_image: int  # rows that each image of inputs["pixel_values"] serves


@dataclass(frozen=True)
class _Finished:
    """Samples on the host; on an accelerator their bytes are still arriving until `arrived` is waited for."""

    samples: list[Sample]
    finite: Tensor  # [images] bool
    largest: Tensor  # [images] fp32, of the states before they were stored
    arrived: Callable[[], object]


class Harvester:
    """Everything that is needed to make any shard of one harvest.

    Args:
        directory: folder of the shards.
        model: vision-language model in eval mode.
        processor: its processor, left padding.
        config: which block's states and which layers' attention are captured.
        images: images and annotations.
        prompts_per_image: maps per image.
        prompt_mix: kinds of prompts, see `data.questions.image_prompts`.
        batch_size: prompts per forward, rounded to whole images, at least one.
        batch_tokens: instead of `batch_size`, tokens per forward with padding, one row per prompt: images are taken
            in order as long as they fit; one that does not fit alone makes a batch of its own.
        states_dtype: storage dtype of states and question features.
        seed: of the prompts.
        settings_fingerprint: identity of all settings, written into every sidecar.
        allowed_bad: undecodable images that one shard may have.
        provenance: how the samples come about, beyond the settings; written into every sidecar.
        capture: the diagnostic run; returns one capture per row, in order.
    """

    def __init__(
        self,
        directory: Path,
        *,
        model: Any,
        processor: Any,
        config: SCRConfig,
        images: CocoImages,
        prompts_per_image: int,
        prompt_mix: Sequence[str],
        batch_size: int,
        states_dtype: str,
        seed: int,
        settings_fingerprint: str,
        allowed_bad: int,
        batch_tokens: int | None = None,
        provenance: Mapping[str, Any] | None = None,
        capture: Capture = run_diagnostic,
    ) -> None:
        self.directory = directory
        self.model = model
        self.processor = processor
        self.config = config
        self.images = images
        self.prompts_per_image = prompts_per_image
        self.prompt_mix = tuple(prompt_mix)
        self.batch_size = batch_size
        self.batch_tokens = batch_tokens
        self._tokens = vlm.TokenCounter(processor)
        self.states_dtype = shards.STATES_DTYPES[states_dtype]
        self.seed = seed
        self.settings_fingerprint = settings_fingerprint
        self.allowed_bad = allowed_bad
        self.provenance = provenance
        self._capture = capture
        self._counts = count_objects(images)

    def harvest_shard(self, plan: ShardPlan, on_image: Callable[[], object] = lambda: None) -> dict[str, Any]:
        """Makes one shard, replacing whatever lies under its name.

        Args:
            plan: the shard.
            on_image: called after each finished image.

        Returns:
            The shard's sidecar.

        Raises:
            StatesOverflowError: states that `states_dtype` cannot hold.
            TooManyBadImagesError: more than `allowed_bad` images of this shard cannot be decoded.
        """
        skipped: list[dict[str, Any]] = []
        with (
            ShardWriter(self.directory, plan.name, self.settings_fingerprint, self.provenance) as writer,
            # three stages at a time: decoding and preprocessing, the forward, writing
            contextlib.closing(_prefetch(self._batches(plan, skipped), _PREFETCHED_BATCHES)) as batches,
            contextlib.closing(_prefetch(map(self._run, batches), _PREFETCHED_BATCHES)) as finished,
        ):
            for batch in finished:
                batch.arrived()
                for place, sample in enumerate(batch.samples):
                    if not batch.finite[place]:
                        raise StatesOverflowError(self._overflow(sample, float(batch.largest[place])))
                    writer.write(sample)
                    on_image()
            writer.skipped = skipped
        return shards.read_sidecar(self.directory, plan.name)

    def prompts(self, image_id: int) -> list[Question]:
        """The prompts of an image."""
        return image_prompts(self.images, self._counts, image_id, self.prompts_per_image, self.prompt_mix, self.seed)

    def tokens_per_image(self, image: PILImage, text: str) -> int:
        """Visual tokens that the processor makes of an image, without running the model."""
        inputs = vlm.chat_inputs(self.processor, [image], [text])
        return int((inputs["input_ids"] == self.model.config.image_token_id).sum())

    def _decoded(self, plan: ShardPlan, skipped: list[dict[str, Any]]) -> Iterator[tuple[int, PILImage]]:
        reserve = iter(plan.reserve)
        for planned in plan.image_ids:
            image_id: int | None = planned
            while image_id is not None:  # until one decodes, or the reserve is used up
                try:
                    picture = self.images.open(image_id)
                except CorruptImageError as error:
                    skipped.append({"image_id": image_id, "file": self._file(image_id), "reason": error.reason})
                    jobs.refuse_bad_images(skipped, self.allowed_bad)
                    image_id = next(reserve, None)
                else:
                    yield image_id, picture
                    break

    def _file(self, image_id: int) -> str:
        return self.images.path(image_id).relative_to(self.images.images_dir).as_posix()

    def _batches(self, plan: ShardPlan, skipped: list[dict[str, Any]]) -> Iterator[_Batch]:
        for part in self._grouped(self._decoded(plan, skipped)):
            image_ids = [image_id for image_id, _ in part]
            prompts = [self.prompts(image_id) for image_id in image_ids]
            texts = [[question.text for question in questions] for questions in prompts]
            inputs, shared = vlm.shared_chat_inputs(self.processor, [picture for _, picture in part], texts)
            yield _Batch(image_ids, prompts, inputs, shared)

    def _grouped(self, decoded: Iterator[tuple[int, PILImage]]) -> Iterator[list[tuple[int, PILImage]]]:
        if self.batch_tokens is None:
            images_at_once = max(1, self.batch_size // self.prompts_per_image)
            while part := list(islice(decoded, images_at_once)):
                yield part
            return
        part, longest = [], 0
        for image_id, picture in decoded:
            length = max(self._tokens(picture, question.text) for question in self.prompts(image_id))
            padded = (len(part) + 1) * self.prompts_per_image * max(longest, length)
            if part and padded > self.batch_tokens:
                yield part
                part, longest = [], 0
            part.append((image_id, picture))
            longest = max(longest, length)
        if part:
            yield part

    def _run(self, batch: _Batch) -> _Finished:
        inputs: Any = batch.inputs
        # the cast concerns floating-point inputs (pixels) only
        inputs = inputs.to(self.model.device, dtype=self.model.dtype, non_blocking=True)
        captures = self._capture(self.model, self.config, inputs, batch.rows_per_image)
        rows = sum(map(len, batch.prompts))
        if [capture.row for capture in captures] != list(range(rows)):
            raise RuntimeError(f"{rows} rows gave captures of rows {[capture.row for capture in captures]}")
        remaining = iter(captures)
        samples, finite, largest = [], [], []
        for image_id, questions in zip(batch.image_ids, batch.prompts, strict=True):
            sample, fits, size = self._sample(image_id, questions, list(islice(remaining, len(questions))))
            samples.append(sample)
            finite.append(fits)
            largest.append(size)
        copied = _to_host(torch.stack(finite)), _to_host(torch.stack(largest))
        return _Finished(samples, *copied, _barrier(self.model.device))

    def _sample(
        self, image_id: int, questions: Sequence[Question], captures: Sequence[Any]
    ) -> tuple[Sample, Tensor, Tensor]:
        first = captures[0]
        # attention is causal: visual tokens don't know the prompt behind them, the first prompt's states serve all
        states, scales = first.states, None  # [N, d]
        if self.states_dtype == torch.int8:
            states, scales = shards.quantise(states)
        states = states.to(self.states_dtype)
        question = torch.stack([c.question for c in captures]).to(shards.question_dtype(self.states_dtype))  # [P, d]
        decisive = states if scales is None else scales
        sample = Sample(
            image_id=image_id,
            file=self._file(image_id),
            states=_to_host(states),
            attention=_to_host(torch.stack([c.attention for c in captures]).float()),  # [P, N]
            question=_to_host(question),
            grid=(int(first.grid[0]), int(first.grid[1])),
            prompts=[
                {"text": q.text, "label": q.label, "category": q.category, "strategy": q.strategy} for q in questions
            ],
            entropy=[float(c.entropy) for c in captures],
            scales=None if scales is None else _to_host(scales),
        )
        return sample, decisive.isfinite().all() & question.isfinite().all(), first.states.abs().max().float()

    def _overflow(self, sample: Sample, largest: float) -> str:
        dtype = str(self.states_dtype).removeprefix("torch.")
        return (
            f"{sample.file}: states up to {largest:.3g} are not finite as {dtype}. Use harvest.states_dtype=bfloat16 "
            "(or float32)."
        )


def _to_host(tensor: Tensor) -> Tensor:
    """Copies to the host; from CUDA without waiting, into pinned memory (see `_barrier`)."""
    if not tensor.is_cuda:
        return tensor.cpu()
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)


def _barrier(device: torch.device) -> Callable[[], object]:
    """Waits, when it is called, for the copies that were started before it was made."""
    if device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event.synchronize


def prepare(
    directory: str | Path,
    *,
    model: Any,
    processor: Any,
    config: SCRConfig,
    images: CocoImages,
    splits: Mapping[str, int],
    prompts_per_image: int = 2,
    prompt_mix: Sequence[str] = DEFAULT_MIX,
    batch_size: int = 32,
    batch_tokens: int | None = None,
    shard_size: int = 50,
    states_dtype: str = "float16",
    tuning: int = 0,
    seed: int = 0,
    output: str | None = None,
    capture: Capture = run_diagnostic,
) -> tuple[Job, Harvester]:
    """Plans a harvest, and makes what carries it out; the arguments are those of `harvest`. Nothing is written.

    Raises:
        NotEnoughImagesError: `splits` asks for more images than there are.
    """
    directory = Path(directory)
    if states_dtype not in shards.STATES_DTYPES:
        raise ValueError(f"harvest.states_dtype={states_dtype!r}: use {', '.join(shards.STATES_DTYPES)}")
    splits = {split: size for split, size in splits.items() if size}
    plans = plan_shards(images.ids, splits, shard_size, seed, tuning)
    if not plans:
        raise ValueError("nothing to harvest: every split has 0 images; set harvest.samples")
    settings = {
        "version": SETTINGS_VERSION,
        "model": vlm.fingerprint(model, processor),
        "attention_layers": list(config.attention_layers),
        "annotations_sha256": images.annotations_sha256,
        "splits": splits,
        "tuning": tuning,
        "prompts_per_image": prompts_per_image,
        "prompt_mix": list(prompt_mix),
        "shard_size": shard_size,
        "states_dtype": states_dtype,
        "seed": seed,
    }
    if config.state_layer:  # without the key, 0: the states of all harvests before there was a choice
        settings["state_layer"] = config.state_layer
    harvester = Harvester(
        directory,
        model=model,
        processor=processor,
        config=config,
        images=images,
        prompts_per_image=prompts_per_image,
        prompt_mix=prompt_mix,
        batch_size=batch_size,
        batch_tokens=batch_tokens,
        states_dtype=states_dtype,
        seed=seed,
        settings_fingerprint=jobs.fingerprint_of(settings),
        allowed_bad=jobs.allowed_bad_of(sum(splits.values())),
        provenance={
            "attn_implementation": str(getattr(model.config, "_attn_implementation", None)),
            **({"batch_size": batch_size} if batch_tokens is None else {"batch_tokens": batch_tokens}),
            "device": str(model.device.type),
            "image_backend": str(getattr(processor.image_processor, "backend", None)),
            "libraries": {"python": platform.python_version(), **vlm.library_versions()},
        },
        capture=capture,
    )
    tokens = _tokens_of_first(harvester, plans)
    width = model.config.get_text_config().hidden_size
    job = Job(
        directory=directory,
        plans=tuple(plans),
        settings=settings,
        provenance={
            "images_dir": str(images.images_dir),
            "annotations_file": str(images.annotations_file),
            "scr": dataclasses.asdict(config),
        },
        bytes_per_image=shards.sample_bytes(tokens, width, prompts_per_image, harvester.states_dtype),
        tokens_per_image=tokens,
        prompts_per_image=prompts_per_image,
        tuning=tuple(jobs.set_aside(images.ids, splits, tuning, seed)),
        output=output,
    )
    return job, harvester


def harvest(
    directory: str | Path,
    *,
    model: Any,
    processor: Any,
    config: SCRConfig,
    images: CocoImages,
    splits: Mapping[str, int],
    overwrite: bool = False,
    rank: Rank | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Harvests what is missing in a folder, and says how much was there already.

    Args:
        directory: folder of the shards; made if missing.
        model: vision-language model in eval mode.
        processor: its processor, left padding.
        config: which block's states and which layers' attention are captured (the edit's settings play no part here).
        images: images and annotations to harvest from.
        splits: images per split, e.g. `{"train": 4000, "validation": 400, "test": 400}`; splits of 0 are left out.
        overwrite: when the folder was made with other settings, remove its shards and harvest anew.
        rank: this process among several that fill the folder together; it makes its share of the shards, and whoever
            finds all of them whole finishes the harvest.
        settings: further arguments of `prepare`:
            `prompts_per_image` (2), maps per image; `prompt_mix`, kinds of prompts, dealt out in turn; `batch_size`
            (32), prompts per forward, or `batch_tokens` (None), tokens per forward, which change rounding only and may
            differ between runs of one harvest; `shard_size` (50), images per shard; `states_dtype` (float16, bfloat16,
            float32, or int8 with a scale per token); `tuning` (0), images to set aside for hyper-parameters; `seed`
            (0) of splits and prompts; `output`, a URL that fsspec knows: finished shards are copied there, and those
            that are there already are fetched instead of made; `capture`, the diagnostic run: one capture per batch
            row, in order.

    With an `output`, ranks may have folders of their own: the harvest is finished when all shards are at the URL, and
    whoever needs all of them here (one process alone) fetches the rest.

    Returns:
        `images` of this process (of which `reused` were there before), `samples` (maps), `skipped` (undecodable
        images), `tokens` (visual tokens of all images), `bytes`, `shards`, `shards_reused`, `seconds`, `directory`,
        `settings_fingerprint`; `finished`, and if so the `fingerprint` of the data, for tracking, else the names of
        the `missing` shards, which other ranks have to make.

    Raises:
        HarvestMismatchError: the folder holds shards of other settings, and `overwrite` is False; or the URL does.
        StoreError: the URL cannot be read or written.
        NotEnoughImagesError: `splits` asks for more images than there are.
        DiskTooSmallError: what is missing does not fit.
        TooManyBadImagesError: over 1 % (and at least two) of the planned images cannot be decoded.
        StatesOverflowError: states that `states_dtype` cannot hold.
    """
    started = time.perf_counter()
    rank = rank or Rank()
    if overwrite and rank.size > 1:
        raise ValueError("overwrite=True with several ranks: one would remove what another has made")
    job, harvester = prepare(
        directory, model=model, processor=processor, config=config, images=images, splits=splits, **settings
    )
    jobs.claim(job, overwrite)
    mine = rank.share(job.plans)
    sidecars = jobs.take_stock(job, mine)
    reused = list(sidecars)
    todo = [plan for plan in mine if plan.name not in sidecars]
    if todo:
        jobs.give_up(job, [plan.name for plan in todo])  # until they are whole again
        if sidecars:
            jobs.say(f"reusing {len(sidecars):,} of {len(mine):,} shards in {directory}, {len(todo):,} to go")
        jobs.check_disk(job, job.missing() if job.output is None else [plan.name for plan in todo])
        title = f"harvest, {rank}" if rank.size > 1 else "harvest"
        known = sum(len(sidecar["samples"]) for sidecar in sidecars.values())
        total = sum(len(plan.image_ids) for plan in mine)
        with (
            jobs.publishing(job) as publish,
            tqdm(total=total, initial=known, desc=title, unit="image") as progress,
        ):
            for plan in todo:
                sidecars[plan.name] = harvester.harvest_shard(plan, progress.update)
                publish(plan.name)
                jobs.check_bad_images(sidecars.values(), job.allowed_bad)
    elif mine and rank.size == 1:
        known = sum(len(sidecar["samples"]) for sidecar in sidecars.values())
        jobs.say(f"reusing the finished harvest in {directory} ({known:,} images)")
    index = jobs.finish(job)
    result = {**jobs.summary(job, sidecars, reused, index), "seconds": time.perf_counter() - started}
    if index is None:
        if rank.size == 1:
            raise UnfinishedHarvestError(
                f"{shards.few(result['missing'])} vanished from {directory} during the harvest: does another process "
                "write there? Run it again: what is there is kept."
            )
        jobs.say(_who_is_missing(job, rank, result["missing"]))
    elif rank.size > 1:
        jobs.say(f"{rank} is done, and all {len(job.plans):,} shards are there: the harvest is finished")
    return result


def _who_is_missing(job: Job, rank: Rank, missing: Sequence[str]) -> str:
    position = {plan.name: number for number, plan in enumerate(job.plans)}
    ranks = sorted({rank.owner(position[name]) for name in missing})
    return (
        f"{rank} is done. {len(missing):,} of {len(job.plans):,} shards are missing: {shards.few(missing)} (of "
        f"ranks {shards.few([str(number) for number in ranks])}). The rank that is done last finishes the harvest; if "
        f"they do not run, start them again, with any number of ranks ({rank.told_by or 'RANK, WORLD_SIZE'})."
    )


def harvest_from_config(
    config: TrainConfig, model: Any, processor: Any, *, overwrite: bool = False, rank: Rank | None = None
) -> dict[str, Any]:
    """`harvest` with the settings of a configuration, into its own folder.

    The embedded world is rendered first if the configuration has one.

    Args:
        config: the resolved configuration.
        model: what `config.model` names, loaded; not used with `harvest.engine=ray`, whose actors load their own.
        processor: its processor.
        overwrite: replace a harvest that was made with other settings.
        rank: this process among several that fill the folder together.
    """
    if config.harvest.engine == "ray":
        summary = harvest_on_cluster(config, overwrite=overwrite)
        if config.harvest.output is None:
            return summary
        overwrite = False  # and now, what workers made on other machines is fetched
    return harvest(**_arguments(config, model, processor), overwrite=overwrite, rank=rank)


def harvest_on_cluster(config: TrainConfig, *, overwrite: bool = False) -> dict[str, Any]:
    """`harvest_from_config` by Ray actors, each with a model of its own."""
    from data.cluster import harvest_with_ray

    # workers have another working directory, maybe on another machine
    data = dataclasses.replace(config.data, root=str(config.paths.data.absolute()))
    config = dataclasses.replace(config, runs_dir=str(Path(config.runs_dir).expanduser().absolute()), data=data)
    _render_world(config)  # once, before the actors would
    section = config.harvest
    return harvest_with_ray(
        functools.partial(_prepare_from_config, config),
        workers=section.workers,
        gpus_per_worker=section.gpus_per_worker,
        max_retries=section.max_retries,
        overwrite=overwrite,
    )


def _prepare_from_config(config: TrainConfig) -> tuple[Job, Harvester]:
    """What an actor starts with."""
    return prepare(**_arguments(config, *vlm.load_vlm(**config.model.loading)))


def _arguments(config: TrainConfig, model: Any, processor: Any) -> dict[str, Any]:
    section = config.harvest
    return {
        "directory": config.paths.harvest,
        "model": model,
        "processor": processor,
        "config": SCRConfig(**dataclasses.asdict(config.model.scr)),
        "images": training_images(config),
        "splits": {"train": section.samples, "validation": section.validation, "test": section.test},
        "prompts_per_image": section.prompts_per_image,
        "prompt_mix": section.prompts,
        "tuning": section.tuning,
        "batch_size": section.batch_size,
        "batch_tokens": section.batch_tokens,
        "shard_size": section.shard_size,
        "states_dtype": section.states_dtype,
        "seed": section.seed,
        "output": config.harvest_url,
    }


def training_images(config: TrainConfig) -> CocoImages:
    """Index of the images to harvest; renders the embedded world first if the configuration has one."""
    _render_world(config)
    return CocoImages(config.paths.train_images, config.paths.train_annotations, config.paths.cache)


def held_out_images(config: TrainConfig) -> CocoImages:
    """Index of the images to evaluate on; renders the embedded world first if the configuration has one."""
    _render_world(config)
    return CocoImages(config.paths.eval_images, config.paths.eval_annotations, config.paths.cache)


def _render_world(config: TrainConfig) -> None:
    """Renders the embedded world if the configuration has one; of several processes one does, the others wait."""
    world, root = config.data.world, config.paths.data
    if world is not None:
        from scenes import ensure_world

        with exclusively(root.with_name(f".{root.name}.lock"), _RENDERING_SECONDS, "rendering the embedded world"):
            ensure_world(root, world.train, world.val, world.seed)


def _tokens_of_first(harvester: Harvester, plans: Sequence[ShardPlan]) -> int:
    for image_id in (image_id for plan in plans for image_id in plan.image_ids):
        with contextlib.suppress(CorruptImageError):
            return harvester.tokens_per_image(harvester.images.open(image_id), harvester.prompts(image_id)[0].text)
    return 0  # not one image decodes: the harvest itself will tell


@dataclass(frozen=True)
class _Failure:
    error: BaseException


def _prefetch(items: Iterator[_T], depth: int) -> Generator[_T]:
    """Draws items in a thread, at most `depth` ahead; closing the iterator ends the thread."""
    done = object()
    ready: queue.Queue[Any] = queue.Queue(depth)
    closed = threading.Event()

    def put(item: object) -> bool:
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return True
        return False

    def fill() -> None:
        try:
            for item in items:
                if not put(item):
                    return
            put(done)
        except BaseException as error:  # it is raised where the items are used
            put(_Failure(error))

    thread = threading.Thread(target=fill, name="harvest-prefetch", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not done:
            if isinstance(item, _Failure):
                raise item.error
            yield item
    finally:
        closed.set()
        thread.join()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m data.harvest`."""
    from configs.load import parse_cli
    from configs.schema import TrainConfig

    config = parse_cli(
        TrainConfig,
        argv=argv,
        prog="python -m data.harvest",
        description="Runs the diagnostic over training images and keeps states and attention maps as shards.",
    )
    try:
        if config.harvest.engine == "ray":
            summary = harvest_on_cluster(config)
        else:
            rank = rank_of_this_process()
            device = rank.device(config.model.device, torch.cuda.device_count())
            model, processor = vlm.load_vlm(**{**config.model.loading, "device": device})
            summary = harvest_from_config(config, model, processor, rank=rank)
    except DataError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(
            f"the disk is full ({error}): free some space and start again, finished shards are kept", file=sys.stderr
        )
        return 1
    rate = (summary["images"] - summary["reused"]) / summary["seconds"]
    state = f"fingerprint {summary['fingerprint'][:16]}" if summary["finished"] else "unfinished"
    print(
        f"{summary['samples']:,} maps of {summary['images']:,} images ({summary['reused']:,} reused, "
        f"{summary['skipped']} skipped) in {summary['seconds']:.1f} s, {rate:.1f} images/s, "
        f"{summary['bytes'] / 1e6:,.1f} MB\n"
        f"shards: {summary['directory']} ({state})"
    )
    return 0


if __name__ == "__main__":
    from data import harvest as importable  # what is sent to Ray's workers must not live in `__main__`

    raise SystemExit(importable.main())
