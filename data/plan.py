"""The plan of a harvest: which images each shard holds, and what all processes that make shards have to agree on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import SettingsError
from data.images import seeded_order, split_ids
from data.index import MOST, canonical_json, planned_shards
from data.settings import HarvestSettings
from data.store import Store

BAD_SHARE = 0.01  # of the planned images may be unusable


@dataclass(frozen=True)
class ShardPlan:
    """What a shard will hold.

    Attributes:
        name: shard name without ending.
        split: train, validation or test.
        image_ids: its images, in order.
        reserve: images that no other shard may use; they replace those that cannot be used, in order.
    """

    name: str
    split: str
    image_ids: tuple[int, ...]
    reserve: tuple[int, ...]


def set_aside(ids: Sequence[int], settings: HarvestSettings) -> list[int]:
    """The images kept for hyper-parameters: `settings.tuning` of them, right behind the splits in the seeded order.

    Raises:
        NotEnoughImagesError: splits and tuning ask for more images than there are ids.
    """
    return split_ids(ids, {**settings.splits, "tuning": settings.tuning}, settings.seed)["tuning"]


def plan_shards(ids: Sequence[int], settings: HarvestSettings) -> list[ShardPlan]:
    """Assigns images to shards.

    The images that are set aside for hyper-parameters stay out of all of them. Those that follow in the seeded order
    are assigned as reserves, one to each shard in turn, so that a shard can replace a bad image without knowing what
    happened to the others.

    Raises:
        NotEnoughImagesError: splits and tuning ask for more images than there are ids.
        SettingsError: more shards, or more images in a shard, than their records can list.
    """
    splits, size = settings.splits, settings.shard_size
    count = sum(-(-images // size) for images in splits.values())
    if count > MOST or min(size, max(splits.values())) > MOST:
        raise SettingsError(
            f"harvest.shard_size={size} makes {count:,} shards of {settings.images:,} images: a harvest has at most "
            f"{MOST:,} shards, and a shard at most {MOST:,} images"
        )
    tuned = len(set_aside(ids, settings))  # before the rest: it counts all that is asked for
    chosen = split_ids(ids, splits, settings.seed)
    parts = [
        (name, split, tuple(chosen[split][number * size : (number + 1) * size]))
        for split, names in planned_shards(splits, size).items()
        for number, name in enumerate(names)
    ]
    spare = seeded_order(ids, settings.seed, "split")[settings.images + tuned :]
    return [ShardPlan(*part, tuple(spare[number :: len(parts)])) for number, part in enumerate(parts)]


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Identity of the settings of a harvest."""
    return hashlib.sha256(canonical_json(settings)).hexdigest()[:16]


@dataclass(frozen=True)
class Job:
    """One harvest, without model and images: it can be sent to other processes.

    Attributes:
        directory: folder of the shards.
        plans: all shards, in order.
        settings: what determines the samples; `harvest.json` holds it.
        provenance: what the index says of how they were made; the sidecars add to it.
        bytes_per_image: what one image takes, at most; of some images of the plan, where grids differ.
        tokens_per_image: visual tokens of these images: the fewest, the mean and the most.
        prompts_per_image: maps per image.
        tuning: images that are set aside for hyper-parameters.
        output: URL of the folder's copy that all machines share; None for none.
    """

    directory: Path
    plans: tuple[ShardPlan, ...]
    settings: Mapping[str, Any]
    provenance: Mapping[str, Any]
    bytes_per_image: int
    tokens_per_image: tuple[int, int, int]
    prompts_per_image: int
    tuning: tuple[int, ...] = ()
    output: str | None = None

    @property
    def store(self) -> Store | None:
        """The copy at `output`."""
        return Store(self.output) if self.output else None

    @property
    def settings_digest(self) -> str:
        """Identity of the settings, written into every sidecar."""
        return settings_digest(self.settings)

    @property
    def names(self) -> list[str]:
        """Names of all shards, in order."""
        return [plan.name for plan in self.plans]

    @property
    def images(self) -> int:
        """Images planned in all."""
        return sum(len(plan.image_ids) for plan in self.plans)

    @property
    def allowed_bad(self) -> int:
        """Unusable images that the harvest may have."""
        return max(1, int(BAD_SHARE * self.images))
