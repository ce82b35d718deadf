"""Runs the diagnostic over training images and keeps states and attention maps as shards.

    python -m data.harvest model=scene-llava data=scenes harvest.samples=1000

The unit of work is a shard: which images it holds follows from the settings alone, and `Harvester.harvest_shard`
gives the same bytes whenever and however often it runs. So an interrupted harvest is finished by starting it again;
shards that are there and whole are kept. `harvest.json` holds the settings of a folder, `index.json` appears when all
is done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import queue
import shutil
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

from data import shards, vlm
from data.errors import (
    CorruptImageError,
    DamagedShardError,
    DataError,
    DiskTooSmallError,
    HarvestMismatchError,
    StatesOverflowError,
    TooManyBadImagesError,
)
from data.images import CocoImages, seeded_order, split_ids
from data.questions import DEFAULT_MIX, Question, count_objects, image_prompts
from data.shards import Sample, ShardWriter, canonical_json, shard_name
from scr_runtime import SCRConfig
from scr_runtime import capture as run_diagnostic

if TYPE_CHECKING:
    from configs.schema import TrainConfig

SETTINGS = "harvest.json"
SETTINGS_VERSION = 1  # raised when equal settings come to mean other samples
BAD_SHARE = 0.01  # of the planned images may be undecodable
_PREFETCHED_BATCHES = 2
_T = TypeVar("_T")

Capture = Callable[[Any, SCRConfig, Mapping[str, Any], int], Sequence[Any]]  # see scr_runtime.capture


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
    chosen = split_ids(ids, {**splits, "tuning": tuning}, seed)
    tuned = len(chosen.pop("tuning"))
    parts = [
        (shard_name(split, number), split, tuple(members[start : start + shard_size]))
        for split, members in chosen.items()
        for number, start in enumerate(range(0, len(members), shard_size))
    ]
    spare = seeded_order(ids, seed, "split")[sum(splits.values()) + tuned :]
    return [ShardPlan(*part, tuple(spare[rank :: len(parts)])) for rank, part in enumerate(parts)]


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
        config: which layers' attention is captured.
        images: images and annotations.
        prompts_per_image: maps per image.
        prompt_mix: kinds of prompts, see `data.questions.image_prompts`.
        batch_size: prompts per forward, rounded to whole images, at least one.
        states_dtype: storage dtype of states and question features.
        seed: of the prompts.
        settings_fingerprint: identity of all settings, written into every sidecar.
        allowed_bad: undecodable images that one shard may have.
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
        self.states_dtype = shards.STATES_DTYPES[states_dtype]
        self.seed = seed
        self.settings_fingerprint = settings_fingerprint
        self.allowed_bad = allowed_bad
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
            ShardWriter(self.directory, plan.name, self.settings_fingerprint) as writer,
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
                    _check_bad_images(skipped, self.allowed_bad)
                    image_id = next(reserve, None)
                else:
                    yield image_id, picture
                    break

    def _file(self, image_id: int) -> str:
        return self.images.path(image_id).relative_to(self.images.images_dir).as_posix()

    def _batches(self, plan: ShardPlan, skipped: list[dict[str, Any]]) -> Iterator[_Batch]:
        images_at_once = max(1, self.batch_size // self.prompts_per_image)
        decoded = self._decoded(plan, skipped)
        while part := list(islice(decoded, images_at_once)):
            image_ids = [image_id for image_id, _ in part]
            prompts = [self.prompts(image_id) for image_id in image_ids]
            texts = [[question.text for question in questions] for questions in prompts]
            inputs, shared = vlm.shared_chat_inputs(self.processor, [picture for _, picture in part], texts)
            yield _Batch(image_ids, prompts, inputs, shared)

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
        # block 0 at the visual tokens does not know the prompt behind them: the first prompt's states serve all
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


def harvest(
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
    shard_size: int = 50,
    states_dtype: str = "float16",
    tuning: int = 0,
    seed: int = 0,
    overwrite: bool = False,
    capture: Capture = run_diagnostic,
) -> dict[str, Any]:
    """Harvests what is missing in a folder, and says how much was there already.

    Args:
        directory: folder of the shards; made if missing.
        model: vision-language model in eval mode.
        processor: its processor, left padding.
        config: which layers' attention is captured (the edit's settings play no part here).
        images: images and annotations to harvest from.
        splits: images per split, e.g. `{"train": 4000, "validation": 400, "test": 400}`; splits of 0 are left out.
        prompts_per_image: maps per image.
        prompt_mix: kinds of prompts, dealt out in turn.
        batch_size: prompts per forward. It changes rounding only, and may differ between runs of one harvest.
        shard_size: images per shard.
        states_dtype: float16, bfloat16, float32, or int8 with a scale per token.
        tuning: images to set aside for hyper-parameters; `index.json` lists them.
        seed: of splits and prompts.
        overwrite: when the folder was made with other settings, remove its shards and harvest anew.
        capture: the diagnostic run; one capture per batch row, in order.

    Returns:
        `images` (of which `reused` were there before), `samples` (maps), `skipped` (undecodable images), `tokens`
        (visual tokens of all images), `bytes`, `shards`, `shards_reused`, `seconds`, `fingerprint` (of the data, for
        tracking), `settings_fingerprint`, `directory`.

    Raises:
        HarvestMismatchError: the folder holds shards of other settings, and `overwrite` is False.
        NotEnoughImagesError: `splits` asks for more images than there are.
        DiskTooSmallError: what is missing does not fit.
        TooManyBadImagesError: over 1 % (and at least two) of the planned images cannot be decoded.
        StatesOverflowError: states that `states_dtype` cannot hold.
    """
    started = time.perf_counter()
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
    planned = sum(splits.values())
    allowed_bad = max(1, int(BAD_SHARE * planned))
    settings_fingerprint = hashlib.sha256(canonical_json(settings)).hexdigest()[:16]
    harvester = Harvester(
        directory,
        model=model,
        processor=processor,
        config=config,
        images=images,
        prompts_per_image=prompts_per_image,
        prompt_mix=prompt_mix,
        batch_size=batch_size,
        states_dtype=states_dtype,
        seed=seed,
        settings_fingerprint=settings_fingerprint,
        allowed_bad=allowed_bad,
        capture=capture,
    )
    _claim_folder(directory, settings, overwrite)
    sidecars = _take_stock(directory, plans, settings_fingerprint, allowed_bad)
    todo = [plan for plan in plans if plan.name not in sidecars]
    reused = sum(len(sidecar["samples"]) for sidecar in sidecars.values())
    if todo:
        (directory / shards.INDEX).unlink(missing_ok=True)  # until all shards are whole again
        if sidecars:
            _say(f"reusing {len(sidecars):,} of {len(plans):,} shards in {directory}, {len(todo):,} to go")
        _check_disk(harvester, todo)
        with tqdm(total=planned, initial=reused, desc="harvest", unit="image") as progress:
            for plan in todo:
                sidecars[plan.name] = harvester.harvest_shard(plan, progress.update)
                _check_bad_images(_skipped(sidecars), allowed_bad)
    else:
        _say(f"reusing the finished harvest in {directory} ({reused:,} images)")
    names = {split: [plan.name for plan in plans if plan.split == split] for split in splits}
    provenance = {
        "attn_implementation": str(getattr(model.config, "_attn_implementation", None)),
        "batch_size": batch_size,
        "device": str(model.device.type),
        "images_dir": str(images.images_dir),
        "annotations_file": str(images.annotations_file),
        "libraries": vlm.library_versions(),
    }
    if todo or not (directory / shards.INDEX).is_file():
        set_aside = {"tuning": split_ids(images.ids, {**splits, "tuning": tuning}, seed)["tuning"]}
        index = shards.write_index(directory, names, settings, provenance, set_aside)
    else:
        index = shards.read_index(directory)
    return {
        "directory": str(directory),
        "images": sum(len(sidecar["samples"]) for sidecar in sidecars.values()),
        "reused": reused,
        "samples": sum(sidecar["rows"] for sidecar in sidecars.values()),
        "tokens": sum(e["grid"][0] * e["grid"][1] for sidecar in sidecars.values() for e in sidecar["samples"]),
        "skipped": len(index["skipped"]),
        "bytes": sum(sidecar["bytes"] for sidecar in sidecars.values()),
        "shards": len(plans),
        "shards_reused": len(plans) - len(todo),
        "seconds": time.perf_counter() - started,
        "fingerprint": index["fingerprint"],
        "settings_fingerprint": settings_fingerprint,
    }


def harvest_from_config(config: TrainConfig, model: Any, processor: Any, *, overwrite: bool = False) -> dict[str, Any]:
    """`harvest` with the settings of a configuration, into its own folder.

    The embedded world is rendered first if the configuration has one.

    Args:
        config: the resolved configuration.
        model: what `config.model` names, loaded.
        processor: its processor.
        overwrite: replace a harvest that was made with other settings.
    """
    section = config.harvest
    return harvest(
        config.paths.harvest,
        model=model,
        processor=processor,
        config=SCRConfig(**dataclasses.asdict(config.model.scr)),
        images=training_images(config),
        splits={"train": section.samples, "validation": section.validation, "test": section.test},
        prompts_per_image=section.prompts_per_image,
        prompt_mix=section.prompts,
        tuning=section.tuning,
        batch_size=section.batch_size,
        shard_size=section.shard_size,
        states_dtype=section.states_dtype,
        seed=section.seed,
        overwrite=overwrite,
    )


def training_images(config: TrainConfig) -> CocoImages:
    """Index of the images to harvest; renders the embedded world first if the configuration has one."""
    _render_world(config)
    return CocoImages(config.paths.train_images, config.paths.train_annotations, config.paths.cache)


def held_out_images(config: TrainConfig) -> CocoImages:
    """Index of the images to evaluate on; renders the embedded world first if the configuration has one."""
    _render_world(config)
    return CocoImages(config.paths.eval_images, config.paths.eval_annotations, config.paths.cache)


def _render_world(config: TrainConfig) -> None:
    world = config.data.world
    if world is not None:
        from scenes import ensure_world

        ensure_world(config.paths.data, world.train, world.val, world.seed)


def _say(message: str) -> None:
    tqdm.write(f"harvest: {message}")


def _claim_folder(directory: Path, settings: Mapping[str, Any], overwrite: bool) -> None:
    """Makes sure that the folder is there and holds these settings; removes shards of others if allowed to."""
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / SETTINGS
    if file.is_file():
        try:
            stored = json.loads(file.read_bytes())
        except ValueError:
            stored = {}  # unreadable settings are other settings
        difference = _difference(stored, settings)
        if not difference:
            return
        if not overwrite:
            raise HarvestMismatchError(directory, difference)
        changed = ", ".join(f"{key} {old!r} -> {new!r}" for key, (old, new) in sorted(difference.items()))
        _say(f"other settings than those of {directory} ({changed}): harvesting again")
        shards.remove_all(directory)
    shards.write_atomically(file, json.dumps(settings, indent=1).encode())


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    before, after = _flat(old), _flat(json.loads(canonical_json(new)))
    keys = before.keys() | after.keys()
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}{key}.") if isinstance(inner, dict) else {f"{prefix}{key}": inner}
    return flat


def _take_stock(
    directory: Path, plans: Sequence[ShardPlan], settings_fingerprint: str, allowed_bad: int
) -> dict[str, dict[str, Any]]:
    """Sidecars of the shards that are there and whole, by name; every byte of them is read."""
    sidecars = {}
    present = [plan.name for plan in plans if (directory / f"{plan.name}.json").exists()]
    for name in tqdm(present, desc="check shards", unit="shard", delay=2, leave=False):
        try:
            sidecars[name] = shards.check_shard(directory, name, settings_fingerprint=settings_fingerprint)
        except DamagedShardError as error:
            _say(f"shard {error.name}: {error.reason}; it is redone")
    if len(_skipped(sidecars)) > allowed_bad:  # the last run stopped for these images: see whether they are mended
        return {name: sidecar for name, sidecar in sidecars.items() if not sidecar["skipped"]}
    return sidecars


def _skipped(sidecars: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [bad for sidecar in sidecars.values() for bad in sidecar["skipped"]]


def _check_bad_images(bad: Sequence[Mapping[str, Any]], allowed: int) -> None:
    if len(bad) > allowed:
        listed = "".join(f"\n  {image['file']}: {image['reason']}" for image in bad)
        raise TooManyBadImagesError(
            f"{len(bad)} images cannot be decoded, at most {allowed} may be skipped ({BAD_SHARE:.0%} of the harvest, "
            f"at least 1):{listed}\nReplace these files, or remove them from the annotations; finished shards stay."
        )


def _check_disk(harvester: Harvester, todo: Sequence[ShardPlan]) -> None:
    """Says what is about to be written, and refuses if it cannot fit."""
    tokens = _tokens_of_first(harvester, todo)
    width = harvester.model.config.get_text_config().hidden_size
    prompts = harvester.prompts_per_image
    count = sum(len(plan.image_ids) for plan in todo)
    needed = count * shards.sample_bytes(tokens, width, prompts, harvester.states_dtype)
    free = shutil.disk_usage(harvester.directory).free
    _say(
        f"{count:,} images x {prompts} prompts, {tokens:,} visual tokens each ({count * tokens:,} in all), "
        f"{needed / 1e6:,.1f} MB to write, {free / 1e6:,.0f} MB free"
    )
    if needed > free:
        raise DiskTooSmallError(
            f"the harvest needs {needed / 1e6:,.1f} MB in {harvester.directory}, {free / 1e6:,.1f} MB are free. Lower "
            "harvest.samples, choose a runs_dir on a larger disk, or free some space."
        )


def _tokens_of_first(harvester: Harvester, todo: Sequence[ShardPlan]) -> int:
    for image_id in (image_id for plan in todo for image_id in plan.image_ids):
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
        description="Runs the diagnostic over training images and keeps block-0 states and attention maps as shards.",
    )
    chosen = config.model
    try:
        model, processor = vlm.load_vlm(
            chosen.location, chosen.revision, chosen.dtype, chosen.attn_implementation, chosen.device
        )
        summary = harvest_from_config(config, model, processor)
    except DataError as error:
        print(error, file=sys.stderr)
        return 1
    rate = (summary["images"] - summary["reused"]) / summary["seconds"]
    print(
        f"{summary['samples']:,} maps of {summary['images']:,} images ({summary['reused']:,} reused, "
        f"{summary['skipped']} skipped) in {summary['seconds']:.1f} s, {rate:.1f} images/s, "
        f"{summary['bytes'] / 1e6:,.1f} MB\n"
        f"shards: {summary['directory']} (fingerprint {summary['fingerprint'][:16]})"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
