"""Turns images into shards: prompts, the diagnostic run, samples; and prepares a harvest.

The unit of work is a shard: which images it holds follows from the settings alone, and `Harvester.harvest_shard` gives
the same bytes whenever and however often it runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL.Image import Image as PILImage
from torch import Tensor

from data.chat import TokenCounter, chat_inputs, shared_chat_inputs
from data.claims import adopted
from data.errors import CorruptImageError, StatesOverflowError
from data.images import CocoImages
from data.index import read_sidecar
from data.limits import check_skipped, require_space
from data.pictures import PictureGrids
from data.plan import Job, ShardPlan, plan_shards, set_aside
from data.prefetch import prefetch
from data.questions import Question, check_prompts, count_objects, image_prompts
from data.records import Sidecar, SkippedImage
from data.sample import STATES_DTYPES, Sample, quantise, question_dtype, sample_bytes
from data.settings import HarvestSettings
from data.shards import ShardWriter
from data.vlm import library_versions, model_identity
from data.wording import CAPTION_PROMPT
from scr_runtime import Capture, SCRConfig
from scr_runtime import capture as run_diagnostic
from scr_runtime.families import FAMILIES

SETTINGS_VERSION = 1  # bump when the same settings would produce different samples
_PREFETCHED_BATCHES = 2
_LOOKED_AT = 16  # images, for the estimate of the disk space

DiagnosticRun = Callable[[Any, SCRConfig, Mapping[str, Any], int], Sequence[Capture]]
"""Model, settings, inputs, rows per image -> the captures of each row's grids, in order: `scr_runtime.capture`."""


def prepare(
    directory: str | Path,
    *,
    model: Any,
    processor: Any,
    scr: SCRConfig,
    images: CocoImages,
    settings: HarvestSettings,
    output: str | None = None,
    capture: DiagnosticRun = run_diagnostic,
) -> tuple[Job, Harvester]:
    """Plans a harvest, and makes what carries it out. Nothing is written.

    Args:
        directory: folder of the shards.
        model: vision-language model in eval mode.
        processor: its processor, left padding.
        scr: which block's states and which layers' attention are captured (the edit's settings play no part here).
        images: images and annotations to harvest from.
        settings: how many images, which prompts, number formats, sizes of batches and shards. Batch sizes change
            rounding only, and may differ between runs of one harvest.
        output: a URL that fsspec knows: finished shards are copied there, and those that are there are fetched
            instead of made.
        capture: the diagnostic run.

    Raises:
        NotEnoughImagesError: `settings` asks for more images than there are.
        SettingsError: `settings` asks for more prompts per image than the annotations can give, or its shards are too
            many.
        StoreError: the URL cannot be read.
    """
    plans = plan_shards(images.ids, settings)
    check_prompts(images, settings.prompts_per_image, settings.prompts)
    tokens = _tokens_of_some(model.config, processor, images, plans)
    job = Job(
        directory=Path(directory),
        plans=tuple(plans),
        settings=_recorded_settings(model, processor, scr, images, settings),
        provenance={
            "images_dir": str(images.images_dir),
            "annotations_file": str(images.annotations_file),
            "scr": dataclasses.asdict(scr),
        },
        bytes_per_image=_bytes_per_image(model.config, settings, tokens[-1]),
        tokens_per_image=tokens,
        prompts_per_image=settings.prompts_per_image,
        tuning=tuple(set_aside(images.ids, settings)),
        output=output,
    )
    job = adopted(job)
    harvester = Harvester(job, settings, model=model, processor=processor, scr=scr, images=images, capture=capture)
    return job, harvester


def check_free_space(
    directory: Path, config: Any, processor: Any, images: CocoImages, settings: HarvestSettings
) -> None:
    """Checks that the shards that a folder lacks will fit on its disk, before a model's weights are loaded.

    Args:
        directory: folder of the shards, or where it will be made.
        config: transformers configuration of the model.
        processor: its processor, left padding.
        images: images to harvest from.
        settings: how many images, which prompts, which number format.

    Raises:
        DiskTooSmallError: they don't fit.
        NotEnoughImagesError: `settings` asks for more images than there are.
    """
    plans = plan_shards(images.ids, settings)
    missing = sum(len(plan.image_ids) for plan in plans if not (directory / f"{plan.name}.tar").exists())
    if missing:
        fewest, _, most = _tokens_of_some(config, processor, images, plans)
        needed = missing * _bytes_per_image(config, settings, most)
        require_space(directory, needed, at_most=fewest < most)


def _bytes_per_image(config: Any, settings: HarvestSettings, tokens: int) -> int:
    width, dtype = config.get_text_config().hidden_size, STATES_DTYPES[settings.states_dtype]
    return sample_bytes(tokens, width, settings.prompts_per_image, dtype)


def _recorded_settings(
    model: Any, processor: Any, scr: SCRConfig, images: CocoImages, settings: HarvestSettings
) -> dict[str, Any]:
    """What determines the samples, as `harvest.json` and `index.json` hold it."""
    recorded = {
        "version": SETTINGS_VERSION,
        "model": model_identity(model, processor),
        "attention_layers": list(scr.attention_layers),
        "annotations_sha256": images.annotations_sha256,
        "splits": settings.splits,
        "tuning": settings.tuning,
        "prompts_per_image": settings.prompts_per_image,
        "prompt_mix": list(settings.prompts),
        "shard_size": settings.shard_size,
        "states_dtype": settings.states_dtype,
        "seed": settings.seed,
    }
    if scr.state_layer:  # without the key, 0: the states of all harvests before there was a choice
        recorded["state_layer"] = scr.state_layer
    return recorded


def _tokens_of_some(
    config: Any, processor: Any, images: CocoImages, plans: Sequence[ShardPlan]
) -> tuple[int, int, int]:
    """Visual tokens of up to 16 images, spread over the plan: the fewest, the mean, the most.

    They follow from an image's size alone: one image of each size is decoded.
    """
    planned = [image_id for plan in plans for image_id in plan.image_ids]
    tokens: dict[tuple[int, int], int] = {}
    sizes = []
    for image_id in planned[:: -(-len(planned) // _LOOKED_AT)]:
        with contextlib.suppress(CorruptImageError):
            size = images.size(image_id)
            if size not in tokens:
                tokens[size] = visual_tokens(config, processor, images.open(image_id))
            sizes.append(size)
    counts = [tokens[size] for size in sizes]
    for image_id in () if counts else planned:  # any that decodes
        with contextlib.suppress(CorruptImageError):
            counts = [visual_tokens(config, processor, images.open(image_id))]
            break
    if not counts:
        return 0, 0, 0  # no image decodes: the harvest itself will report them
    return min(counts), round(sum(counts) / len(counts)), max(counts)


def visual_tokens(config: Any, processor: Any, image: PILImage) -> int:
    """Visual tokens of an image, counted in the processor's output by the model's configuration alone."""
    input_ids = chat_inputs(processor, [image], [CAPTION_PROMPT])["input_ids"]
    return int(FAMILIES[config.model_type].visual_tokens(SimpleNamespace(config=config), input_ids).sum())


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
    """Makes any shard of one harvest.

    Args:
        job: the plan, and where shards go.
        settings: prompts, number format and batch sizes. A batch has `batch_size` prompts, rounded to whole images,
            at least one; or at most `batch_tokens` tokens with padding, one row per prompt: images are taken in order
            as long as they fit, and one that does not fit alone is a batch by itself.
        model: vision-language model in eval mode.
        processor: its processor, left padding.
        scr: which block's states and which layers' attention are captured.
        images: images and annotations.
        capture: the diagnostic run.
    """

    def __init__(
        self,
        job: Job,
        settings: HarvestSettings,
        *,
        model: Any,
        processor: Any,
        scr: SCRConfig,
        images: CocoImages,
        capture: DiagnosticRun = run_diagnostic,
    ) -> None:
        self.job = job
        self.settings = settings
        self.model = model
        self.processor = processor
        self.scr = scr
        self.images = images
        self._capture = capture
        self._counts = count_objects(images)
        self._count_tokens = TokenCounter(processor)
        self._grids = PictureGrids(model, processor)
        self._states_dtype = STATES_DTYPES[settings.states_dtype]
        self._provenance = _provenance(model, processor, settings)

    def harvest_shard(self, plan: ShardPlan, on_image: Callable[[], object] = lambda: None) -> Sidecar:
        """Makes one shard; a whole one of the same settings that another process has made meanwhile is kept.

        Args:
            plan: the shard.
            on_image: called after each finished image.

        Returns:
            The shard's sidecar.

        Raises:
            StatesOverflowError: states that `settings.states_dtype` cannot hold.
            TooManyBadImagesError: more images of this shard cannot be used than the whole harvest may have.
        """
        skipped: list[SkippedImage] = []
        directory = self.job.directory
        with (
            ShardWriter(directory, plan.name, self.job.settings_digest, self._provenance, keep=True) as writer,
            # three stages at a time: decoding and preprocessing, the forward, writing
            contextlib.closing(prefetch(self._batches(plan, skipped), _PREFETCHED_BATCHES)) as batches,
            contextlib.closing(prefetch(map(self._run, batches), _PREFETCHED_BATCHES)) as finished,
        ):
            for batch in finished:
                batch.arrived()
                for place, sample in enumerate(batch.samples):
                    if not batch.finite[place]:
                        raise StatesOverflowError(self._overflow(sample, float(batch.largest[place])))
                    writer.write(sample)
                    on_image()
            writer.skipped = skipped
        return read_sidecar(directory, plan.name)

    def prompts(self, image_id: int) -> list[Question]:
        """The prompts of an image."""
        settings = self.settings
        return image_prompts(
            self.images, self._counts, image_id, settings.prompts_per_image, settings.prompts, settings.seed
        )

    def _decoded(self, plan: ShardPlan, skipped: list[SkippedImage]) -> Iterator[tuple[int, PILImage]]:
        reserve = iter(plan.reserve)
        for planned in plan.image_ids:
            image_id: int | None = planned
            while image_id is not None:  # until one can be used, or the reserve is used up
                try:
                    picture = self.images.open(image_id)
                    problem = self._grids.problem(picture)
                except CorruptImageError as error:
                    picture, problem = None, error.reason
                if picture is not None and problem is None:
                    yield image_id, picture
                    break
                skipped.append({"image_id": image_id, "file": self._file(image_id), "reason": str(problem)})
                check_skipped(skipped, self.job.allowed_bad)
                image_id = next(reserve, None)

    def _file(self, image_id: int) -> str:
        return self.images.path(image_id).relative_to(self.images.images_dir).as_posix()

    def _batches(self, plan: ShardPlan, skipped: list[SkippedImage]) -> Iterator[_Batch]:
        for part in self._grouped(self._decoded(plan, skipped)):
            image_ids = [image_id for image_id, _ in part]
            prompts = [self.prompts(image_id) for image_id in image_ids]
            texts = [[question.text for question in questions] for questions in prompts]
            inputs, shared = shared_chat_inputs(self.processor, [picture for _, picture in part], texts)
            yield _Batch(image_ids, prompts, inputs, shared)

    def _grouped(self, decoded: Iterator[tuple[int, PILImage]]) -> Iterator[list[tuple[int, PILImage]]]:
        per_image, limit = self.settings.prompts_per_image, self.settings.batch_tokens
        if limit is None:
            images_at_once = max(1, self.settings.batch_size // per_image)
            while part := list(islice(decoded, images_at_once)):
                yield part
            return
        part, longest = [], 0
        for image_id, picture in decoded:
            length = max(self._count_tokens(picture, question.text) for question in self.prompts(image_id))
            padded = (len(part) + 1) * per_image * max(longest, length)
            if part and padded > limit:
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
        captures = self._capture(self.model, self.scr, inputs, batch.rows_per_image)
        rows = [list(of_row) for _, of_row in groupby(captures, key=lambda one: one.row)]
        expected = sum(map(len, batch.prompts))
        if [of_row[0].row for of_row in rows] != list(range(expected)):
            raise RuntimeError(f"{expected} rows gave captures of rows {[one.row for one in captures]}")
        remaining = iter(rows)
        samples, finite, largest = [], [], []
        for image_id, questions in zip(batch.image_ids, batch.prompts, strict=True):
            sample, fits, size = self._sample(image_id, questions, list(islice(remaining, len(questions))))
            samples.append(sample)
            finite.append(fits)
            largest.append(size)
        copied = _to_host(torch.stack(finite)), _to_host(torch.stack(largest))
        return _Finished(samples, *copied, _barrier(self.model.device))

    def _sample(
        self, image_id: int, questions: Sequence[Question], captures: Sequence[Sequence[Capture]]
    ) -> tuple[Sample, Tensor, Tensor]:
        """A sample, whether all of it is finite ([] bool), and its largest state before it was stored ([] fp32).

        Args:
            image_id: the image.
            questions: its prompts.
            captures: of each prompt, those of the image's grids.
        """
        # attention is causal: visual tokens don't see the prompt behind them, the first prompt's states serve all
        captured, scales = torch.cat([one.states for one in captures[0]]), None  # [N, d]
        states = captured
        if self._states_dtype == torch.int8:
            states, scales = quantise(states)
        states = states.to(self._states_dtype)
        # the text behind all grids of an image is the same: between them stand visual tokens alone
        question = torch.stack([grids[-1].question for grids in captures])  # [P, d]
        question = question.to(question_dtype(self._states_dtype))
        attention = torch.stack([torch.cat([one.attention for one in grids]) for grids in captures]).float()  # [P, N]
        finite = [part.isfinite().all() for part in (states if scales is None else scales, question, attention)]
        sample = Sample(
            image_id=image_id,
            file=self._file(image_id),
            states=_to_host(states),
            attention=_to_host(attention),
            question=_to_host(question),
            grids=tuple((int(one.grid[0]), int(one.grid[1])) for one in captures[0]),
            prompts=[
                {"text": q.text, "label": q.label, "category": q.category, "strategy": q.strategy} for q in questions
            ],
            entropy=[float(one.entropy) for grids in captures for one in grids],
            scales=None if scales is None else _to_host(scales),
        )
        return sample, torch.stack(finite).all(), captured.abs().max().float()

    def _overflow(self, sample: Sample, largest: float) -> str:
        if not bool(sample.attention.isfinite().all()):
            dtype = str(self.model.dtype).removeprefix("torch.")
            return f"{sample.file}: its attention is not finite: the model overflows in {dtype}. Change model.dtype."
        return (
            f"{sample.file}: states up to {largest:.3g} are not finite as {self.settings.states_dtype}. Use "
            "harvest.states_dtype=bfloat16 (or float32)."
        )


def _provenance(model: Any, processor: Any, settings: HarvestSettings) -> dict[str, Any]:
    """What changes the rounding of a shard, for its sidecar."""
    in_tokens = settings.batch_tokens is not None
    return {
        "attn_implementation": str(getattr(model.config, "_attn_implementation", None)),
        **({"batch_tokens": settings.batch_tokens} if in_tokens else {"batch_size": settings.batch_size}),
        "device": str(model.device.type),
        "image_backend": str(getattr(processor.image_processor, "backend", None)),
        "libraries": {"python": platform.python_version(), **library_versions()},
    }


def _to_host(tensor: Tensor) -> Tensor:
    """Copies to the host; from CUDA without waiting, into pinned memory (see `_barrier`)."""
    if not tensor.is_cuda:
        return tensor.cpu()
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)


def _barrier(device: torch.device) -> Callable[[], object]:
    """Returns a function that waits for the copies that were started before."""
    if device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event.synchronize
