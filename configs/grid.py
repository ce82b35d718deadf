"""Grids: several values for a key on the command line make a sweep, and every point of it is a configuration.

``predictor.loss=kl,bce seed=0,1`` gives four children, ``predictor=default,paper`` two. Commas inside brackets and
quotes belong to the value. All children are checked before the first one starts.
"""

from __future__ import annotations

import itertools
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from configs.cli import parse_cli
from configs.load import CONFIGS, KEYS, SAVED, compose, digest, split_values
from configs.problems import COMMAND_LINE, ConfigError, Problem
from configs.schema import TrainConfig

HELP = (
    "Several values for a key or a group, with commas and no spaces, are a sweep over all their combinations: "
    "predictor.loss=kl,bce seed=0,1,2 fits six predictors as children of one MLflow run, and the same command again "
    "resumes where it was interrupted. Lists keep their brackets: harvest.prompts=[present,random],[caption] has two "
    "values. A comma that belongs to a text needs quotes: tracking.experiment='\"a,b\"'."
)
# What a sweep can't vary: its children lie together, and it names them itself.
_FIXED = ("runs_dir", "tracking", "variant", "harvest.name")


@dataclass(frozen=True)
class Child:
    """One run: of a sweep, or of a command that has one value for each key."""

    config: TrainConfig
    choices: Mapping[str, str]
    """Swept key -> its value here, as it was typed; empty for a plain run."""
    groups: Mapping[str, str]
    """Group -> the option that was taken."""
    given: Mapping[str, str] = field(default_factory=dict)
    """Key -> value, of what has one value on the command line."""

    @property
    def label(self) -> str:
        """The choices as they would be typed: ``predictor.loss=bce seed=2``."""
        return " ".join(f"{key}={value}" for key, value in self.choices.items())

    @property
    def short_label(self) -> str:
        """The choices under the last word of each key: ``loss=bce seed=2``."""
        names = short_names(self.choices)
        return " ".join(f"{names[key]}={value}" for key, value in self.choices.items())


@dataclass(frozen=True)
class Sweep:
    """What a command line asks for."""

    keys: tuple[str, ...]
    """Swept keys and groups, as typed; empty for a plain run, which has one child."""
    children: tuple[Child, ...]


def short_names(keys: typing.Iterable[str]) -> dict[str, str]:
    """Key -> its last word, or the whole key where two would be called the same."""
    last = {key: key.rpartition(".")[2] for key in keys}
    shared = [name for name in last.values() if list(last.values()).count(name) > 1]
    return {key: key if name in shared else name for key, name in last.items()}


def parse_sweep(argv: Sequence[str] | None, prog: str, about: Sequence[str]) -> Sweep:
    """Turn the command line into a sweep; help and problems end the process as `configs.cli.parse_cli` does."""
    return parse_cli(argv, prog, about, load_sweep, more=HELP)


def load_sweep(
    overrides: Sequence[str] = (), folder: Path = CONFIGS, uses: typing.Collection[str] | None = None
) -> Sweep:
    """Compose the configuration of every combination.

    Args:
        overrides: ``group=option`` and ``section.key=value``, each with one value or several.
        folder: Where the YAML files are.
        uses: Sections that the command uses; None means all.

    Returns:
        Children in the order of the grid, the last key running fastest. Those of a sweep have names (`variant`), and
        harvests of their own where settings of the harvest are swept.

    Raises:
        ConfigError: With every problem of every combination, each reported once.
    """
    fixed, swept = [], dict[str, list[str]]()
    problems: dict[tuple[str, str, str], Problem] = {}
    for text in overrides:
        key, _, value = text.partition("=")
        values = split_values(value)
        if len(values) == 1 or key in swept or key == SAVED:  # composing reports what is given twice
            fixed.append(text)
            continue
        wrong = list(_bad_values(key, values))
        problems |= {(problem.key, str(problem.value), problem.reason): problem for problem in wrong}
        if not any(problem.legal for problem in wrong):  # else no value of it can be used
            swept[key] = [value for value in dict.fromkeys(values) if value]
        elif key in KEYS and KEYS[key].is_list:
            fixed.append(f"{key}=[{value}]")  # what is wrong inside the missing brackets is reported, too
    children = []
    for point in itertools.product(*swept.values()):
        choices = dict(zip(swept, point, strict=True))
        try:
            config, groups = compose([*fixed, *(f"{key}={value}" for key, value in choices.items())], folder, uses)
        except ConfigError as error:
            for problem in error.problems:
                problems.setdefault((problem.key, str(problem.value), problem.reason), problem)
        else:
            given = dict(text.split("=", 1) for text in fixed if "=" in text)
            children.append(Child(_named(config, choices) if swept else config, choices, groups, given))
    if not problems and swept:
        problems |= {(p.key, str(p.value), p.reason): p for p in _equal_children(children)}
    if problems:
        raise ConfigError(list(problems.values()))
    return Sweep(tuple(swept), tuple(children))


def _bad_values(key: str, values: list[str]) -> typing.Iterator[Problem]:
    given = ",".join(values)
    if any(key == fixed or key.startswith(f"{fixed}.") for fixed in _FIXED):
        hint = "Start one command for each value."
        yield Problem(key, given, "can't be swept", "one value", hint, where=COMMAND_LINE)
    if not all(values):
        hint = f"Leave the comma out, or write null: {key}=null,{','.join(filter(None, values))}."
        yield Problem(key, given, "has an empty value", hint=hint, where=COMMAND_LINE)
    for value in sorted({value for value in values if value and values.count(value) > 1}):
        yield Problem(key, given, f"has the value {value} twice", hint="Keep one of the two.", where=COMMAND_LINE)
    if key in KEYS and KEYS[key].is_list and not any(value.startswith("[") for value in values):
        hint = f"Write {key}=[{given}]."
        legal = "[value,...], or several of these with commas between them"
        yield Problem(key, given, "is a list, and lists have brackets", legal, hint, where=COMMAND_LINE)


def _named(config: TrainConfig, choices: Mapping[str, str]) -> TrainConfig:
    """Name a child's own folder: what was chosen, and a checksum of what decides its result.

    The checksum keeps apart the children of two sweeps over the same keys that differ in what they hold fixed.
    Devices, caches and the like do not count: with others of these the same sweep continues.
    """
    own = digest(*config.run_settings)[:6]
    config = config.model_copy(update={"variant": f"{_slug(choices)}-{own}"})
    changed = {key: value for key, value in choices.items() if _decides_harvest(key)}
    if changed and config.harvest.name is None:
        name = f"{config.model.name}-{config.data.name}-{_slug(changed)}"
        config = config.model_copy(update={"harvest": config.harvest.model_copy(update={"name": name})})
    return config


def _decides_harvest(key: str) -> bool:
    """Whether two values of a key need two harvests; the groups model and data are in a harvest's name."""
    if key.startswith("model.scr"):
        return key in ("model.scr", "model.scr.attention_layers")
    return key.startswith(("harvest.", "data.", "model."))


def _slug(choices: Mapping[str, str]) -> str:
    names = short_names(choices)
    words = (f"{names[key]}-{value}" for key, value in choices.items())
    return "_".join(re.sub(r"[^A-Za-z0-9.]+", "-", word).strip("-.") for word in words)[:120]


def _equal_children(children: Sequence[Child]) -> typing.Iterator[Problem]:
    first: dict[str, Child] = {}
    for child in children:
        plain = child.config.model_dump()
        del plain["variant"], plain["harvest"]["name"]
        twin = first.setdefault(digest(plain), child)
        if twin is not child:
            yield Problem(child.label, "", f"has the same settings as {twin.label}", hint="Leave one of the two out.")
