"""The commands as they are typed: each is parsed and checked before torch, Lightning and MLflow are imported.

data/harvest.py and the __main__.py of export, evaluation and playground name these functions; train.py starts in the
same way.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Collection, Sequence
from importlib import import_module
from pathlib import Path

from configs import TrainConfig, parse_cli
from configs.keys import closest
from configs.load import CONFIGS, KEYS, saved_config, split_values
from pipeline.errors import RunError
from pipeline.places import check_places
from scr_runtime.terminal import filled

_SHORT = ("benchmarks", "methods")
_OF_A_FOLDER = ("verify", "diff", "card", "engines", "push", "pull", "promote", "rollback")


def harvest(argv: Sequence[str] | None = None) -> int:
    """`python -m data.harvest`."""
    about = [
        "Runs the diagnostic over training images and keeps states and attention maps as shards.",
        "python -m data.harvest model=scene-llava harvest.samples=1000",
    ]
    config = parse_cli(argv, "python -m data.harvest", about, uses=("model", "data", "harvest"))
    return start(
        "python -m data.harvest", [config], lambda: import_module("pipeline.harvest").run(config), ["harvest"]
    )


def export(argv: Sequence[str] | None = None) -> int:
    """`python -m export`, and its commands for finished predictor folders."""
    about = [
        "Exports the best checkpoint of a finished fit again, for example with another fallback target.",
        "python -m export model=scene-llava predictor.target_fallback=0.1",
        "python -m export --config runs/fits/scene-llava/latest predictor.target_fallback=0.1",
        f"python -m export {'|'.join(_OF_A_FOLDER)} ...   what a folder is good for: docs/deploy.md",
    ]
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and "=" not in arguments[0] and arguments[0][:1] != "-":
        if arguments[0] not in _OF_A_FOLDER:
            near = closest(arguments[0], _OF_A_FOLDER)
            hint = f" Did you mean {near}?" if near else ""
            print(f"error: no command {arguments[0]}.{hint} Commands: {', '.join(_OF_A_FOLDER)}", file=sys.stderr)
            return 2
        return exit_code(lambda: import_module("pipeline.predictors").run_command(arguments[0], arguments[1:]))
    config = parse_cli(arguments, "python -m export", about, uses=("predictor", "trainer"))
    run = _run_of(arguments)
    sections = ["run"] * (run is None)
    return start("python -m export", [config], lambda: import_module("pipeline.export").run(config, run), sections)


def evaluation(argv: Sequence[str] | None = None) -> int:
    """`python -m evaluation`, and its commands compare and tune."""
    program, arguments = "python -m evaluation", list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments and arguments[0] in ("compare", "tune") else ""
    if command == "compare":
        return exit_code(lambda: import_module("pipeline.compare_runs").compare_runs(arguments[1:]))
    about = [
        "Asks a model yes/no questions and captions under every method, and says whether SCR helps it.",
        f"{program} model=scene-llava benchmarks=pope,chair methods=all predictor=FOLDER,FOLDER",
        f"{program} --config runs/fits/scene-llava/latest   as that run, and its predictor",
        f"{program} compare RUN RUN ...   finished evaluations in one table",
        f"{program} tune ...              chooses strength, sources and layers on the tuning images",
    ]
    uses = ("model", "data", "evaluation", *(["harvest"] if command == "tune" else []))
    config = parse_cli(long_forms(arguments[bool(command) :]), program, about, uses=uses)
    if command == "tune":
        tune = f"{program} tune"
        return start(tune, [config], lambda: import_module("pipeline.tune").tune(config), ["harvest", "tuning"])
    run = _run_of(arguments)
    if run is not None and not config.evaluation.predictors:
        chosen = config.evaluation.model_copy(update={"predictors": [str(run / "predictor")]})
        config = config.model_copy(update={"evaluation": chosen})
    typed = shlex.join([*program.split(), *arguments])
    needs = bool({"one-pass", "auto"} & set(config.evaluation.methods)) and not config.evaluation.predictors
    sections = ["evaluation", *["run"] * needs]
    return start(program, [config], lambda: import_module("pipeline.evaluate").run(config, typed), sections)


def playground(argv: Sequence[str] | None = None) -> int:
    """`python -m playground`."""
    program, arguments = "python -m playground", list(sys.argv[1:] if argv is None else argv)
    ports = [text for text in arguments if text.startswith("port=")]
    about = [
        "Opens a local page: one picture and one question under every mode, with maps, sources and timings.",
        f"{program} model=scene-llava predictor=FOLDER port=7860",
    ]
    settings = long_forms([text for text in arguments if text not in ports])
    config = parse_cli(settings, program, about, uses=("model", "data"))
    port = ports[-1] if ports else "port=7860"
    return start(program, [config], lambda: import_module("pipeline.playground").serve(config, port), ["evaluation"])


def start(
    program: str, configs: Sequence[TrainConfig], command: Callable[[], int], sections: Collection[str] = (),
    *, resumes: bool = True,
) -> int:  # fmt: skip
    """Says what begins, checks its places, and runs a command of the pipeline, which takes seconds to import.

    Args:
        program: What was typed.
        configs: One, or those of a sweep.
        command: Runs it.
        sections: What it does, beside loading the model: harvest, evaluation.
        resumes: Whether the same command resumes what is stopped.

    Returns:
        The command's exit code.
    """
    config, more = configs[0], f" (the first of {len(configs)} runs)" if len(configs) > 1 else ""
    print(
        filled(f"{program}: {config.model.name} on {config.data.name}{more}, files in {config.runs_dir}"), flush=True
    )
    try:
        check_places(configs, sections)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return exit_code(command, resumes)


def exit_code(command: Callable[[], int], resumes: bool = True) -> int:
    """Runs a command; returns its exit code, or that of what it raises."""
    try:
        exits = import_module("pipeline.exits")
    except KeyboardInterrupt:
        print("\nStopped before the start.", file=sys.stderr)
        return 130
    exits.quieten_libraries()
    return exits.exit_code(command, resumes)


def long_forms(arguments: Sequence[str]) -> list[str]:
    """Writes out `benchmarks=a,b`, `methods=a,b`, `predictor=FOLDER,...` and lists of evaluation.* without brackets.

    A `predictor=` that names an option of the group stays the group's.
    """
    options = {path.stem for path in (CONFIGS / "predictor").glob("*.yaml")}
    found: list[str] = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key in _SHORT:
            key = f"evaluation.{key}"
        elif equals and key == "predictor" and not set(split_values(value)) <= options:
            key = "evaluation.predictors"
        known = KEYS.get(key)
        if equals and key.startswith("evaluation.") and known is not None and known.is_list and value[:1] != "[":
            value = f"[{', '.join(split_values(value))}]"
        found.append(f"{key}{equals}{value}")
    return found


def _run_of(arguments: Sequence[str]) -> Path | None:
    """The folder of the run whose configuration is taken with --config, if it has a predictor."""
    joined = "\n".join(arguments).replace("--config\n", "--config=").split("\n")
    file = saved_config(joined)
    return file.parent if file is not None and (file.parent / "predictor").is_dir() else None
