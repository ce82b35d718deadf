"""Settings of the server: `key=value` on the command line. Nothing here imports torch."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scr_runtime.config import Mode
from scr_runtime.terminal import filled

KEY_VARIABLE = "SCR_API_KEY"
PROGRAM = "python -m scr_runtime.serve"
LOOPBACK = ("127.0.0.1", "localhost")


class SettingsError(ValueError):
    """The command line can't be used; the message says how it should be."""


class ServeSettings(BaseModel):
    """Everything that an operator may set."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str = Field(min_length=1, description="folder or Hub id of the model")
    model_revision: str | None = Field(default=None, description="commit, tag or branch of the model on the Hub")
    predictor: str | None = Field(default=None, description="folder, Hub id or models:/NAME@ALIAS of its predictor")
    revision: str | None = Field(default=None, description="commit, tag or branch of the predictor on the Hub")
    mode: Mode | None = Field(
        default=None, description="of requests that name none; auto, or two-pass without a predictor"
    )
    threshold: float | None = Field(default=None, ge=0, le=1, description="confidence under which auto falls back")
    name: str | None = Field(
        default=None, min_length=1, description="as clients name the model; its Hub id or folder's name"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto: float32 on a CPU"
    )
    device: str = Field(default="auto", description="auto: an accelerator if there is one")
    host: str = Field(
        default="127.0.0.1", description="address to listen at; 0.0.0.0 is every network of this machine"
    )
    port: int = Field(default=8000, ge=0, le=65535, description="0 takes any that is free")
    api_key: str | None = Field(
        default=None, min_length=1, repr=False, description=f"or in ${KEY_VARIABLE}, where ps shows none"
    )
    queue: int = Field(
        default=16, ge=1, description="requests that are in the server at a time; the next one gets a 429"
    )
    timeout: float = Field(default=120, gt=0, description="seconds from a request's arrival to the end of its answer")
    max_body_mb: float = Field(default=20, gt=0, description="of a request")
    max_megapixels: float = Field(default=40, gt=0, description="of all images of a request together")
    max_images: int = Field(default=8, ge=0, description="of a request")
    max_characters: int = Field(default=100_000, ge=1, description="of all texts of a request together")
    max_tokens: int = Field(
        default=1024, ge=1, description="of an answer; what a request gets that asks for no number"
    )
    image_hosts: tuple[str, ...] = Field(
        default=(),
        description="origins that images may be fetched from (https://a.example,https://b.example); none: data: URLs",
    )

    @property
    def served_name(self) -> str:
        """How clients name the model: never a path of this machine."""
        return self.name or (Path(self.model).resolve().name if Path(self.model).exists() else self.model)

    @property
    def default_mode(self) -> Mode:
        """The mode of requests that name none."""
        return self.mode or ("two-pass" if self.predictor is None else "auto")


def parse(arguments: Sequence[str]) -> ServeSettings:
    """Reads `key=value` and `--key=value`.

    Raises:
        SettingsError: With every problem, and what to write instead.
    """
    given: dict[str, Any] = {}
    problems: list[str] = []
    for argument in arguments:
        key, equals, value = argument.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if not equals or key not in ServeSettings.model_fields:
            near = " or ".join(f"{name}=..." for name in difflib.get_close_matches(key, ServeSettings.model_fields, 2))
            what = "no such key" if equals else "expected key=value"
            problems.append(f"{argument}: {what}" + (f"; did you mean {near}?" if near else ""))
        given[key] = tuple(value.split(",")) if key == "image_hosts" else value
    if problems:
        raise SettingsError("\n".join([*problems, f"{PROGRAM} --help lists the keys"]))
    if KEY_VARIABLE in os.environ:
        given.setdefault("api_key", os.environ[KEY_VARIABLE])
    try:
        return ServeSettings.model_validate(given)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors(include_input=False)]
        raise SettingsError("\n".join([*lines, f"{PROGRAM} --help lists the keys"])) from error


def help_text() -> str:
    """One line per key."""
    lines = [
        "An OpenAI-compatible server of one vision-language model with SCR.",
        f"{PROGRAM} model=scenes/checkpoint predictor=runs/predictors/scene-llava mode=auto",
        "",
    ]
    for key, field in ServeSettings.model_fields.items():
        default = "" if field.is_required() or field.default in (None, ()) else f" [{field.default}]"
        lines.append(filled(f"{field.description}{default}", f"  {key + '=':<17}", " " * 19))
    return "\n".join(lines)
