"""What can be done with a predictor folder: `python -m export COMMAND ...`.

verify FOLDER
diff FOLDER FOLDER
card FOLDER evaluation=evaluation.json
engines FOLDER [formats=onnx,pt2]
push FOLDER repo=ORG/NAME [private=true] [revision=BRANCH]
pull repo=ORG/NAME folder=FOLDER [revision=COMMIT]
promote name=MODEL version=N [force=true why=REASON] [who=NAME] [tracking.uri=URI]
rollback name=MODEL [why=REASON] [who=NAME] [tracking.uri=URI]

Each imports what it needs itself: torch takes seconds to import, MLflow and Lightning too.
"""

from __future__ import annotations

import getpass
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, get_args

from configs import load_config
from configs.cli import HELP
from evaluation.tables import bullets, paragraph, table
from export.errors import ExportError, PublishError

if TYPE_CHECKING:
    from mlflow import MlflowClient

Options = Mapping[str, str]


def verify(folders: Sequence[Path], options: Options) -> int:
    """Reads a folder strictly, compares its golden pair, and the files of other engines if there are any."""
    from export import engines
    from scr_runtime import load_predictor

    predictor = load_predictor(folders[0], verify=True)
    print(paragraph(f"{folders[0]}: {predictor!r}"))
    print("all checksums fit, and the golden inputs give the stored answers")
    for name, error in engines.check_engines(folders[0], predictor).items():
        print(f"{name}: outputs equal the predictor's to {error:.1e}")
    return 0


def diff(folders: Sequence[Path], options: Options) -> int:
    """Prints what tells two folders apart."""
    from export.difference import differences

    rows, sentences = differences(folders[0], folders[1])
    print(table(rows) if len(rows) > 1 else "config.json says the same in both")
    print(bullets(sentences))
    return 0


def card(folders: Sequence[Path], options: Options) -> int:
    """Rewrites the model card with the verdict of an evaluation."""
    from export.card import write_card
    from scr_runtime import load_predictor

    try:
        verdict = json.loads(Path(options["evaluation"]).read_text(encoding="utf-8"))["verdict"]
        evaluation = {key: str(verdict[key]) for key in ("sentence", "reason")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ExportError(f"evaluation={options['evaluation']}: not what python -m evaluation writes") from error
    load_predictor(folders[0])
    print(write_card(folders[0], evaluation))
    return 0


def write_engines(folders: Sequence[Path], options: Options) -> int:
    """Writes model.onnx and model.pt2 into a folder."""
    from export import engines

    asked = options.get("formats", ",".join(get_args(engines.Engine))).split(",")
    if unknown := sorted(set(asked) - set(get_args(engines.Engine))):
        raise ExportError(f"formats={','.join(unknown)}: expected {' or '.join(get_args(engines.Engine))}")
    chosen: tuple[engines.Engine, ...] = tuple(one for one in get_args(engines.Engine) if one in asked)
    for engine, error in engines.write_engines(folders[0], chosen).items():
        print(f"{folders[0] / f'model.{engine}'}: outputs equal the predictor's to {error:.1e}")
    return 0


def push(folders: Sequence[Path], options: Options) -> int:
    """Uploads a folder to the Hub."""
    from export import hub

    private = _truth(options, "private")
    commit = hub.push(folders[0], options["repo"], private=private, revision=options.get("revision"))
    print(f'{options["repo"]} at {commit}\nuse it: SCR(model, predictor="{options["repo"]}", revision="{commit}")')
    return 0


def pull(folders: Sequence[Path], options: Options) -> int:
    """Downloads a folder from the Hub."""
    from export import hub

    print(hub.pull(options["repo"], Path(options["folder"]).expanduser(), options.get("revision")))
    return 0


def promote(folders: Sequence[Path], options: Options) -> int:
    """Moves @champion to a version that is better."""
    from mlflow.exceptions import MlflowException

    from export import registry

    client, uri = _tracking(options)
    order = registry.Order(_who(options), options.get("why", ""), _truth(options, "force"))
    try:
        found = registry.promote(client, uri, options["name"], options["version"], order)
    except MlflowException as error:
        raise PublishError(f"version {options['version']} of {options['name']}: {error}") from error
    print(paragraph(f"models:/{options['name']}@{registry.CHAMPION} is version {options['version']}: {found}"))
    return 0


def rollback(folders: Sequence[Path], options: Options) -> int:
    """Moves @champion back."""
    from mlflow.exceptions import MlflowException

    from export import registry

    client, _ = _tracking(options)
    try:
        former, now = registry.rollback(client, options["name"], registry.Order(_who(options), options.get("why", "")))
    except MlflowException as error:
        raise PublishError(f"{options['name']}: {error}") from error
    print(paragraph(f"models:/{options['name']}@{registry.CHAMPION} is version {now} again, and no longer {former}"))
    return 0


class Command(NamedTuple):
    """One of the commands.

    Attributes:
        run: (folders, options) -> exit code.
        usage: Its arguments, as they are typed; options in brackets may be left out.
    """

    run: Callable[[Sequence[Path], Options], int]
    usage: str


_REGISTRY = "[why=REASON] [who=NAME] [tracking.uri=URI] [runs_dir=FOLDER]"
COMMANDS = {
    "verify": Command(verify, "FOLDER"),
    "diff": Command(diff, "FOLDER FOLDER"),
    "card": Command(card, "FOLDER evaluation=FILE"),
    "engines": Command(write_engines, "FOLDER [formats=onnx,pt2]"),
    "push": Command(push, "FOLDER repo=ORG/NAME [private=true] [revision=BRANCH]"),
    "pull": Command(pull, "repo=ORG/NAME folder=FOLDER [revision=COMMIT]"),
    "promote": Command(promote, f"name=MODEL version=N [force=true] {_REGISTRY}"),
    "rollback": Command(rollback, f"name=MODEL {_REGISTRY}"),
}


def run_command(name: str, arguments: Sequence[str]) -> int:
    """Checks the arguments of a command against its usage, and runs it.

    Raises:
        ExportError: If one is missing, unknown or given twice.
    """
    command = COMMANDS[name]
    if HELP & set(arguments):
        print(f"usage: python -m export {name} {command.usage}\n{command.run.__doc__}")
        return 0
    words = command.usage.split()
    keys = {word.strip("[]").split("=")[0]: word[0] != "[" for word in words if "=" in word}
    folders = [Path(text).expanduser() for text in arguments if "=" not in text]
    options = dict(text.split("=", 1) for text in arguments if "=" in text)
    problems = [f"{key}= is missing" for key, needed in keys.items() if needed and not options.get(key)]
    problems += [f"unknown {key}=" for key in options if key not in keys]
    if len(folders) != words.count("FOLDER"):
        problems.append(f"{len(folders)} folders are given, expected {words.count('FOLDER')}")
    if len(folders) + len(options) < len(arguments):
        problems.append("an option is given twice")
    if problems:
        raise ExportError(f"{'; '.join(problems)}. Usage: python -m export {name} {command.usage}")
    return command.run(folders, options)


def _truth(options: Options, key: str) -> bool:
    value = options.get(key, "false")
    if value not in ("true", "false"):
        raise ExportError(f"{key}={value}: expected true or false")
    return value == "true"


def _who(options: Options) -> str:
    return options.get("who") or getpass.getuser()


def _tracking(options: Options) -> tuple[MlflowClient, str]:
    """The tracking store that train.py uses, or the one that is given."""
    from pipeline.tracking import connect

    config = load_config([f"{key}={options[key]}" for key in ("tracking.uri", "runs_dir") if key in options])
    return connect(config.tracking_uri, [], config.paths.mlflow_artifacts), config.tracking_uri
