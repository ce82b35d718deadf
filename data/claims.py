"""Whose a harvest's folder is: what its settings file, its index and its shards say about how they were made.

`harvest.json` is one witness among several. If it is damaged or lost, index and sidecars still know the settings: a
finished harvest is neither taken for another one nor made again because of one bad file.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data.errors import (
    DamagedShardError,
    DataError,
    HarvestFolderError,
    HarvestMismatchError,
    LockTimeoutError,
    UnreadableFileError,
)
from data.files import RECORD_BYTES, SETTINGS_BYTES, parse_json, read_bytes, shown
from data.index import (
    INDEX,
    MANIFEST,
    SETTINGS,
    canonical_json,
    parse_index,
    parse_sidecar,
    remove_all,
    remove_leftovers,
)
from data.locks import holding
from data.log import log
from data.plan import Job, settings_digest
from data.records import is_shard_name
from data.store import Store
from scr_runtime.files import create_file, write_file

_REMOVAL_SECONDS = 600.0  # longest wait for another process that removes a harvest
_DEFAULTS = {"state_layer": 0}  # of keys that older harvests lack
_LATER_KEY = "processor_sha256"  # of `model`; harvests made before there was such a key stay valid without


# -- the claim -------------------------------------------------------------------------------------------------------


def claim(job: Job, overwrite: bool = False) -> None:
    """Creates the folder if it is missing, and checks that it holds these settings.

    Of several processes that begin at once, one writes the settings; the others compare theirs with them. An object
    store has no such arbiter: there, settings are written and read again, and every sidecar names its own. If
    `harvest.json` is damaged or lost, and index or sidecars name these very settings, it is re-created.

    Nothing else removes shards, and this only with `overwrite`; nothing of other settings is ever removed at a URL,
    which others may use.

    Args:
        job: the job.
        overwrite: remove the shards of other settings.

    Raises:
        HarvestMismatchError: the folder was begun with other settings, and `overwrite` is False; or the URL was.
        HarvestFolderError: nobody knows its settings, something is in the way, or another process harvests into the
            folder that is to be overwritten.
    """
    store = job.store
    there = _claim_url(store, job) if store else True  # first: a rejected job leaves nothing behind
    _claim_folder(job, overwrite)
    if store and not there:
        store.write(SETTINGS, _settings_bytes(job))
        if changes := difference(witnesses_at(store).stored or {}, job.settings):
            raise HarvestMismatchError(store.url, changes)


@contextmanager
def working_in(job: Job) -> Iterator[None]:
    """Keeps others from removing a claimed folder's shards while this process works there.

    Raises:
        HarvestMismatchError: they were faster.
    """
    with holding(job.directory, _REMOVAL_SECONDS, f"removing a harvest from {job.directory}", alone=False):
        _claim_folder(job, overwrite=False)
        yield


def _settings_bytes(job: Job) -> bytes:
    return json.dumps(job.settings, indent=1).encode()


def _claim_url(store: Store, job: Job) -> bool:
    """Whether a URL has these settings already, or nothing yet."""
    found = witnesses_at(store)
    if found.silent or found.agree(job):
        return not found.silent
    if found.stored is None and found.problem is None and not found.made and not found.indexed:
        return False  # tars that nobody lists: they are replaced one by one
    if found.vouch_for(job):
        log("harvest", f"{SETTINGS} at {store.url} {_condition(found)}: it is written again")
        return False
    if changes := found.difference(job):
        raise HarvestMismatchError(store.url, changes)
    raise HarvestFolderError(
        f"{store.url}/{SETTINGS} {_condition(found)}, and neither index nor sidecars there are readable: nobody knows "
        "what was harvested. Write the file again, or harvest to another URL (harvest.output=...)."
    )


def _claim_folder(job: Job, overwrite: bool) -> None:
    directory, file = job.directory, job.directory / SETTINGS
    with _usable(directory):
        directory.mkdir(parents=True, exist_ok=True)
        _check_nothing_in_the_way(job)
        remove_leftovers(directory)
        stored = stored_settings(directory)
        if stored is not None and not difference(stored, job.settings) and not overwrite:
            return
        found = witnesses(directory)
        if found.silent:
            if create_file(file, _settings_bytes(job)):
                return
            found = witnesses(directory)  # another process was faster
        if found.agree(job):
            return
        if found.vouch_for(job):
            log("harvest", f"{file} {_condition(found)}; its shards were made with these settings: it is re-created")
            write_file(file, _settings_bytes(job))
        elif overwrite:
            _remove(job)
        elif changes := found.difference(job):
            raise HarvestMismatchError(directory, changes)
        else:
            raise HarvestFolderError(
                f"{file} {_condition(found)}, and no sidecar or index beside it is readable: nobody knows what was "
                "harvested there. Put the file back, harvest into a folder beside this one (harvest.name=NAME), or "
                "delete this harvest and make it again (overwrite=true). Nothing was removed."
            )


def _remove(job: Job) -> None:
    """Removes the shards of other settings, and claims the folder."""
    directory = job.directory
    try:
        with holding(directory, 0, "harvesting", alone=True):
            found = witnesses(directory)
            if found.agree(job):  # another process has removed them
                return
            changes = sorted(found.difference(job).items())
            changed = ", ".join(f"{key} {shown(old)} -> {shown(new)}" for key, (old, new) in changes) or "unknown"
            log("harvest", f"overwrite: other settings than those of {directory} ({changed}): harvesting again")
            remove_all(directory)
            write_file(directory / SETTINGS, _settings_bytes(job))
    except LockTimeoutError as error:
        raise HarvestFolderError(
            f"another process harvests into {directory}: its shards are not removed. Wait for it, or end it."
        ) from error


def _condition(found: Witnesses) -> str:
    return found.problem or ("does not exist" if found.stored is None else "says something else")


@contextmanager
def _usable(directory: Path) -> Iterator[None]:
    """Turns what the system says about a folder into a HarvestFolderError; a full disk is reported as it is."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        if isinstance(error, DataError) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise HarvestFolderError(
            f"{directory} cannot be used for a harvest ({error}): choose another runs_dir, or another harvest.name."
        ) from error


def _check_nothing_in_the_way(job: Job) -> None:
    ours = {SETTINGS, MANIFEST, INDEX, *(f"{name}{ending}" for name in job.names for ending in (".tar", ".json"))}
    for entry in job.directory.iterdir():
        if entry.name in ours and entry.is_dir():
            raise HarvestFolderError(
                f"{entry} is a folder, where the harvest has a file: move it away, or harvest into a folder beside "
                "this one (harvest.name=NAME)."
            )


# -- witnesses -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Witnesses:
    """What a folder, or a URL, says about its settings.

    Attributes:
        stored: `harvest.json`; None if it is missing or unreadable.
        problem: why it is unreadable; None if it is readable or missing.
        indexed: the settings in `index.json`; None if there is no whole one.
        made: the settings digest in the sidecar of each shard that has a readable one.
        unknown: files of shards without a readable sidecar.
    """

    stored: dict[str, Any] | None = None
    problem: str | None = None
    indexed: dict[str, Any] | None = None
    made: Mapping[str, str] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()

    @property
    def silent(self) -> bool:
        """Whether no harvest was begun here."""
        return self.stored is None and self.problem is None and not (self.made or self.unknown or self.indexed)

    def agree(self, job: Job) -> bool:
        """Whether all of them say that everything was made with a job's settings."""
        return self.stored is not None and not difference(self.stored, job.settings) and not self._others(job)

    def vouch_for(self, job: Job) -> bool:
        """Whether index or sidecars are there, and all of them name a job's settings, whatever `harvest.json` says."""
        return bool(self.made or self.indexed) and not self._others(job)

    def _others(self, job: Job) -> bool:
        indexed = self.indexed is not None and bool(difference(self.indexed, job.settings))
        return indexed or bool(set(self.made.values()) - {job.settings_digest})

    def difference(self, job: Job) -> dict[str, tuple[Any, Any]]:
        """How the settings differ from a job's, as far as it is known; empty if nothing is."""
        for settings in (self.stored, self.indexed):
            if settings is not None and (changes := difference(settings, job.settings)):
                return changes
        others = sorted(set(self.made.values()) - {job.settings_digest})
        return {"digest of the settings": (", ".join(others), job.settings_digest)} if others else {}


def witnesses(directory: Path) -> Witnesses:
    """Asks the files of a folder; no tar is read.

    Raises:
        HarvestFolderError: the system cannot read them.
    """
    contents: dict[str, bytes | str] = {}
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise HarvestFolderError(f"{directory} cannot be read ({error.strerror}).") from error
    for name in filter(_is_witness, names):
        try:
            contents[name] = read_bytes(directory / name, SETTINGS_BYTES if name == SETTINGS else RECORD_BYTES)
        except UnreadableFileError as error:
            if error.failed:
                raise HarvestFolderError(f"{error}. Nothing was changed: start again once it can be read.") from error
            if not error.missing:
                contents[name] = error.reason
    return _heard(names, contents.get)


def witnesses_at(store: Store) -> Witnesses:
    """Asks the files at a URL; sidecars only if `harvest.json` and the index are no use."""
    names = sorted(store.sizes())
    contents = store.read([name for name in (SETTINGS, INDEX) if name in names])
    if SETTINGS in names and _settings_in(contents.get(SETTINGS))[0] is None and INDEX not in contents:
        contents |= store.read([name for name in names if _is_witness(name)])
        return _heard(names, contents.get)
    return _heard([name for name in (SETTINGS, INDEX) if name in names], contents.get)


def stored_settings(directory: Path) -> dict[str, Any] | None:
    """`harvest.json` of a folder; None if it is missing or unreadable."""
    try:
        return _settings_in(read_bytes(directory / SETTINGS, SETTINGS_BYTES))[0]
    except UnreadableFileError:
        return None


def _is_witness(name: str) -> bool:
    return name in (SETTINGS, INDEX) or (name.endswith(".json") and is_shard_name(name.removesuffix(".json")))


def _heard(names: Iterable[str], content_of: Callable[[str], bytes | str | None]) -> Witnesses:
    """What files say; the content of an unreadable one is a string, the reason."""
    stored, problem = _settings_in(content_of(SETTINGS))
    indexed = content_of(INDEX)
    made: dict[str, str] = {}
    for name in names:
        content = content_of(name)
        if name not in (SETTINGS, INDEX) and isinstance(content, bytes):
            shard = name.removesuffix(".json")
            try:
                made[shard] = parse_sidecar(shard, content)["settings"]
            except DamagedShardError:
                continue
    shards = [name for name in names if is_shard_name(name.removesuffix(".json").removesuffix(".tar"))]
    return Witnesses(
        stored,
        problem,
        _settings_of_index(indexed) if isinstance(indexed, bytes) else None,
        made,
        tuple(name for name in shards if name.rpartition(".")[0] not in made),
    )


def _settings_in(content: bytes | str | None) -> tuple[dict[str, Any] | None, str | None]:
    """The settings, or why there are none; neither if there is no file."""
    if not isinstance(content, bytes):
        return None, content
    try:
        settings = parse_json(content)
    except ValueError as error:
        return None, f"is not readable JSON ({error})"
    return (settings, None) if isinstance(settings, dict) else (None, "holds no settings")


def _settings_of_index(content: bytes) -> dict[str, Any] | None:
    try:
        return parse_index(INDEX, content)["settings"]
    except DataError:
        return None


# -- settings --------------------------------------------------------------------------------------------------------


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with the old and the new value (None where there is none)."""
    if _lacks_later_key(old):
        new = _without_later_key(new)
    before, after = (_flat({**_DEFAULTS, **settings}) for settings in (old, json.loads(canonical_json(new))))
    keys = before.keys() | after.keys()
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}{key}.") if isinstance(inner, dict) else {f"{prefix}{key}": inner}
    return flat


def adopted(job: Job) -> Job:
    """The job with its settings as its folder or URL writes them: without a key that older harvests lack, if it does.

    Raises:
        StoreError: the URL cannot be read.
    """
    older = replace(job, settings=_without_later_key(job.settings))
    if older.settings == job.settings:
        return job
    candidates = (job, older)
    if job.store is None and (stored := stored_settings(job.directory)) is not None:  # nearly always
        for candidate in candidates:
            if settings_digest(stored) == candidate.settings_digest:
                return candidate
    heard = [witnesses_at(job.store)] if job.store else []
    heard += [witnesses(job.directory)] if job.directory.is_dir() else []
    for found in heard:
        known = {settings_digest(settings) for settings in (found.stored, found.indexed) if settings is not None}
        for candidate in candidates:
            if candidate.settings_digest in known | set(found.made.values()):
                return candidate
        if found.stored is not None:
            return older if _lacks_later_key(found.stored) else job
    return job


def _lacks_later_key(settings: Mapping[str, Any]) -> bool:
    model = settings.get("model")
    return isinstance(model, dict) and _LATER_KEY not in model


def _without_later_key(settings: Mapping[str, Any]) -> dict[str, Any]:
    model = settings.get("model")
    if not isinstance(model, dict):
        return dict(settings)
    return {**settings, "model": {key: value for key, value in model.items() if key != _LATER_KEY}}
