"""YAML groups and ``key=value`` overrides, merged by OmegaConf and checked by the models of configs/schema.py.

``configs/<defaults>.yaml`` names one file for each group (``model: scene-llava`` means
configs/model/scene-llava.yaml) and sets further keys. The command line comes last: ``model=llava-1.5-7b``
chooses a file, ``trainer.max_epochs=3`` sets a key. A group's file may set keys of other sections under
``elsewhere`` (a data set knows how many images its harvest takes), and a model's file may choose other groups' options
under ``groups`` (``model=scene-next`` takes ``data=scenes-next`` unless another is given). All mistakes are collected
and reported at once, in one `ConfigError`. Several values for a key (``seed=0,1,2``) are a sweep: configs/grid.py.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Collection, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from configs.keys import keys_of, siblings, suggestion
from configs.problems import COMMAND_LINE, ConfigError, Problem, closest
from configs.schema import TrainConfig
from data.errors import UnreadableFileError
from data.files import SETTINGS_BYTES, read_bytes

CONFIGS = Path(__file__).resolve().parent
KEYS = keys_of(TrainConfig)

DEFAULTS = "train"
SAVED = "--config"
_MOST_BRACKETS = 100
UNREADABLE = (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError)
"""What reading YAML may raise: numbers of 5,000 digits and half characters are ValueErrors, deep nesting recurses."""


def load_config(
    overrides: Sequence[str] = (), folder: Path = CONFIGS, uses: Collection[str] | None = None
) -> TrainConfig:
    """Compose ``train.yaml``, the files of its groups, and the overrides, and check the result.

    Args:
        overrides: ``group=option`` and ``section.key=value``, in any order; ``--config=FILE`` takes the place of
            train.yaml and its groups: a configuration that `save_config` wrote.
        folder: Where the YAML files are.
        uses: Sections that the command uses; contradictions between another section and the rest do not count. None
            means all.

    Raises:
        ConfigError: With every problem found; several values for one key are one.
    """
    return compose(overrides, folder, uses)[0]


def compose(
    overrides: Sequence[str] = (), folder: Path = CONFIGS, uses: Collection[str] | None = None
) -> tuple[TrainConfig, dict[str, str]]:
    """Do what `load_config` does, and return which option each group took, too, as far as it is known."""
    build = _Build()
    file = folder / f"{DEFAULTS}.yaml"
    top = build.read(file)
    single = []
    for text in overrides:
        key, _, value = text.partition("=")
        if key == SAVED:
            continue
        if len(split_values(value)) > 1:
            reason = "holds several values, and only `python train.py` runs a sweep over them"
            hint = f"A comma that belongs to the value needs quotes: {key}='\"{value}\"'."
            build.fail(key, value, reason, "one value", hint, COMMAND_LINE)
        else:
            single.append(text)
    known = top.pop("groups", {})
    groups, given = build.choose(known, single, folder)
    saved = saved_config(overrides)
    if saved is not None:
        top, file = build.read(saved), saved
        groups = {group: option for group, option in groups.items() if group in given}
        build.assign({key: value for key, value in top.items() if key not in groups}, _name_file(file))
    for group in groups:  # the model comes first
        path = folder / group / f"{groups[group]}.yaml"
        content = build.read(path, group)
        if group == "model":
            groups |= build.choices_of(content.pop("groups", {}), groups.keys() - given, folder, _name_file(path))
        elsewhere = content.pop("elsewhere", {})
        build.assign({group: content, **elsewhere}, _name_file(path))
    if saved is None:
        build.assign(top, _name_file(file))
    build.override([text for text in single if "=" not in text or text.partition("=")[0] not in known])
    return build.finish(uses), groups


def saved_config(overrides: Sequence[str]) -> Path | None:
    """The file of ``--config=FILE``; of a run's folder, the configuration in it; of a model's, its newest run's."""
    given = [Path(text.partition("=")[2]).expanduser() for text in overrides if text.startswith(f"{SAVED}=")]
    if not given or not given[-1].is_dir():
        return given[-1] if given else None
    newest = given[-1] / "latest" / "config.yaml"
    own = given[-1] / "config.yaml"
    return newest if newest.exists() and not own.exists() else own


def split_values(text: str) -> list[str]:
    """Split at the commas that stand outside of brackets, braces and quotes.

    ``a,b`` has two values, ``[a,b]`` and ``"a,b"`` have one. A text with an unclosed bracket or quote is one value:
    reading it as YAML will report it.
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


def read_config(path: Path) -> TrainConfig:
    """Read a resolved configuration that `save_config` wrote.

    Raises:
        ConfigError: With every problem found.
    """
    build = _Build()
    build.assign(build.read(path), _name_file(path))
    return build.finish()


def save_config(config: TrainConfig, path: Path) -> None:
    """Write the resolved configuration as YAML; folders are made as needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True), encoding="utf-8")


def digest(*sections: Any) -> str:
    """Hash settings: equal content gives an equal sha256 hex digest, whatever the order of the keys.

    Args:
        sections: Models, or plain containers of str, int, float, bool and None.
    """
    plain = [section.model_dump() if isinstance(section, BaseModel) else section for section in sections]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, allow_nan=False).encode()).hexdigest()


class _Build:
    """A configuration in the making, with the problems met so far."""

    def __init__(self) -> None:
        self.config: DictConfig = OmegaConf.create({})
        self.sources: dict[str, str] = {}
        self.problems: list[Problem] = []
        self.unread: list[str] = []
        """Sections whose file could not be read: keys that they lack are not reported."""

    def fail(self, *problem: Any) -> None:
        self.problems.append(Problem(*problem))

    def read(self, path: Path, section: str = "") -> dict[str, Any]:
        """Read the YAML file of a section (or of all) into plain containers, interpolations kept."""
        try:
            text = read_bytes(path, SETTINGS_BYTES).decode("utf-8-sig")
            plain = OmegaConf.to_container(OmegaConf.load(io.StringIO(_not_too_deep(text))), resolve=False)
        except UnreadableFileError as error:
            self.fail(_name_file(path), "", error.reason)
        except UNREADABLE as error:
            self.fail(_name_file(path), "", f"is not valid YAML: {_one_line(error)}")
        else:
            if isinstance(plain, dict):
                return {str(key): value for key, value in plain.items()}
            self.fail(_name_file(path), "", f"is a {type(plain).__name__}", "lines of key: value")
        self.unread.append(section)
        return {}

    def choose(
        self, defaults: Mapping[str, str], overrides: Sequence[str], folder: Path
    ) -> tuple[dict[str, str], set[str]]:
        """Take the option of each group from the overrides, or else from the defaults; tell which were given."""
        chosen = dict(defaults)
        given: set[str] = set()
        for text in overrides:
            group, equals, option = text.partition("=")
            if not equals or group not in defaults:
                continue
            if group in given:
                self.fail(group, option, "is chosen twice", "", "Keep one of the two.", COMMAND_LINE)
            given.add(group)
            options = options_of(folder, group)
            if option in options:
                chosen[group] = option
                continue
            self._no_option(group, option, options, COMMAND_LINE)
        return chosen, given

    def choices_of(self, content: Any, free: Set[str], folder: Path, where: str) -> dict[str, str]:
        """Options that a model's file chooses for the groups that nobody has chosen for."""
        if not isinstance(content, dict):
            self.fail("groups", content, f"is a {type(content).__name__}", "lines of group: option", "", where)
            return {}
        chosen = {}
        for group, option in content.items():
            if group == "model" or not (folder / str(group)).is_dir():
                self.fail(f"groups.{group}", option, "is not a group that a model can choose for", "data", "", where)
            elif option not in (options := options_of(folder, group)):
                self._no_option(group, option, options, where)
            elif group in free:
                chosen[group] = option
        return chosen

    def _no_option(self, group: str, option: Any, options: Sequence[str], where: str) -> None:
        close = _close_options(str(option).lower(), options)
        hint = f"Did you mean {' or '.join(f'{group}={name}' for name in close)}?" if close else ""
        hint += " Another model: copy the nearest file of configs/model." * (group == "model")
        if group == "predictor" and "/" in str(option):
            hint = "Here it is how to fit one. A predictor's folder goes to evaluation.predictors=[FOLDER], or to "
            hint += "python -m evaluation or python -m playground."
        self.fail(group, option, f"no file configs/{group}/{option}.yaml", " | ".join(options), hint, where)

    def override(self, overrides: Sequence[str]) -> None:
        """Assign ``key=value`` texts of the command line."""
        given: set[str] = set()
        for text in overrides:
            path, equals, value = text.partition("=")
            name = path.lstrip("+~-")
            if path != name:
                hint = f"Write {name}={value or 'VALUE'}." if name in KEYS else suggestion(name, KEYS)
                reason = f'starts with "{path[0]}": keys are neither added nor removed, and there are no flags'
                self.fail(path, value, reason, "key=value", hint, COMMAND_LINE)
            elif not equals:
                hint = f"Write {path}=VALUE." if path in KEYS else suggestion(path, KEYS)
                self.fail(path, "", 'has no "="', "key=value", hint, COMMAND_LINE)
            elif path in given:
                self.fail(path, value, "is given twice", "", "Keep one of the two.", COMMAND_LINE)
            else:
                given.add(path)
                try:
                    read = OmegaConf.from_dotlist([f"value={_not_too_deep(value)}"])
                    item: Any = OmegaConf.to_container(read, resolve=False)
                except UNREADABLE as error:
                    self.fail(path, value, f"is not a YAML value: {_one_line(error)}", "", "", COMMAND_LINE)
                else:
                    self.assign_one(path, item["value"], COMMAND_LINE)

    def assign(self, content: Mapping[str, Any], where: str) -> None:
        """Assign what a YAML file holds."""
        for name, value in content.items():
            self.assign_one(str(name), value, where)

    def assign_one(self, path: str, value: Any, where: str) -> None:
        """Assign one value to one key, or a mapping to one section."""
        key = KEYS.get(path)
        if key is None:
            self.fail(path, value, "there is no such key", siblings(path, KEYS), suggestion(path, KEYS), where)
            return
        parent = path.rpartition(".")[0]
        if parent in self.sources and OmegaConf.select(self.config, parent) is None:
            hint = f"Choose a file whose {parent} is set, or leave this key out."
            self.fail(path, value, f"{parent} is null here", "", hint, where)
        elif key.section and isinstance(value, Mapping):
            self.sources[path] = where
            if OmegaConf.select(self.config, path) is None:
                OmegaConf.update(self.config, path, {}, merge=False)
            for name, item in value.items():
                self.assign_one(f"{path}.{name}", item, where)
        elif key.section and not (value is None and key.optional):
            legal = f"{path}.KEY=VALUE with one of: {siblings(path + '.', KEYS)}"
            self.fail(path, value, "is a section, not a value", legal, "", where)
            self.unread.append(path)
            if OmegaConf.select(self.config, path) is None:
                OmegaConf.update(self.config, path, {}, merge=False)
        elif _holds_bool(value) and key.kind is not bool:
            self.fail(path, value, "is of the wrong type", key.legal, "", where)
        else:
            self.sources[path] = where
            OmegaConf.update(self.config, path, value, merge=False, force_add=True)

    def finish(self, uses: Collection[str] | None = None) -> TrainConfig:
        """Resolve interpolations, check all values and contradictions; return the configuration if all is well."""
        for path in self.sources:
            try:
                OmegaConf.select(self.config, path, throw_on_resolution_failure=True)
            except OmegaConfBaseException as error:
                self.fail(path, "", _one_line(error), KEYS[path].legal, "", self.sources[path])
                OmegaConf.update(self.config, path, None)
        try:
            content = OmegaConf.to_container(self.config, resolve=True)
            config = TrainConfig.model_validate(content, context={"uses": uses})
        except ValidationError as error:
            for found in error.errors():
                self.explain(dict(found))
        else:
            if not self.problems:
                return config
        raise ConfigError(self.problems)

    def explain(self, error: dict[str, Any]) -> None:
        """Put one of pydantic's errors into words, unless its key is reported already, or its file was not read."""
        context = error.get("ctx", {})
        path = ".".join(part for part in error["loc"] if isinstance(part, str))
        if meant := context.get("key"):  # another key of the section; a section's own validator names the section
            section = path if not path or KEYS[path].section else path.rpartition(".")[0]
            path = f"{section}.{meant}".lstrip(".")
        key, where = KEYS[path], self.sources.get(path, "")
        missing = error["type"] == "missing"
        unread = missing and any(path.startswith(section) for section in self.unread)
        if unread or any(path == known.key for known in self.problems):
            return
        value = "" if missing else context.get("value", error["input"])
        if any(isinstance(part, int) for part in error["loc"]):  # an item of a list
            value = OmegaConf.to_container(OmegaConf.select(self.config, path), resolve=True)
        legal, hint = key.legal, ""
        if error["type"] == "contradiction":
            reason, legal, hint = error["msg"], context.get("legal", ""), context.get("hint", "")
        elif missing:
            reason, hint = "has no value", f"Add {path}=VALUE."
        elif value is None:
            reason = "can't be null"
        elif key.choices:
            reason, close = "is none of the choices", closest(str(value), map(str, key.choices))
            hint = f"Did you mean {path}={close}?" if close else ""
        else:
            wrong_type = error["type"].endswith(("_type", "_parsing", "_from_float", "_unicode", "_size"))
            reason = "is of the wrong type" if wrong_type else "is out of range"
        self.fail(path, value, reason, legal, hint, where)


def _close_options(given: str, options: Sequence[str]) -> list[str]:
    """The options that a text probably stands for: those that begin with it, the shortest first, or one like it.

    Else those that have a part like it: scene-llava has scene and llava.
    """
    if found := [name for name in options if given and name.startswith(given)]:
        return sorted(found, key=len)
    if near := closest(given, options):
        return [near]
    part = closest(given, {part for option in options for part in option.split("-") if len(part) > 2})
    return sorted(
        (name for name in options if part and part in name), key=lambda name: (not name.startswith(part), len(name))
    )


def options_of(folder: Path, group: str) -> list[str]:
    """Options of a group: the names of its files."""
    return sorted(path.stem for path in (folder / group).glob("*.yaml"))


def _holds_bool(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, list) and any(map(_holds_bool, value)))


def _not_too_deep(text: str) -> str:
    """Returns a text with few enough brackets for PyYAML's parser, which overruns the stack at some 10,000.

    Raises:
        ValueError: It has too many.
    """
    if text.count("[") + text.count("{") > _MOST_BRACKETS:
        raise ValueError(f"it has more than {_MOST_BRACKETS} opening brackets")
    return text


def _one_line(error: Exception) -> str:
    """Reduce an error of PyYAML or OmegaConf to its message, and the line that it means."""
    if isinstance(error, yaml.MarkedYAMLError):
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        return f"{line}{error.problem}"
    return str(error).partition("\n")[0]


def _name_file(path: Path) -> str:
    path, root = path.resolve(), CONFIGS.parent
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
