"""What can go wrong with images, models and shards. Each message says what to do next.

DataError
├── UnreadableFileError      something that has to be read is no regular file, is too large, or is no JSON
├── SettingsError            settings that contradict each other, the images, or the shards
├── AnnotationError          an images folder without (readable) annotations, or annotations without their images
├── NotEnoughImagesError     more samples asked than images exist
├── CorruptImageError        one image file cannot be decoded
├── ImageFileError           one image file cannot be read: no permission, a failing disk
│   └── MissingImageError    it is gone
├── TooManyBadImagesError    more than 1 % of the planned images cannot be used
├── ModelLoadError           a vision-language model or its processor cannot be loaded
├── UnfinishedHarvestError   a folder of shards without its index: never harvested, or interrupted
├── DamagedShardError        a shard (or its sidecar) is missing, cut, flipped or of another format
├── HarvestMismatchError     a folder of shards was made with other settings
├── HarvestFolderError       a folder of shards cannot be used: something is in the way, damaged beyond repair, in use
├── StreamError              a tar that a fit streams cannot be opened, or its command fails
├── StoreError               the URL of `harvest.output` cannot be read or written
├── DiskTooSmallError        the harvest would not fit on the disk
├── StatesOverflowError      states that `harvest.states_dtype` cannot hold
├── RankError                environment variables of a launcher that contradict each other
├── LockTimeoutError         another process held a lock for too long
└── ClusterError             the Ray engine: it is not installed, its workers do not start
    └── PoisonShardsError    shards that failed on every worker that tried them; all others are whole
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class DataError(Exception):
    """Root of everything that `data` raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        # as it is, not through __init__, whose arguments differ: errors cross process borders
        return _restore, (type(self), self.args, self.__dict__)


def _restore(kind: type[DataError], args: tuple[Any, ...], state: dict[str, Any]) -> DataError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class UnreadableFileError(DataError):
    """A file cannot be read.

    Attributes:
        path: its name.
        reason: why not, as it follows the name in a sentence.
        missing: nothing has that name.
        failed: the system could not read it (no permission, a failing disk), which says nothing about its content.
    """

    def __init__(self, path: str | Path, reason: str, *, missing: bool = False, failed: bool = False) -> None:
        super().__init__(f"{path} {reason}")
        self.path = Path(path)
        self.reason = reason
        self.missing = missing
        self.failed = failed


class SettingsError(DataError, ValueError):
    """A setting is legal by itself, but does not fit the images, the shards, or another setting."""


class AnnotationError(DataError):
    """Annotations are missing or unreadable, or name images that do not exist."""


class NotEnoughImagesError(DataError, ValueError):
    """More images are asked for than the annotations list."""


class CorruptImageError(DataError):
    """One image file cannot be decoded: `path` is the file, `reason` what the decoder reported."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} cannot be decoded: {reason}. Replace the file or remove it from the annotations.")
        self.path = path
        self.reason = reason


class ImageFileError(DataError, OSError):
    """An image file cannot be read, for a reason that lies outside of it: it is not counted as a bad image."""


class MissingImageError(ImageFileError, FileNotFoundError):
    """An image file vanished after the images were listed."""


class TooManyBadImagesError(DataError):
    """More than 1 % (and at least two) of the planned images cannot be used: undecodable, or too small."""


class ModelLoadError(DataError):
    """A model folder or hub id cannot be loaded."""


class UnfinishedHarvestError(DataError):
    """There is no `index.json`: the harvest has not been run here, or has not been finished."""


class DamagedShardError(DataError):
    """A shard does not hold what its sidecar says: `name` is the shard, `reason` what is wrong with it.

    Without a reason, `name` is the whole message: so torch makes an error again that ended a worker process.
    """

    def __init__(self, name: str, reason: str = "") -> None:
        way_out = "Run the harvest again with the same settings: only this shard is redone."
        super().__init__(f"shard {name}: {reason}. {way_out}" if reason else name)
        self.name = name
        self.reason = reason


class HarvestMismatchError(DataError):
    """The folder (or URL) was harvested with other settings: `difference` maps each key to its (old, new) values."""

    def __init__(self, directory: Path | str, difference: Mapping[str, tuple[object, object]]) -> None:
        lines = [f"{key}: {_short(old)} -> {_short(new)}" for key, (old, new) in sorted(difference.items())]
        if len(lines) > _LINES:
            lines[_LINES:] = [f"and {len(lines) - _LINES} more"]
        hint = _backend_hint(*difference.get("model.image_processor", (None, None)))
        if isinstance(directory, str):
            ways = "or harvest to another URL (harvest.output=...). What is at a URL is never removed from here."
        else:
            ways = (
                "harvest into a folder beside this one (harvest.name=NAME), or delete this harvest and make it again "
                "(overwrite=true). Nothing was removed."
            )
        super().__init__(
            f"{directory} was harvested with other settings (there -> asked now):\n  "
            + "\n  ".join(lines)
            + f"\n{hint}Ask for the old settings, {ways}"
        )
        self.directory = directory
        self.difference = difference


_LINES = 20  # of a difference in a message
_BACKENDS = ("Pil", "Fast")  # ends of the names of image processors that differ in the back end alone


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _backend_hint(old: object, new: object) -> str:
    """Which package has changed where the image processors differ in their back end alone."""
    if not isinstance(old, str) or not isinstance(new, str):
        return ""
    plain = [name.removesuffix(_BACKENDS[0]).removesuffix(_BACKENDS[1]) for name in (old, new)]
    if plain[0] != plain[1]:
        return ""
    change = "is not installed any more" if new.endswith("Pil") else "has been installed since"
    return (
        f"The image processor is the same but for its back end: the package torchvision {change}, and its pixels "
        "differ from Pillow's. Undo that to keep using this harvest.\n"
    )


class HarvestFolderError(DataError):
    """A harvest's folder cannot be used as it is; nothing in it was changed."""


class StreamError(DataError, OSError):
    """A tar of the stream cannot be read."""


class StoreError(DataError):
    """The file system behind the URL of `harvest.output` failed, or its package is not installed."""


class DiskTooSmallError(DataError):
    """What the harvest will write exceeds what is free."""


class StatesOverflowError(DataError):
    """A state is not finite in the storage dtype."""


class RankError(DataError):
    """RANK, WORLD_SIZE or SLURM_* contradict each other."""


class LockTimeoutError(DataError):
    """A lock could not be acquired in time."""


class ClusterError(DataError):
    """Ray is not installed, or its workers cannot be started."""


class PoisonShardsError(ClusterError):
    """Shards that no worker could make: `failures` maps each name to the error of its last worker."""

    def __init__(self, failures: Mapping[str, str], attempts: int) -> None:
        lines = "".join(f"\n  {name}: {reason}" for name, reason in sorted(failures.items()))
        super().__init__(
            f"{len(failures)} shards failed (up to {attempts} attempts each); all others are whole:{lines}\n"
            "Find out why (an image, memory, the device?) and start again: only these shards are made."
        )
        self.failures = dict(failures)
