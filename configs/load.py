"""YAML groups and ``key=value`` overrides, merged by OmegaConf into the dataclasses of configs/schema.py.

``configs/<defaults>.yaml`` names one file for each group (``model: scene-llava`` means
configs/model/scene-llava.yaml) and sets further keys. The command line comes last: ``model=llava-1.5-7b``
chooses a file, ``trainer.max_epochs=3`` sets a key. A group's file may set keys of other sections under
``elsewhere`` (a data set knows how many images its harvest takes). Whatever is wrong is collected and told at
once, in one `ConfigError`. Several values for a key (``seed=0,1,2``) are a sweep: configs/sweep.py.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import hashlib
import inspect
import itertools
import json
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.schema import PROJECT_ROOT, Problem, Rule

CONFIGS = Path(__file__).resolve().parent
COMMAND_LINE = "command line"
TERMINAL_COLUMNS = 110

Config = TypeVar("Config")
Loaded = TypeVar("Loaded")


class ConfigError(ValueError):
    """A configuration that can't be used; `problems` holds everything that is wrong with it."""

    def __init__(self, problems: Sequence[Problem]):
        self.problems = tuple(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__("\n".join([f"{count} in the configuration", *map(_describe, self.problems)]))


@dataclass(frozen=True)
class Key:
    """One key of the schema, or one section of keys."""

    path: str
    kind: Any
    """Its annotation; for a section, the dataclass."""
    rule: Rule
    doc: str
    section: bool = False
    optional: bool = False


# ---- public ----


def load_config(
    cls: type[Config],
    defaults: str = "train",
    overrides: Sequence[str] = (),
    folder: Path = CONFIGS,
) -> Config:
    """Compose ``<folder>/<defaults>.yaml``, the files of its groups, and the overrides.

    Args:
        cls: Dataclass of the whole configuration.
        defaults: Name of the YAML file with the group choices.
        overrides: ``group=option`` and ``section.key=value``, in any order.
        folder: Where the YAML files are.

    Returns:
        A checked instance of `cls`.

    Raises:
        ConfigError: With every problem found; several values for one key are one.
    """
    return compose(cls, defaults, overrides, folder)[0]


def compose(
    cls: type[Config], defaults: str = "train", overrides: Sequence[str] = (), folder: Path = CONFIGS
) -> tuple[Config, dict[str, str]]:
    """Do what `load_config` does, and tell which option each group took."""
    build = _Build(cls)
    top = build.read(folder / f"{defaults}.yaml")
    several = [text for text in overrides if len(split_values(text.partition("=")[2])) > 1]
    for text in several:
        key, _, value = text.partition("=")
        build.fail(
            key,
            value,
            "holds several values, and only `python train.py` runs a sweep over them",
            legal="one value",
            hint=f"A comma that belongs to the value needs quotes: {key}='\"{value}\"'.",
            where=COMMAND_LINE,
        )
    overrides = [text for text in overrides if text not in several]
    groups = build.choose(top.pop("groups", {}), overrides, folder)
    for group, option in groups.items():
        path = folder / group / f"{option}.yaml"
        content = build.read(path, group)
        elsewhere = content.pop("elsewhere", {})
        build.assign({group: content, **elsewhere}, path)
    build.assign(top, folder / f"{defaults}.yaml")
    build.override([text for text in overrides if "=" not in text or text.partition("=")[0] not in groups])
    return build.finish(), groups


def split_values(text: str) -> list[str]:
    """Split at the commas that stand outside of brackets, braces and quotes.

    ``a,b`` has two values, ``[a,b]`` and ``"a,b"`` have one. Whatever is not closed is one value: reading it as
    YAML will tell.
    """
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'" and (depth or not parts[-1].strip()):  # elsewhere an apostrophe is a letter
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth = max(0, depth - 1)
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [text] if depth or quote else [part.strip() for part in parts] if len(parts) > 1 else parts


def read_config(cls: type[Config], path: Path) -> Config:
    """Read a resolved configuration that `save_config` wrote.

    Raises:
        ConfigError: With every problem found.
    """
    build = _Build(cls)
    build.assign(build.read(path), path)
    return build.finish()


def save_config(config: Any, path: Path) -> None:
    """Write the resolved configuration as YAML; folders are made as needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True), encoding="utf-8")


def fingerprint(*sections: Any) -> str:
    """Hash settings: equal content gives an equal sha256 hex digest, whatever the order of the keys.

    Args:
        sections: Dataclasses, or plain containers of str, int, float, bool and None.
    """

    def plain(section: Any) -> Any:
        return dataclasses.asdict(section) if is_dataclass(section) and not isinstance(section, type) else section

    text = json.dumps([plain(section) for section in sections], sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def parse_cli(
    cls: type[Config],
    defaults: str = "train",
    argv: Sequence[str] | None = None,
    prog: str = "python train.py",
    description: str = "",
) -> Config:
    """Turn the command line into a configuration.

    On ``-h`` or ``--help``, prints the help and leaves with status 0. If anything is wrong, prints every
    problem on stderr and leaves with status 2.

    Args:
        cls: Dataclass of the whole configuration.
        defaults: Name of the YAML file with the group choices.
        argv: Arguments after the program's name; those of the process if None.
        prog: How the program is called.
        description: What it does, for the help.
    """
    return run_cli(lambda overrides: load_config(cls, defaults, overrides), cls, defaults, argv, prog, [description])


def run_cli(
    load: Callable[[Sequence[str]], Loaded],
    cls: type,
    defaults: str,
    argv: Sequence[str] | None,
    prog: str,
    about: Sequence[str],
) -> Loaded:
    """Load from the command line, or leave the process with the help (status 0) or with all problems (status 2)."""
    argv = sys.argv[1:] if argv is None else argv
    if "-h" in argv or "--help" in argv:
        print(f"usage: {prog} [group=option ...] [section.key=value ...]\n")
        for paragraph in filter(None, about):
            print(_fill(paragraph, 0), end="\n\n")
        print(help_text(cls, defaults))
        raise SystemExit(0)
    try:
        return load(argv)
    except ConfigError as error:
        print(f"{error}\n`{prog} --help` lists every key.", file=sys.stderr)
        raise SystemExit(2) from None


def help_text(cls: type, defaults: str = "train", folder: Path = CONFIGS) -> str:
    """List the groups with their options, and every key with its type, legal values, default and meaning."""
    config = OmegaConf.structured(load_config(cls, defaults, folder=folder))
    groups = typing.cast(dict[str, str], OmegaConf.select(OmegaConf.load(folder / f"{defaults}.yaml"), "groups"))
    lines = ["groups: group=option takes configs/<group>/<option>.yaml (* default)", ""]
    for group, chosen in groups.items():
        options = "  ".join(option + "*" * (option == chosen) for option in _options(folder, group))
        lines.append(_fill(f"{group:<12}{options}", 2, 14))
    lines += ["", "keys: section.key=value, with their defaults"]
    for key in _walk(cls):
        if key.section:
            lines += ["", _fill(f"{key.path}: {key.doc}", 0)]
            continue
        value = _value_text(OmegaConf.select(config, key.path))
        lines.append(_fill(f"{key.path}={value}  ({_legal(key)})", 2, 6))
        lines.append(_fill(key.doc, 6))
    return "\n".join(lines)


# ---- building ----


class _Build:
    """A configuration in the making, with the problems met so far."""

    def __init__(self, cls: type):
        self.cls = cls
        self.keys = {key.path: key for key in _walk(cls)}
        self.config: DictConfig = OmegaConf.structured(cls)
        for path, key in self.keys.items():  # a section without a default starts with all its keys missing
            if key.section and not key.optional:
                OmegaConf.update(self.config, path, OmegaConf.structured(key.kind), merge=False)
        self.sources: dict[str, str] = {}
        self.problems: list[Problem] = []
        self.unread: list[str] = []
        """Sections whose file could not be read: nothing is said about the keys that they lack."""

    def fail(self, key: str, value: Any, reason: str, **more: Any) -> None:
        self.problems.append(Problem(key, value, reason, **more))

    def told(self, path: str) -> bool:
        """Tell whether `path` already has a problem."""
        return any(path == problem.key for problem in self.problems)

    def read(self, path: Path, section: str = "") -> dict[str, Any]:
        """Read the YAML file of a section (or of all) into plain containers, interpolations kept."""
        try:
            plain = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        except OSError as error:
            self.fail(_name_file(path), "", f"can't be read: {error.strerror}")
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            self.fail(_name_file(path), "", f"is not valid YAML: {_one_line(error)}")
        else:
            if isinstance(plain, dict):
                return typing.cast(dict[str, Any], plain)
            self.fail(_name_file(path), "", f"is a {type(plain).__name__}", legal="lines of key: value")
        self.unread.append(section)
        return {}

    def choose(self, defaults: Mapping[str, str], overrides: Sequence[str], folder: Path) -> dict[str, str]:
        """Take the option of each group from the overrides, or else from the defaults file."""
        chosen = dict(defaults)
        given: set[str] = set()
        for text in overrides:
            group, equals, option = text.partition("=")
            if not equals or group not in defaults:
                continue
            if group in given:
                self.fail(group, option, "is chosen twice", hint="Keep one of the two.", where=COMMAND_LINE)
            given.add(group)
            options = _options(folder, group)
            if option in options:
                chosen[group] = option
            else:
                close = _closest(option, options)
                self.fail(
                    group,
                    option,
                    f"no file configs/{group}/{option}.yaml",
                    legal=" | ".join(options),
                    hint=f"Did you mean {group}={close}?" if close else "",
                    where=COMMAND_LINE,
                )
        return chosen

    def override(self, overrides: Sequence[str]) -> None:
        """Assign ``key=value`` texts of the command line."""
        given: set[str] = set()
        for text in overrides:
            path, equals, value_text = text.partition("=")
            name = path.lstrip("+~-")
            if path != name:
                hint = f"Write {name}={value_text or 'VALUE'}." if name in self.keys else self.suggest(name)
                reason = f'starts with "{path[0]}": keys are neither added nor removed, and there are no flags'
                self.fail(path, value_text, reason, legal="key=value", hint=hint, where=COMMAND_LINE)
                continue
            if not equals:
                hint = f"Write {path}=VALUE." if path in self.keys else self.suggest(path)
                self.fail(path, "", 'has no "="', legal="key=value", hint=hint, where=COMMAND_LINE)
                continue
            if path in given:
                hint = "Keep one of the two."
                self.fail(path, value_text, "is given twice", hint=hint, where=COMMAND_LINE)
                continue
            given.add(path)
            try:
                item = OmegaConf.from_dotlist([f"value={value_text}"])
                value = typing.cast(dict[str, Any], OmegaConf.to_container(item, resolve=False))["value"]
            except (yaml.YAMLError, OmegaConfBaseException) as error:
                self.fail(path, value_text, f"is not a YAML value: {_one_line(error)}", where=COMMAND_LINE)
                continue
            self.assign_one(path, value, COMMAND_LINE)

    def assign(self, content: Mapping[str, Any], path: Path) -> None:
        """Assign what a YAML file says."""
        for name, value in content.items():
            self.assign_one(str(name), value, _name_file(path))

    def assign_one(self, path: str, value: Any, where: str) -> None:
        """Assign one value to one key, or a mapping to one section."""
        key = self.keys.get(path)
        if key is None:
            siblings = self.siblings(path)
            reason = "there is no such key"
            self.fail(path, value, reason, legal=siblings, hint=self.suggest(path), where=where)
            return
        parent = path.rpartition(".")[0]
        if parent and OmegaConf.select(self.config, parent) is None:
            reason = f"{parent} is null here"
            hint = f"Choose a file whose {parent} is set, or leave this key out."
            self.fail(path, value, reason, hint=hint, where=where)
            return
        self.sources[path] = where
        if key.section:
            if isinstance(value, Mapping):
                if OmegaConf.select(self.config, path) is None:
                    OmegaConf.update(self.config, path, OmegaConf.structured(key.kind), merge=False)
                for name, item in value.items():
                    self.assign_one(f"{path}.{name}", item, where)
            elif value is None and key.optional:
                OmegaConf.update(self.config, path, None, merge=False)
            else:
                legal = f"{path}.KEY=VALUE with one of: {self.siblings(path + '.')}"
                self.fail(path, value, "is a section, not a value", legal=legal, where=where)
            return
        try:
            OmegaConf.update(self.config, path, value, merge=False)
        except OmegaConfBaseException:
            reason = "can't be null" if value is None else "is of the wrong type"
            self.fail(path, value, reason, legal=_legal(key), where=where)

    def finish(self) -> Any:
        """Check every value, then every contradiction; return the dataclass if all is well."""
        for path, key in self.keys.items():
            section, _, name = path.rpartition(".")
            parent = OmegaConf.select(self.config, section) if section else self.config
            if key.section or parent is None or self.told(path):
                continue
            where = self.sources.get(path, "")
            if OmegaConf.is_missing(parent, name):
                if not any(path.startswith(unread) for unread in self.unread):
                    self.fail(path, "", "has no value", legal=_legal(key), hint=f"Add {path}=VALUE.")
                continue
            try:
                value = OmegaConf.select(self.config, path)
            except OmegaConfBaseException as error:
                self.fail(path, "", _one_line(error), legal=_legal(key), where=where)
                continue
            if not key.rule.admits(value):
                reason = "is none of the choices" if key.rule.choices else "is out of range"
                close = _closest(str(value), [str(choice) for choice in key.rule.choices])
                hint = f"Did you mean {path}={close}?" if close else ""
                self.fail(path, value, reason, legal=_legal(key), hint=hint, where=where)
        self.problems += list(self.contradictions())
        if self.problems:
            raise ConfigError(self.problems)
        return OmegaConf.to_object(self.config)

    def contradictions(self) -> Iterator[Problem]:
        """Run `check` of every section that is complete, leaving out what rests on a wrong value."""
        for path in ["", *(key.path for key in self.keys.values() if key.section)]:
            node = OmegaConf.select(self.config, path) if path else self.config
            try:
                section: Any = OmegaConf.to_object(node) if node is not None else None
            except OmegaConfBaseException:
                continue
            for problem in section.check() if hasattr(section, "check") else ():
                key = f"{path}.{problem.key}" if path else problem.key
                if not any(self.told(involved) for involved in (key, *problem.involves)):
                    yield dataclasses.replace(problem, key=key, where=self.sources.get(key, ""))

    def siblings(self, path: str) -> str:
        """List the keys of the innermost section of `path` that exists."""
        parent = path.rpartition(".")[0]
        while parent and not (parent in self.keys and self.keys[parent].section):
            parent = parent.rpartition(".")[0]
        start = f"{parent}." if parent else ""
        names = [path.removeprefix(start) for path in self.keys if path.startswith(start)]
        return ", ".join(name for name in names if "." not in name)

    def suggest(self, path: str) -> str:
        """Name the key that `path` probably stands for, or nothing."""
        last = path.rpartition(".")[2]
        by_last = {candidate.rpartition(".")[2]: candidate for candidate in self.keys}
        same = [candidate for candidate in self.keys if candidate.rpartition(".")[2] == last]
        meant = " or ".join(same) or _closest(path, self.keys) or by_last.get(_closest(last, by_last))
        return f"Did you mean {meant}?" if meant else ""


def _walk(cls: type, path: str = "") -> Iterator[Key]:
    """Yield the keys of a dataclass: first its own, then section after section."""
    start = f"{path}." if path else ""
    kinds, docs = typing.get_type_hints(cls), _field_docs(cls)
    sections: list[tuple[str, type, bool]] = []
    for field in dataclasses.fields(cls):
        inner, optional = _strip_optional(kinds[field.name])
        if is_dataclass(inner) and isinstance(inner, type):
            sections.append((field.name, inner, optional))
        else:
            rule = field.metadata.get("rule", Rule())
            yield Key(start + field.name, kinds[field.name], rule, docs.get(field.name, ""), optional=optional)
    for name, inner, optional in sections:
        doc = inspect.cleandoc(inner.__doc__ or "")
        yield Key(start + name, inner, Rule(), doc, section=True, optional=optional)
        yield from _walk(inner, start + name)


@functools.cache
def _field_docs(cls: type) -> dict[str, str]:
    """Read the string under each field from the source: Python itself forgets it."""
    body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]).body
    docs: dict[str, str] = {}
    for statement, following in itertools.pairwise(body):
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            docs[statement.target.id] = " ".join(str(following.value.value).split())
    return docs


def _strip_optional(kind: Any) -> tuple[Any, bool]:
    """Split ``X | None`` into X and True, anything else into itself and False."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        inner = [argument for argument in typing.get_args(kind) if argument is not types.NoneType]
        return inner[0], True
    return kind, False


def _options(folder: Path, group: str) -> list[str]:
    return sorted(path.stem for path in (folder / group).glob("*.yaml"))


# ---- words ----


def _describe(problem: Problem) -> str:
    """Write a problem: what is wrong, the legal values, the way out."""
    given = problem.key if problem.value == "" else f"{problem.key}={_value_text(problem.value)}"
    where = f" ({problem.where})" if problem.where else ""
    lines = [_fill(f"{given}{where}: {problem.reason}", 2)]
    if problem.legal:
        lines.append(_fill(f"legal: {problem.legal}", 6))
    if problem.hint:
        lines.append(_fill(problem.hint, 6))
    return "\n".join(lines)


def _fill(text: str, indent: int, rest: int | None = None) -> str:
    """Wrap a paragraph to the terminal, never inside a word: keys and paths stay whole."""
    return textwrap.fill(
        text,
        TERMINAL_COLUMNS,
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent if rest is None else rest),
        break_on_hyphens=False,
        break_long_words=False,
    )


def _closest(word: str, candidates: Iterable[str]) -> str:
    """Name the candidate that `word` probably stands for, or nothing."""
    return next(iter(difflib.get_close_matches(word, list(candidates), n=1)), "")


def _legal(key: Key) -> str:
    rule = str(key.rule)
    if key.rule.choices:
        return rule + (" | null" if key.optional else "")
    return ", ".join(filter(None, [_kind_text(key.kind), rule]))


def _kind_text(kind: Any) -> str:
    inner, optional = _strip_optional(kind)
    names = {bool: "true or false", int: "integer", float: "number", str: "text"}
    items = typing.get_args(inner)
    name = f"list of {names[items[0]]}s" if items else names[inner]
    return f"{name} or null" if optional else name


def _value_text(value: Any) -> str:
    """Write a value as the command line takes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple, ListConfig)):
        return "[" + ",".join(_value_text(item) for item in value) + "]"
    return str(value)


def _one_line(error: Exception) -> str:
    """Reduce an error of PyYAML or OmegaConf to what it says, and the line that it means."""
    if isinstance(error, yaml.MarkedYAMLError):
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        return f"{line}{error.problem}"
    return str(error).partition("\n")[0]


def _name_file(path: Path) -> str:
    path = path.resolve()
    return str(path.relative_to(PROJECT_ROOT)) if path.is_relative_to(PROJECT_ROOT) else str(path)
