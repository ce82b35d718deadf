"""What can be known before any work: places, layers, devices. All problems are reported together."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch

from configs import TrainConfig
from data.errors import DataError
from data.questions import CATEGORY_KINDS
from data.vlm import model_config
from evaluation.tables import paragraph
from pipeline.errors import RunError
from pipeline.folders import named_folders
from scr_runtime import load_predictor
from scr_runtime.artifact import CONFIG_NAME
from scr_runtime.checks import check_grid, fewer_sources
from scr_runtime.errors import ConfigurationError, SCRError
from scr_runtime.families import FAMILIES


def check_all(
    configs: Sequence[TrainConfig], sections: Collection[str] = ("harvest", "trainer", "evaluation")
) -> None:
    """Checks what the stages will need, for every configuration of a command.

    Args:
        configs: The configurations.
        sections: What the command does, beside loading the model.

    Raises:
        RunError: With every problem, each once.
    """
    problems = list(dict.fromkeys(problem for config in configs for problem in _problems(config, sections)))
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise RunError("\n  ".join([f"{count} before the start", *problems]))
    for note in dict.fromkeys(note for config in configs for note in _fewer_sources(config)):
        print(paragraph(note))


def _problems(config: TrainConfig, sections: Collection[str]) -> Iterator[str]:
    checks = [_runs_dir, _device]
    checks += [_training_data] * ("harvest" in sections) + [_accelerator] * ("trainer" in sections)
    checks += [_held_out_data, _evaluation_files] * ("evaluation" in sections)
    found = [problem for check in checks for problem in _of(check, config)]
    yield from found
    asks_the_hub = not Path(config.model.location).is_dir()  # which takes minutes where there is no network
    if not (found and asks_the_hub):
        for check in [_model] + [_predictors] * ("evaluation" in sections):
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


def _training_data(config: TrainConfig) -> Iterator[str]:
    about = [kind for kind in config.harvest.prompts if kind in CATEGORY_KINDS]
    if about and config.paths.train_annotations is None:
        yield (
            f"harvest.prompts: {', '.join(dict.fromkeys(about))} ask about annotated objects, and data="
            f"{config.data.name} has no annotations; use caption, or texts of several words"
        )
    if config.data.world is None:  # else it will be rendered
        yield from _missing("data.train_images", config.paths.train_images)
        yield from _missing("data.train_annotations", config.paths.train_annotations)


def _held_out_data(config: TrainConfig) -> Iterator[str]:
    settings = config.evaluation
    if config.data.world is not None or not settings.asks:
        return
    if settings.images_dir is None:
        yield from _missing("data.eval_images", config.paths.eval_images)
    if settings.annotations is None and not (settings.pope_files and settings.images_dir):
        yield from _missing("data.eval_annotations", config.paths.eval_annotations)


def _missing(key: str, place: Path | None) -> Iterator[str]:
    if place is not None and not place.exists():
        yield f"{key}: {place} does not exist; set data.root to the folder that holds it"


def _evaluation_files(config: TrainConfig) -> Iterator[str]:
    settings = config.evaluation
    for key in ("images_dir", "annotations", "captions", "synonyms", "pope_files", "pope_labels", "predictors"):
        given: str | list[str] | None = getattr(settings, key)
        for text in [given] if isinstance(given, str) else given or []:
            place = Path(text).expanduser()
            if not place.exists():
                yield f"evaluation.{key}: {place} does not exist{_beside(place)}"
            elif key == "predictors" and not (place / CONFIG_NAME).is_file():
                yield f"evaluation.predictors: {place} has no {CONFIG_NAME}; name folders that train.py exported"


def _beside(place: Path) -> str:
    """What lies beside a path that does not exist."""
    names = sorted(other.name for other in place.parent.iterdir()) if place.parent.is_dir() else []
    return f"; beside it are {', '.join(names[:8])}{' ...' * (len(names) > 8)}" if names else ""


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
    given = [text for text in config.evaluation.predictors if (Path(text).expanduser() / CONFIG_NAME).is_file()]
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
            yield f"evaluation.predictors: {folder} is for a model of {', '.join(other)}: leave it out"
