"""The command line of every entry point: what is asked for is loaded and checked, or help is printed.

Nothing here imports torch, Lightning or MLflow: help and a typo cost no time.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

from configs.keys import suggestion
from configs.load import CONFIGS, KEYS, SAVED, compose, load_config, options_of
from configs.problems import ConfigError, value_text, wrap

Loaded = TypeVar("Loaded")
HELP = {"-h", "--help", "help"}


def parse_cli(
    argv: Sequence[str] | None,
    prog: str,
    about: Sequence[str],
    load: Callable[..., Loaded] = load_config,
    *,
    uses: Collection[str] | None = None,
    more: str = "",
) -> Loaded:
    """Load from the command line.

    ``--help`` prints an overview, ``--help SECTION`` the keys of a section, ``--help all`` every key; all end the
    process with status 0, or 2 if there is no such section. If anything is wrong, every problem is printed on stderr,
    and the status is 2.

    Args:
        argv: Arguments after the program's name; those of the process if None.
        prog: How the program is called.
        about: What it does, and then examples, one line each.
        load: (arguments, uses=...) -> what is returned.
        uses: Sections that the program uses; None means all.
        more: A paragraph for ``--help all``.
    """
    argv = _joined(list(sys.argv[1:] if argv is None else argv))
    asked = next((text for text in argv if text.partition("=")[0] in HELP), None)
    if asked is not None:
        topics = [text for text in argv if "=" not in text and text not in HELP]
        topic = asked.partition("=")[2] or next(iter(topics), "")
        if topic not in ("", "all") and not section_text(topic):
            print(_no_topic(topic), file=sys.stderr)
            raise SystemExit(2)
        try:
            print(_help(topic, prog, about, more), flush=True)
        except BrokenPipeError:  # `--help all | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0)
    try:
        return load(argv, uses=uses)
    except ConfigError as error:
        print(f"{error}\n`{prog} --help SECTION` lists a section's keys.", file=sys.stderr)
        raise SystemExit(2) from None


def _joined(argv: list[str]) -> list[str]:
    """Write ``--config FILE`` as ``--config=FILE``."""
    if SAVED not in argv[:-1]:
        return argv
    place = argv.index(SAVED)
    return [*argv[:place], f"{SAVED}={argv[place + 1]}", *argv[place + 2 :]]


def _help(topic: str, prog: str, about: Sequence[str], more: str) -> str:
    if not topic:
        return overview(prog, about)
    if topic == "all":
        return "\n\n".join([wrap(about[0], 0), *([wrap(more, 0)] if more else []), help_text()])
    return section_text(topic)


def _no_topic(topic: str) -> str:
    sections = " | ".join(["general", *(path for path, key in KEYS.items() if key.section), "all"])
    hint = suggestion(topic, KEYS)
    return wrap(f"There is no section or key {topic}. {hint} --help takes: {sections}", 0)


def overview(prog: str, about: Sequence[str], folder: Path = CONFIGS) -> str:
    """Help that fits one screen: what the command does, examples, the groups with their options, the sections."""
    lines = [wrap(f"usage: {prog} [group=option ...] [section.key=value ...] [{SAVED} FILE]", 0, 7), wrap(about[0], 0)]
    lines += [f"  {example}" for example in about[1:]]
    lines += ["", "group=option takes configs/<group>/<option>.yaml (* default):", *_groups(folder)]
    lines += ["", "Sections of keys; `--help SECTION` lists one, `--help all` every key:"]
    tops = {path.partition(".")[0] for path in KEYS if "." in path}
    general = ", ".join(path for path in KEYS if path not in tops and "." not in path)
    for name, doc in [("general", general), *((name, KEYS[name].doc) for name in KEYS if name in tops)]:
        lines.append(wrap(f"{name:<12}{doc.partition('. ')[0].rstrip('.')}", 2, 14))
    lines.append(f"{SAVED} FILE starts from a run's settings: runs/fits/<model>/<time>")
    return "\n".join(lines)


def help_text(folder: Path = CONFIGS) -> str:
    """List the groups with their options, and every key with its type, legal values, default and meaning."""
    lines = ["groups: group=option takes configs/<group>/<option>.yaml (* default)", "", *_groups(folder)]
    return "\n".join([*lines, "", "keys: section.key=value, with their defaults", *_keys(list(KEYS), folder)])


def section_text(topic: str, folder: Path = CONFIGS) -> str:
    """The keys of one section, or one key; nothing if there is none of that name."""
    if topic == "general":
        paths = [path for path, key in KEYS.items() if "." not in path and not key.section]
    else:
        paths = [path for path in KEYS if path == topic or path.startswith(f"{topic}.")]
    return "\n".join(_keys(paths, folder)).strip("\n")


def _groups(folder: Path) -> list[str]:
    lines = []
    for group, chosen in compose(folder=folder)[1].items():
        options = "  ".join(option + "*" * (option == chosen) for option in options_of(folder, group))
        lines.append(wrap(f"{group:<12}{options}", 2, 14))
    return lines


def _keys(paths: Sequence[str], folder: Path) -> list[str]:
    defaults: Any = compose(folder=folder)[0].model_dump()
    lines: list[str] = []
    for path in paths:
        key, value = KEYS[path], defaults
        if key.section:
            lines += ["", wrap(f"{path}: {key.doc}", 0)]
            continue
        for name in path.split("."):
            value = value and value[name]  # a section that is null has no values
        lines.append(wrap(f"{path}={value_text(value)}  ({key.legal})", 2, 6))
        lines.append(wrap(key.doc, 6))
    return lines
