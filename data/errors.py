"""What can go wrong with images, models and shards. Each message says what to do next.

DataError
├── SettingsError            settings that contradict each other, the images, or the shards
├── AnnotationError          an images folder without (readable) annotations, or annotations without their images
├── NotEnoughImagesError     more samples asked than images exist
├── CorruptImageError        one image file cannot be decoded
├── TooManyBadImagesError    more than 1 % of the planned images cannot be decoded
├── ModelLoadError           a vision-language model or its processor cannot be loaded
├── UnfinishedHarvestError   a folder of shards without its index: never harvested, or interrupted
├── DamagedShardError        a shard (or its sidecar) is missing, cut, flipped or of another format
├── HarvestMismatchError     a folder of shards was made with other settings
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


class TooManyBadImagesError(DataError):
    """More than 1 % (and at least two) of the planned images cannot be decoded."""


class ModelLoadError(DataError):
    """A model folder or hub id cannot be loaded."""


class UnfinishedHarvestError(DataError):
    """There is no `index.json`: the harvest has not been run here, or has not been finished."""


class DamagedShardError(DataError):
    """A shard does not hold what its sidecar says: `name` is the shard, `reason` what is wrong with it."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(
            f"shard {name}: {reason}. Run the harvest again with the same settings: only this shard is redone."
        )
        self.name = name
        self.reason = reason


class HarvestMismatchError(DataError):
    """The folder (or URL) was harvested with other settings: `difference` maps each key to its (old, new) values."""

    def __init__(self, directory: Path | str, difference: Mapping[str, tuple[object, object]]) -> None:
        lines = "".join(f"\n  {key}: {old!r} -> {new!r}" for key, (old, new) in sorted(difference.items()))
        key = "harvest.output" if isinstance(directory, str) else "runs_dir"
        super().__init__(
            f"{directory} was harvested with other settings (there -> asked now):{lines}\n"
            f"Ask for the old settings, harvest into another folder ({key}=...), or remove this one."
        )
        self.directory = directory
        self.difference = difference


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
