"""What can be known before any work: places, layers, devices. All problems are reported together."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from configs import TrainConfig
from data.errors import DataError
from data.questions import CATEGORY_KINDS
from data.vlm import model_config
from pipeline.errors import RunError
from scr_runtime.errors import SCRError


def check_all(configs: Iterable[TrainConfig]) -> None:
    """Checks what the stages will need, for every configuration of a command.

    Raises:
        RunError: With every problem, each once.
    """
    problems = list(dict.fromkeys(problem for config in configs for problem in _problems(config)))
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise RunError("\n  ".join([f"{count} before the start", *problems]))


def _problems(config: TrainConfig) -> Iterator[str]:
    for check in (_runs_dir, _data, _accelerator, _model):
        yield from _of(check, config)


def _of(check: Callable[[TrainConfig], Iterator[str]], config: TrainConfig) -> Iterator[str]:
    try:
        yield from check(config)
    except (DataError, SCRError) as error:
        yield str(error)


def _runs_dir(config: TrainConfig) -> Iterator[str]:
    folder = Path(config.runs_dir).expanduser()
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".probe-", dir=existing):
            pass
    except OSError as error:
        yield f"runs_dir={config.runs_dir}: {existing} can't be written ({error.strerror}); choose another folder"


def _data(config: TrainConfig) -> Iterator[str]:
    if config.data.world is not None:
        return  # it will be rendered
    paths = config.paths
    about = [kind for kind in config.harvest.prompts if kind in CATEGORY_KINDS]
    if about and paths.train_annotations is None:
        yield (
            f"harvest.prompts: {', '.join(dict.fromkeys(about))} ask about annotated objects, and data="
            f"{config.data.name} has no annotations; use caption, or texts of several words"
        )
    wanted = [("data.train_images", paths.train_images), ("data.train_annotations", paths.train_annotations)]
    if config.evaluation.images:
        wanted += [("data.eval_images", paths.eval_images), ("data.eval_annotations", paths.eval_annotations)]
    for key, place in wanted:
        if place is not None and not place.exists():
            yield f"{key}: {place} does not exist; set data.root to the folder that holds it"


def _accelerator(config: TrainConfig) -> Iterator[str]:
    wanted = config.trainer.accelerator
    available = {"gpu": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(wanted, True):
        yield f"trainer.accelerator={wanted}: there is none on this machine; use auto or cpu"
    if config.model.device.startswith("cuda") and not torch.cuda.is_available():
        yield f"model.device={config.model.device}: torch sees no CUDA device; use auto or cpu"


def _model(config: TrainConfig) -> Iterator[str]:
    text = model_config(config.model).get_text_config()
    config.scr.check_depth(int(text.num_hidden_layers))
    rank = config.predictor.rank
    if rank is not None and rank > text.hidden_size:
        yield f"predictor.rank={rank}: at most the model's hidden size, {text.hidden_size}"
