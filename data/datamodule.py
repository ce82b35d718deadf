"""Train, validation and test batches of a finished harvest: a LightningDataModule over its shards."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from data.batches import BEGINNING, Batch, GridBatches, Part, ShardRows, Start
from data.errors import DataError, SettingsError
from data.files import is_count
from data.grids import Grid
from data.index import SPLITS, Index, read_index
from data.log import log
from data.ranks import Rank
from data.settings import ReadingSettings
from data.shards import ShardReader
from data.stream import StreamedBatches

_DEFAULTS = ReadingSettings()


class ShardDataModule(pl.LightningDataModule):
    """Train, validation and test batches (`Batch`) of a finished harvest.

    Where the shards are kept changes the speed alone: batches are the same, in the same order.

        device    every tensor lives on the accelerator that the fit runs on; outside of a fit, in memory
        memory    every tensor is copied into memory once
        none      each batch is read through memory maps
        stream    the train split is read tar by tar, in a different order (data/stream.py); the other splits, which
                  are small, as by auto
        auto      device, memory or none: the first that the shards fit into

    Processes that read shards are started where they help: for a stream, or for memory maps.

    Args:
        directory: folder of the harvest.
        settings: batch size, images to fit to, workers, and where the shards are kept.
        seed: of the shuffle.
        mean_maps: fit to the mean map of an image's prompts; validation and test keep the map of each prompt.
        memory_limit: bytes of shards that auto may keep in memory; by default a quarter of this machine's.

    Attributes:
        directory: folder of the harvest.
        settings: how the shards are read.
        seed: of the shuffle.
        mean_maps: whether train rows have mean maps.
        index: the harvest's `index.json`.
        streams: whether the train split is a stream.
        bytes: size of the shards that are not streamed.
        in_memory: whether they are kept in memory.

    Raises:
        UnfinishedHarvestError: the folder has no index.
        SettingsError: more images than there are, or mean maps of a stream.
    """

    def __init__(
        self,
        directory: str | Path,
        settings: ReadingSettings = _DEFAULTS,
        *,
        seed: int = 0,
        mean_maps: bool = False,
        memory_limit: int | None = None,
    ) -> None:
        super().__init__()
        self.directory = Path(directory)
        self.index: Index = read_index(self.directory)
        self._limit = _quarter_of_memory() if memory_limit is None else memory_limit
        self._rows: dict[tuple[str, torch.device | None], ShardRows] = {}  # shared with the modules of `for_fit`
        self._choose(settings, seed, mean_maps)
        self._log_cache()

    def for_fit(self, settings: ReadingSettings, *, seed: int, mean_maps: bool) -> ShardDataModule:
        """Another choice of rows and order over the same opened shards, whose caches both modules share.

        Raises:
            SettingsError: more images than there are, or mean maps of a stream.
        """
        other = copy.copy(self)
        other.trainer = None
        other._rows = self._rows  # a copy, like a pickle, begins without
        other._choose(settings, seed, mean_maps)
        return other

    def _choose(self, settings: ReadingSettings, seed: int, mean_maps: bool) -> None:
        images = sum(shard["samples"] for shard in self.index["shards"] if shard["split"] == "train")
        if settings.train_images is not None and settings.train_images > images:
            raise SettingsError(
                f"trainer.train_images={settings.train_images}: {self.directory} has {images} images to fit to; lower "
                "it, or raise harvest.samples"
            )
        self.streams = settings.cache == "stream"
        if self.streams and mean_maps:
            raise SettingsError(
                "trainer.cache=stream has the map of each prompt alone, and mean maps are asked for: choose another "
                "cache, or set predictor.target=prompt"
            )
        self.settings, self.seed, self.mean_maps = settings, seed, mean_maps
        held = [shard for shard in self.index["shards"] if not (self.streams and shard["split"] == "train")]
        self.bytes: int = sum(shard["bytes"] for shard in held)
        fits = self.bytes <= self._limit
        self.in_memory = fits if settings.cache in ("auto", "stream") else settings.cache != "none"
        self._workers = 0 if self.in_memory and not self.streams else settings.num_workers
        self._device: torch.device | None = None  # where the running fit keeps its rows
        self._start = BEGINNING  # where the fit resumes

    def _log_cache(self) -> None:
        cache = self.settings.cache
        if self.streams:
            source = self.settings.stream_from or self.directory
            log("shards", f"trainer.cache=stream: the train split is read from {source} shard by shard")
        way = "kept in memory" if self.in_memory else "read through memory maps"
        size = f"{self.bytes / 1e6:,.1f} MB"
        within = "within" if self.bytes <= self._limit else "over"
        limit = f"{size} are {within} the limit of {self._limit / 1e6:,.0f} MB"
        why = limit if cache in ("auto", "stream") else f"trainer.cache={cache}"
        log("shards", f"{size} in {self.directory}, {way}: {why}")

    @property
    def fingerprint(self) -> str:
        """Checksum of the data, for tracking."""
        return self.index["fingerprint"]

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the batches and their order; caches, workers and processes do not."""
        identity = {"fingerprint": self.fingerprint, "batch_size": self.settings.batch_size, "seed": self.seed}
        chosen = {"stream": self.streams, "train_images": self.settings.train_images, "mean_maps": self.mean_maps}
        return identity | {name: value for name, value in chosen.items() if value}

    @property
    def hidden_size(self) -> int:
        """Width d of the states.

        Raises:
            SettingsError: there are none.
        """
        rows = self.rows("validation" if self.streams else "train")
        if not len(rows):
            raise SettingsError(f"{self.directory} has no images to fit to: none of them could be decoded")
        return rows[Part([0])]["states"].shape[-1]

    def grids(self, split: str) -> list[Grid]:
        """The patch grid of each row (map) of a split."""
        return self.rows(split).grids

    def count(self, split: str) -> int:
        """Rows (maps) of a split."""
        if split == "train" and self.settings.train_images is not None:
            return self.rows(split).of_images(self.settings.train_images)
        return sum(shard["rows"] for shard in self.index["shards"] if shard["split"] == split)

    def state_dict(self) -> dict[str, Any]:
        """The place in the epoch, for a checkpoint of the fit."""
        if self.trainer is None:
            return {"epoch": 0, "batches": 0}
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        over = done >= self.trainer.num_training_batches
        return {"epoch": self.trainer.current_epoch + over, "batches": 0 if over else done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lets the fit begin where the checkpoint was made.

        Raises:
            DataError: the checkpoint does not say where.
        """
        place = [state_dict.get(key) for key in ("epoch", "batches")]
        if not all(map(is_count, place)):
            raise DataError(f"the checkpoint was made at epoch and batch {place}: remove it, and fit again")
        self._start = Start(state_dict["epoch"], state_dict["batches"])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_rows": {}}  # a spawned process opens its own

    def rows(self, split: str, device: torch.device | None = None) -> ShardRows:
        """The rows of a split, opened at first use: on a device, or where the cache of this machine keeps them."""
        if device is None and self.in_memory:
            device = torch.device("cpu")
        if (split, device) not in self._rows:
            self._rows[split, device] = ShardRows(ShardReader(self.directory, split), device)
        return self._rows[split, device]

    def setup(self, stage: str) -> None:
        """Opens (and loads) what a stage needs: fit, validate or test."""
        processes = self.trainer.num_devices if self.trainer else 1
        chosen_by_size = self.settings.cache in ("auto", "stream")
        if chosen_by_size and self.in_memory and processes > 1 and processes * self.bytes > self._limit:
            self.in_memory = False
            size = f"{self.bytes / 1e6:,.1f} MB"
            log("shards", f"{processes} processes would each keep {size}: read through memory maps instead")
        self._device = self._choose_device() if stage == "fit" else None
        needed = {"fit": SPLITS[self.streams : 2], "validate": SPLITS[1:2], "test": SPLITS[2:]}
        for split in needed.get(stage, ()):
            self.rows(split, self._device)

    def teardown(self, stage: str) -> None:
        """Frees the device."""
        for split, device in list(self._rows):
            if device not in (None, torch.device("cpu")):
                del self._rows[split, device]
        self._device = None
        self._start = BEGINNING

    def _choose_device(self) -> torch.device | None:
        """The accelerator of the fit, if the shards are to be kept there."""
        cache = self.settings.cache
        device: Any = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        if device.type == "cpu":
            if cache == "device":
                log("shards", "trainer.cache=device, and the fit runs on the CPU: shards are kept in its memory")
            return None
        if cache == "device":
            return device
        if cache not in ("auto", "stream") or device.type != "cuda":
            return None
        free, _ = torch.cuda.mem_get_info(device)
        fits = self.bytes <= free // 2
        verdict, side = ("kept on", "within") if fits else ("not kept on", "over")
        half = f"half of {free / 1e6:,.0f} MB that are free there"
        log("shards", f"{self.bytes / 1e6:,.1f} MB {verdict} {device}: {side} {half}")
        return device if fits else None

    def train_dataloader(self) -> DataLoader[Batch] | StreamedBatches:
        """Shuffled batches of the train split."""
        return self.loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch] | StreamedBatches:
        """Batches of the validation split, in order."""
        return self.loader("validation")

    def test_dataloader(self) -> DataLoader[Batch] | StreamedBatches:
        """Batches of the test split, in order."""
        return self.loader("test")

    def loader(self, split: str, shuffle: bool = False) -> DataLoader[Batch] | StreamedBatches:
        """Batches of any split; those of a stream are shuffled in any case."""
        rank, settings = _rank(), self.settings
        start = self._start if shuffle else BEGINNING
        if self.streams and split == "train":
            return StreamedBatches(self.directory, settings, seed=self.seed, rank=rank, start=start)
        rows = self.rows(split, self._device)
        grids = rows.grids
        if split == "train" and settings.train_images is not None:
            grids = grids[: rows.of_images(settings.train_images)]
        if split == "train" and self.mean_maps:
            rows = rows.with_mean_maps()
        return DataLoader(
            rows,
            sampler=GridBatches(grids, settings.batch_size, shuffle, self.seed, rank, start),  # type: ignore[arg-type]
            batch_size=None,  # the sampler already yields batches of rows
            collate_fn=_unchanged,  # type: ignore[arg-type]
            num_workers=0 if self._device else self._workers,
        )


def _rank() -> Rank:
    """This process among those of the running fit; outside of a fit, the only one."""
    running = torch.distributed.is_available() and torch.distributed.is_initialized()
    return Rank(torch.distributed.get_rank(), torch.distributed.get_world_size()) if running else Rank()


def _unchanged(batch: Batch) -> Batch:
    # torch's default conversion (and its pinning) would turn the grid's tuple into a list
    return batch


def _quarter_of_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
