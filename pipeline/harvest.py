"""The harvest of a configuration, and the command `python -m data.harvest`.

python -m data.harvest model=scene-llava data=scenes harvest.samples=1000
torchrun --nproc-per-node 2 -m data.harvest        by several processes; Slurm and Ray: docs/harvest.md
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from configs import TrainConfig
from data.folder import HarvestSummary
from data.harvest import harvest
from data.harvester import Harvester, check_free_space, prepare
from data.images import CocoImages
from data.index import INDEX
from data.locks import exclusively
from data.plan import Job
from data.ranks import Rank, rank_of_this_process
from data.vlm import load_processor, load_vlm, model_config
from evaluation.errors import EvaluationError
from evaluation.settings import EvaluationSettings
from evaluation.tables import paragraph
from pipeline.checks import check_all

_RENDERING_SECONDS = 1800.0  # longest wait for another process that renders the embedded world
_WORLDS = set[Path]()  # that this process has rendered or reused, and said so


def harvest_from_config(
    config: TrainConfig, model: Any, processor: Any, *, overwrite: bool = False, rank: Rank | None = None
) -> HarvestSummary:
    """Harvests what is missing in the configuration's folder.

    The embedded world is rendered first if the configuration has one.

    Args:
        config: The resolved configuration.
        model: What `config.model` names, loaded; not used with `harvest.engine=ray`, whose actors load their own.
        processor: Its processor.
        overwrite: Replace a harvest that was made with other settings.
        rank: This process among several that fill the folder together.
    """
    if config.harvest.engine == "ray":
        summary = harvest_on_cluster(config, overwrite=overwrite)
        if config.harvest.output is None:
            return summary
        overwrite = False  # and now, what workers made on other machines is fetched
    return harvest(*prepare_from_config(config, model, processor), overwrite=overwrite, rank=rank)


def check_space(config: TrainConfig) -> None:
    """Checks that a harvest into a local folder will fit on its disk, before the model's weights are loaded.

    Raises:
        DiskTooSmallError: It won't.
    """
    folder = config.paths.harvest
    if config.harvest.output is None and not (folder / INDEX).exists():
        model, images = model_config(config.model), training_images(config)
        check_free_space(folder, model, load_processor(config.model, model), images, config.harvest)


def harvest_on_cluster(config: TrainConfig, *, overwrite: bool = False) -> HarvestSummary:
    """`harvest_from_config` by Ray actors, each with a model of its own."""
    from data.cluster import harvest_with_ray

    # workers have another working directory, maybe on another machine
    data = config.data.model_copy(update={"root": str(config.paths.data.absolute())})
    runs = str(Path(config.runs_dir).expanduser().absolute())
    config = config.model_copy(update={"runs_dir": runs, "data": data})
    render_world(config)  # once, before the actors would
    return harvest_with_ray(functools.partial(prepare_in_actor, config), config.harvest, overwrite=overwrite)


def prepare_in_actor(config: TrainConfig) -> tuple[Job, Harvester]:
    """What a Ray actor starts with."""
    return prepare_from_config(config, *load_vlm(config.model))


def prepare_from_config(config: TrainConfig, model: Any, processor: Any) -> tuple[Job, Harvester]:
    """Plans a harvest, and makes what carries it out."""
    return prepare(
        config.paths.harvest,
        model=model,
        processor=processor,
        scr=config.scr,
        images=training_images(config),
        settings=config.harvest,
        output=config.harvest_url,
    )


def training_images(config: TrainConfig) -> CocoImages:
    """Index of the images to harvest; renders the embedded world first if the configuration has one."""
    render_world(config)
    return CocoImages(config.paths.train_images, config.paths.train_annotations, config.paths.cache)


def evaluation_images(config: TrainConfig, settings: EvaluationSettings) -> CocoImages | None:
    """Held-out images with annotations; None where question files and a folder of images are all that is needed.

    Raises:
        EvaluationError: Images to evaluate on are the training images.
    """
    paths = config.paths
    places = [("evaluation.images_dir", settings.images_dir, paths.train_images),
              ("evaluation.annotations", settings.annotations, paths.train_annotations)]  # fmt: skip
    for key, given, training in places:
        if given and training and Path(given).expanduser().resolve() == training.resolve():
            raise EvaluationError(f"{key}={given} holds the training images of data={config.data.name}: give others")
    if (
        settings.annotations is None
        and settings.pope_files
        and settings.images_dir
        and "chair" not in settings.benchmarks
    ):
        return None
    if settings.annotations is None and settings.images_dir is None:
        return held_out_images(config)
    folder = Path(settings.images_dir).expanduser() if settings.images_dir else paths.eval_images
    annotations = Path(settings.annotations).expanduser() if settings.annotations else paths.eval_annotations
    if folder is None or annotations is None:
        raise EvaluationError(
            f"data={config.data.name} has no annotated images to evaluate on: set evaluation.images_dir with "
            "evaluation.pope_files or evaluation.annotations"
        )
    return CocoImages(folder, annotations, paths.cache)


def held_out_images(config: TrainConfig) -> CocoImages:
    """Index of the images to evaluate on; renders the embedded world first if the configuration has one.

    Raises:
        EvaluationError: The data set has none.
    """
    render_world(config)
    paths = config.paths
    if paths.eval_images is None:
        raise EvaluationError(
            f"data={config.data.name} has no images to evaluate on: set data.eval_images and data.eval_annotations, "
            "or give evaluation.pope_files and evaluation.images_dir"
        )
    return CocoImages(paths.eval_images, paths.eval_annotations, paths.cache)


def render_world(config: TrainConfig) -> None:
    """Renders the embedded world if the configuration has one; of several processes one does, the others wait."""
    world, root = config.data.world, config.paths.data
    if world is not None:
        from scenes import ensure_world

        with exclusively(root.with_name(f".{root.name}.lock"), _RENDERING_SECONDS, "rendering the embedded world"):
            ensure_world(root, world.train, world.val, world.seed, world.sizes, quiet=root in _WORLDS)
        _WORLDS.add(root)


def run(config: TrainConfig) -> int:
    """The command: harvests, and prints what came of it."""
    check_all([config], ["harvest"])
    check_space(config)
    if config.harvest.engine == "ray":
        summary = harvest_on_cluster(config)
    else:
        rank = rank_of_this_process()
        device = rank.device(config.model.device, torch.cuda.device_count())
        model, processor = load_vlm(config.model.model_copy(update={"device": device}))
        summary = harvest_from_config(config, model, processor, rank=rank)
    made = summary.images - summary.reused
    rate = f", {made / summary.seconds:.1f} images/s" if made else ""
    state = f"fingerprint {summary.fingerprint[:16]}" if summary.fingerprint else "unfinished"
    words = f"{summary.samples:,} maps of {summary.images:,} images ({summary.reused:,} reused, {summary.skipped} "
    words += f"skipped) in {summary.seconds:.1f} s{rate}, {summary.bytes / 1e6:,.1f} MB"
    print(f"{paragraph(words)}\n{paragraph(f'shards: {summary.directory} ({state})')}")
    return 0
