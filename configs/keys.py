"""The keys of a configuration, read off its pydantic models: names, types, legal values, defaults, meanings."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from configs.problems import closest, value_text

ABBREVIATIONS = {
    "lr": "trainer.learning_rate",
    "wd": "trainer.weight_decay",
    "epochs": "trainer.max_epochs",
    "bs": "trainer.batch_size",
    "gpus": "trainer.devices",
    "k": "model.scr.num_sources",
    "n": "harvest.samples",
}
"""What these keys are called elsewhere."""
_COMMANDS = {"port": "port is a setting of `python -m playground`."}
"""Settings that are no keys of a configuration."""
_BOUNDS = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
_KINDS = {bool: "true or false", int: "integer", float: "number", str: "text"}


@dataclass(frozen=True)
class Key:
    """One key of the schema, or one section of keys."""

    path: str
    kind: Any
    """Its annotation without null; for a section, the model."""
    optional: bool
    doc: str
    bounds: str = ""
    """The legal range as a user reads it: ``>= 1``, ``> 1 and <= 2``."""

    @property
    def section(self) -> type[BaseModel] | None:
        """The model behind a section; None for a key with a value."""
        return self.kind if isinstance(self.kind, type) and issubclass(self.kind, BaseModel) else None

    @property
    def choices(self) -> tuple[Any, ...]:
        """The legal values of a `Literal`."""
        return typing.get_args(self.kind) if typing.get_origin(self.kind) is Literal else ()

    @property
    def is_list(self) -> bool:
        """Whether its value is a list."""
        return typing.get_origin(self.kind) is list

    @property
    def legal(self) -> str:
        """Type and legal values: ``integer, >= 1`` or ``kl | bce | null``."""
        if self.section:
            return "a section"
        if self.choices:
            return " | ".join(map(value_text, self.choices)) + (" | null" if self.optional else "")
        kind = f"list of {_KINDS[typing.get_args(self.kind)[0]]}s" if self.is_list else _KINDS[self.kind]
        return ", ".join(filter(None, [f"{kind} or null" if self.optional else kind, self.bounds]))


def keys_of(model: type[BaseModel]) -> dict[str, Key]:
    """Every key of a model by its dotted path: first its own, then section after section."""
    return {key.path: key for key in _walk(model, "")}


def siblings(path: str, keys: dict[str, Key]) -> str:
    """List the keys of the innermost section of `path` that exists."""
    parent = path.rpartition(".")[0]
    while parent and not (parent in keys and keys[parent].section):
        parent = parent.rpartition(".")[0]
    start = f"{parent}." if parent else ""
    names = [path.removeprefix(start) for path in keys if path.startswith(start)]
    return ", ".join(name for name in names if "." not in name)


def suggestion(path: str, keys: dict[str, Key]) -> str:
    """Name the key that `path` probably stands for, or the command that takes it, or nothing."""
    if path in _COMMANDS:
        return _COMMANDS[path]
    section, _, last = path.rpartition(".")
    values = [candidate for candidate in keys if not keys[candidate].section or not section]
    by_last = {candidate.rpartition(".")[2]: candidate for candidate in values}
    same = [candidate for candidate in values if candidate.rpartition(".")[2] == last]
    short = ABBREVIATIONS.get(last.lower())
    meant = " or ".join(same) or short or closest(path, values) or by_last.get(closest(last, by_last))
    return f"Did you mean {meant}?" if meant else ""


def _walk(model: type[BaseModel], start: str) -> Iterator[Key]:
    found = [_key(start + (field.alias or name), field) for name, field in model.model_fields.items()]
    yield from (key for key in found if not key.section)
    for key in found:
        if key.section:
            yield key
            yield from _walk(key.section, f"{key.path}.")


def _key(path: str, field: FieldInfo) -> Key:
    kind, optional = field.annotation, False
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        [kind] = [argument for argument in typing.get_args(kind) if argument is not types.NoneType]
        optional = True
    if hasattr(kind, "__metadata__"):  # Annotated inside a union
        kind = typing.get_args(kind)[0]
    signs = [
        f"{sign} {getattr(mark, name):g}" for name, sign in _BOUNDS for mark in field.metadata if hasattr(mark, name)
    ]
    doc = kind.__doc__ if isinstance(kind, type) and issubclass(kind, BaseModel) else field.description
    return Key(path, kind, optional, " ".join(inspect.cleandoc(doc or "").split()), " and ".join(signs))
