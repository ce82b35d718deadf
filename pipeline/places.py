"""Whether the folders and files that a command names are there: known within a second, before torch is imported."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from configs import TrainConfig
from configs.load import CONFIGS
from data.settings import CATEGORY_KINDS
from pipeline.errors import RunError
from scr_runtime.terminal import filled


def check_places(configs: Sequence[TrainConfig], sections: Collection[str]) -> None:
    """Checks where results go and data come from, for every configuration of a command.

    Args:
        configs: The configurations.
        sections: What the command does: harvest, evaluation, tuning; and run, where it takes what the newest run made.

    Raises:
        RunError: With every problem, each once.
    """
    checks: list[Callable[[TrainConfig], Iterator[str]]] = [_runs_dir]
    checks += [_training_data] * ("harvest" in sections)
    checks += [_held_out_data, _evaluation_files] * ("evaluation" in sections) + [_newest_run] * ("run" in sections)
    checks += [_tuning] * ("tuning" in sections)
    if problems := [problem for config in configs for check in checks for problem in check(config)]:
        raise RunError(listed(problems))


def listed(problems: Sequence[str]) -> str:
    """Problems below their number, each once, as wide as the terminal."""
    problems = list(dict.fromkeys(problems))
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return "\n".join([f"{count} before the start", *(filled(problem, "  ", "      ") for problem in problems)])


def _runs_dir(config: TrainConfig) -> Iterator[str]:
    folder = Path(config.runs_dir).expanduser()
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".probe-", dir=existing):
            pass
    except OSError as error:
        yield f"runs_dir={config.runs_dir}: {existing} can't be written ({error.strerror}); choose another folder"


def _newest_run(config: TrainConfig) -> Iterator[str]:
    if not config.paths.latest.exists():
        yield f"no complete run at {config.paths.latest}: run train.py first"


def _tuning(config: TrainConfig) -> Iterator[str]:
    if config.harvest.tuning < 2:
        yield f"harvest.tuning={config.harvest.tuning} keeps too few images to choose by; the paper takes 200"
    file = tuned_file(config.model.name)
    if file.exists() and not config.overwrite:
        yield f"{file} is there, and the result goes there: move it, or add overwrite=true"


def tuned_file(name: str) -> Path:
    """Where the tuned settings of a model go."""
    return CONFIGS / "model" / f"{name}-tuned.yaml"


def _training_data(config: TrainConfig) -> Iterator[str]:
    about = [kind for kind in config.harvest.prompts if kind in CATEGORY_KINDS]
    if about and config.paths.train_annotations is None:
        yield (
            f"harvest.prompts: {', '.join(dict.fromkeys(about))} ask about annotated objects, and data="
            f"{config.data.name} has no annotations; use caption, or texts of several words"
        )
    if config.data.world is None:  # else it will be rendered
        yield from _missing(config, "train_images", "train_annotations")


def _held_out_data(config: TrainConfig) -> Iterator[str]:
    settings = config.evaluation
    if config.data.world is not None or not settings.asks:
        return
    images = ["eval_images"] * (settings.images_dir is None)
    annotated = settings.annotations is not None or (settings.pope_files and settings.images_dir)
    yield from _missing(config, *images, *["eval_annotations"] * (not annotated))


def _missing(config: TrainConfig, *keys: str) -> Iterator[str]:
    root = config.paths.data
    places: dict[str, Path | None] = {key: getattr(config.paths, key) for key in keys}
    missing = {key: place for key, place in places.items() if place is not None and not place.exists()}
    if missing and not root.exists():
        yield f"data.root: {root} does not exist{_beside(root)}; set it to the folder of data={config.data.name}"
        return
    for key, place in missing.items():
        yield f"data.{key}: {place} does not exist; data.root has to be the folder that holds it"


def _evaluation_files(config: TrainConfig) -> Iterator[str]:
    settings = config.evaluation
    for key in ("images_dir", "annotations", "captions", "synonyms", "pope_files", "pope_labels", "predictors"):
        given: str | list[str] | None = getattr(settings, key)
        for text in [given] if isinstance(given, str) else given or []:
            place = Path(text).expanduser()
            if not place.exists():
                named = "predictor (evaluation.predictors)" if key == "predictors" else f"evaluation.{key}"
                yield f"{named}: {place} does not exist{_beside(place)}"


def _beside(place: Path) -> str:
    """What lies beside a path that does not exist."""
    names = sorted(other.name for other in place.parent.iterdir()) if place.parent.is_dir() else []
    return f"; beside it: {', '.join(names[:8])}{' ...' * (len(names) > 8)}" if names else ""
