"""What a model's configuration tells before any work: layers, sources, predictors; and whether devices are there.

Places are checked before (pipeline/places.py). All problems are reported together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch

from configs import TrainConfig
from data.errors import DataError
from data.vlm import model_config
from evaluation.tables import paragraph
from pipeline.errors import RunError
from pipeline.folders import named_folders
from pipeline.places import listed
from scr_runtime import load_predictor
from scr_runtime.artifact import CONFIG_NAME
from scr_runtime.checks import check_grid, fewer_sources
from scr_runtime.errors import ConfigurationError, SCRError
from scr_runtime.families import FAMILIES


def check_all(
    configs: Sequence[TrainConfig], sections: Collection[str] = ("harvest", "trainer", "evaluation")
) -> None:
    """Checks what the stages will need, for every configuration of a command; its places have been checked before.

    Args:
        configs: The configurations.
        sections: What the command does, beside loading the model.

    Raises:
        RunError: With every problem, each once.
    """
    if problems := [problem for config in configs for problem in _problems(config, sections)]:
        raise RunError(listed(problems))
    for note in dict.fromkeys(note for config in configs for note in _fewer_sources(config)):
        print(paragraph(note))


def _problems(config: TrainConfig, sections: Collection[str]) -> Iterator[str]:
    checks = [_device, _model] + [_accelerator] * ("trainer" in sections) + [_predictors] * ("evaluation" in sections)
    for check in checks:
        yield from _of(check, config)


def _of(check: Callable[[TrainConfig], Iterator[str]], config: TrainConfig) -> Iterator[str]:
    try:
        yield from check(config)
    except (DataError, SCRError) as error:
        yield str(error).replace("SCRConfig.", "model.scr.")  # what the library calls its settings


def _accelerator(config: TrainConfig) -> Iterator[str]:
    wanted = config.trainer.accelerator
    available = {"gpu": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(wanted, True):
        yield f"trainer.accelerator={wanted}: there is none on this machine; use auto or cpu"


def _device(config: TrainConfig) -> Iterator[str]:
    if config.model.device.startswith("cuda") and not torch.cuda.is_available():
        yield f"model.device={config.model.device}: torch sees no CUDA device; use auto or cpu"


def _model(config: TrainConfig) -> Iterator[str]:
    text = model_config(config.model).get_text_config()
    config.scr.check_depth(int(text.num_hidden_layers))
    if "online" in config.evaluation.methods and config.evaluation.asks:
        config.scr.behind_map(int(text.num_hidden_layers))
    rank = config.predictor.rank
    if rank is not None and rank > text.hidden_size:
        yield f"predictor.rank={rank}: at most the model's hidden size, {text.hidden_size}"


def _fewer_sources(config: TrainConfig) -> Iterator[str]:
    """Says that K is more than the images of a family with one grid have room for."""
    model = model_config(config.model)
    family = FAMILIES.get(model.model_type)
    if family is None:
        return
    with contextlib.suppress(ConfigurationError):  # no patch can be a source: the harvest says
        grid = check_grid(SimpleNamespace(config=model), family, config.scr)
        if grid is not None and (words := fewer_sources(grid, config.scr)) is not None:
            yield f"note: model.scr: {words}"


def _predictors(config: TrainConfig) -> Iterator[str]:
    """Those of evaluation.predictors, which are compared hours later; then their embeddings are looked at, too."""
    given: list[str] = []
    for text in config.evaluation.predictors:
        if (Path(text).expanduser() / CONFIG_NAME).is_file():
            given.append(text)
        else:
            inside = f"{text.rstrip('/')}/predictor"
            hint = f"did you mean {inside}?" if Path(inside).expanduser().is_dir() else "name folders of train.py"
            yield f"predictor (evaluation.predictors): {text} has no {CONFIG_NAME}; {hint}"
    if not given:
        return
    model = model_config(config.model)
    text = model.get_text_config()
    found = {"family": model.model_type, "hidden_size": text.hidden_size, "num_blocks": text.num_hidden_layers}
    for folder in named_folders(given, []).values():
        expected = load_predictor(folder).info["model"]
        other = [f"{key} {expected[key]!r}, not {value!r}" for key, value in found.items()
                 if expected.get(key, value) != value]  # fmt: skip
        if other:
            yield f"predictor (evaluation.predictors): {folder} is for a model of {', '.join(other)}: leave it out"
