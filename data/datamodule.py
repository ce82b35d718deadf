"""Batches for the predictor: a LightningDataModule over the shards of a finished harvest."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from data.shards import SPLITS, Sample, ShardReader, read_index

CACHES = ("auto", "device", "memory", "none")


class Batch(TypedDict):
    """Rows of one patch grid; a row is one prompt about one image.

    Attributes:
        states: block-0 output at the visual tokens, in the dtype of the shards. [B, N, d]
        attention: captured map, not normalised. [B, N], fp32
        question: pooled block-0 states of the prompt's text, dtype of the states. [B, d]
        grid: rows and columns of patches, N = rows * columns.
        key: sample key (image id) per row.
    """

    states: Tensor
    attention: Tensor
    question: Tensor
    grid: tuple[int, int]
    key: list[str]


RowNumbers = Sequence[int]


class ShardRows(Dataset[Batch]):
    """The rows of one split: `rows[[3, 17, ...]]` is the batch of these rows, which have to share a grid.

    Args:
        reader: samples of the split.
        device: copy all tensors there now ("cpu": into memory); None reads each batch through the memory maps.

    Attributes:
        grids: patch grid per row.
    """

    def __init__(self, reader: ShardReader, device: torch.device | None) -> None:
        self._reader = reader
        self._keys = reader.keys
        # row -> (sample, prompt of that sample)
        self._rows = [(sample, prompt) for sample, count in enumerate(reader.prompts) for prompt in range(count)]
        self.grids = [reader.grids[sample] for sample, _ in self._rows]
        self._samples = None if device is None else self._load(device)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, numbers: RowNumbers) -> Batch:
        grids = {self.grids[number] for number in numbers}
        if len(grids) != 1:
            raise ValueError(f"a batch needs rows of one grid, got {sorted(grids)}")
        rows = [self._rows[number] for number in numbers]
        samples = self._samples or {sample: _tensors(self._reader.stored(sample)) for sample, _ in rows}
        states = torch.stack([samples[sample]["states"] for sample, _ in rows])
        if states.dtype == torch.int8:
            scales = torch.stack([samples[sample]["scales"] for sample, _ in rows])
            states = states * scales[..., None]  # float32, in one go
        return {
            "states": states,
            "attention": torch.stack([samples[sample]["attention"][prompt] for sample, prompt in rows]),
            "question": torch.stack([samples[sample]["question"][prompt] for sample, prompt in rows]),
            "grid": grids.pop(),
            "key": [self._keys[sample] for sample, _ in rows],
        }

    def _load(self, device: torch.device) -> dict[int, dict[str, Tensor]]:
        numbers = tqdm(range(len(self._keys)), desc="load shards", unit="image", delay=2, leave=False)
        return {
            number: {name: t.to(device, copy=True) for name, t in _tensors(self._reader.stored(number)).items()}
            for number in numbers
        }


def _tensors(sample: Sample) -> dict[str, Tensor]:
    tensors = {"states": sample.states, "attention": sample.attention, "question": sample.question}
    return tensors if sample.scales is None else {**tensors, "scales": sample.scales}


class GridBatches(Sampler[list[int]]):
    """Batches of row numbers with one grid each.

    Shuffled, every epoch is a new permutation that depends on (seed, epoch) alone: rows are permuted inside their
    grid, then the batches among each other. Lightning calls `set_epoch`, also on resume.

    Args:
        grids: patch grid per row.
        batch_size: rows per batch; the last one of a grid may be smaller.
        shuffle: permute; otherwise rows come in order, grid after grid.
        seed: of the permutations.
    """

    def __init__(self, grids: Sequence[tuple[int, int]], batch_size: int, shuffle: bool, seed: int = 0) -> None:
        self._groups: dict[tuple[int, int], list[int]] = {}
        for row, grid in enumerate(grids):
            self._groups.setdefault(grid, []).append(row)
        self._batch_size = batch_size
        self._shuffle = shuffle
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the permutation of the next iteration."""
        self._epoch = epoch

    def __len__(self) -> int:
        return sum(-(-len(rows) // self._batch_size) for rows in self._groups.values())

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        batches: list[list[int]] = []
        for rows in self._groups.values():
            order = torch.randperm(len(rows), generator=generator).tolist() if self._shuffle else range(len(rows))
            ordered = [rows[position] for position in order]
            batches += [ordered[i : i + self._batch_size] for i in range(0, len(ordered), self._batch_size)]
        if self._shuffle:
            batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        return iter(batches)


class ShardDataModule(pl.LightningDataModule):
    """Train, validation and test batches (`Batch`) of a finished harvest.

    Where the shards are kept changes the speed alone: batches are the same, in the same order.

        device    every tensor lives on the accelerator that the fit runs on; outside of a fit, in memory
        memory    every tensor is copied into memory once
        none      each batch is read through memory maps

    Args:
        directory: folder of the harvest.
        batch_size: rows (maps) per batch.
        num_workers: processes that read shards; of no use, and therefore not started, unless the cache is none.
        seed: of the shuffle.
        cache: device, memory, none, or auto: the first of these that the shards fit into.
        memory_limit: bytes of shards that auto may keep in memory; by default a quarter of this machine's.

    Raises:
        UnfinishedHarvestError: the folder has no index.
        ValueError: an unknown cache.
    """

    def __init__(
        self,
        directory: str | Path,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        cache: str = "auto",
        memory_limit: int | None = None,
    ) -> None:
        super().__init__()
        if cache not in CACHES:
            raise ValueError(f"trainer.cache={cache!r}: use {', '.join(CACHES)}")
        self.directory = Path(directory)
        self.batch_size = batch_size
        self.seed = seed
        self.index = read_index(self.directory)
        self.bytes: int = sum(shard["bytes"] for shard in self.index["shards"])
        limit = _quarter_of_memory() if memory_limit is None else memory_limit
        fits = self.bytes <= limit
        self.in_memory = fits if cache == "auto" else cache != "none"
        self.num_workers = 0 if self.in_memory else num_workers
        self._cache = cache
        self._rows: dict[tuple[str, torch.device | None], ShardRows] = {}
        self._device: torch.device | None = None  # where the running fit keeps its rows
        way = "kept in memory" if self.in_memory else "read through memory maps"
        size = f"{self.bytes / 1e6:,.1f} MB"
        why = f"{size} are {'within' if fits else 'over'} the limit of {limit / 1e6:,.0f} MB"
        _say(f"{size} in {self.directory}, {way}: {why if cache == 'auto' else f'trainer.cache={cache}'}")

    @property
    def fingerprint(self) -> str:
        """Checksum of the data, for tracking."""
        return self.index["fingerprint"]

    @property
    def hidden_size(self) -> int:
        """Width d of the states."""
        return self.rows("train")[[0]]["states"].shape[-1]

    def rows(self, split: str, device: torch.device | None = None) -> ShardRows:
        """The rows of a split, opened at first use: on a device, or where the cache of this machine keeps them."""
        if device is None and self.in_memory:
            device = torch.device("cpu")
        if (split, device) not in self._rows:
            self._rows[split, device] = ShardRows(ShardReader(self.directory, split), device)
        return self._rows[split, device]

    def setup(self, stage: str) -> None:
        """Opens (and loads) what a stage needs: fit, validate or test."""
        self._device = self._choose_device() if stage == "fit" else None
        needed = {"fit": SPLITS[:2], "validate": SPLITS[1:2], "test": SPLITS[2:]}
        for split in needed.get(stage, ()):
            self.rows(split, self._device)

    def teardown(self, stage: str) -> None:
        """Frees the device."""
        self._rows = {place: rows for place, rows in self._rows.items() if place[1] in (None, torch.device("cpu"))}
        self._device = None

    def _choose_device(self) -> torch.device | None:
        """The accelerator of the fit, if the shards are to be kept there."""
        device: Any = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        if device.type == "cpu":
            if self._cache == "device":
                _say("trainer.cache=device, and the fit runs on the CPU: that is its memory")
            return None
        if self._cache == "device":
            return device
        if self._cache != "auto" or device.type != "cuda":
            return None
        free, _ = torch.cuda.mem_get_info(device)
        fits = self.bytes <= free // 2
        verdict = "kept on" if fits else "not kept on"
        _say(
            f"{self.bytes / 1e6:,.1f} MB {verdict} {device}: {'within' if fits else 'over'} half of {free / 1e6:,.0f} "
            "MB that are free there"
        )
        return device if fits else None

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled batches of the train split."""
        return self.loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Batches of the validation split, in order."""
        return self.loader("validation")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Batches of the test split, in order."""
        return self.loader("test")

    def loader(self, split: str, shuffle: bool = False) -> DataLoader[Batch]:
        """Batches of any split."""
        rows = self.rows(split, self._device)
        return DataLoader(
            rows,
            sampler=GridBatches(rows.grids, self.batch_size, shuffle, self.seed),  # type: ignore[arg-type]
            batch_size=None,  # the sampler already yields batches of rows
            collate_fn=_as_it_is,  # type: ignore[arg-type]
            num_workers=0 if self._device else self.num_workers,
        )


def _as_it_is(batch: Batch) -> Batch:
    # torch's default conversion (and its pinning) would turn the grid's tuple into a list
    return batch


def _say(message: str) -> None:
    tqdm.write(f"shards: {message}")


def _quarter_of_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
