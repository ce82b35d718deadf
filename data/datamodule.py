"""Batches for the predictor: a LightningDataModule over the shards of a finished harvest."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypedDict

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from data.shards import SPLITS, ShardReader, read_index


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
        in_memory: copy all tensors into memory now; otherwise each batch is read through the memory maps.

    Attributes:
        grids: patch grid per row.
    """

    def __init__(self, reader: ShardReader, in_memory: bool) -> None:
        self._reader = reader
        self._keys = reader.keys
        # row -> (sample, prompt of that sample)
        self._rows = [(sample, prompt) for sample, count in enumerate(reader.prompts) for prompt in range(count)]
        self.grids = [reader.grids[sample] for sample, _ in self._rows]
        self._samples = self._load() if in_memory else None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, numbers: RowNumbers) -> Batch:
        grids = {self.grids[number] for number in numbers}
        if len(grids) != 1:
            raise ValueError(f"a batch needs rows of one grid, got {sorted(grids)}")
        rows = [self._rows[number] for number in numbers]
        samples = self._samples or {sample: self._tensors(sample) for sample, _ in rows}
        return {
            "states": torch.stack([samples[sample][0] for sample, _ in rows]),
            "attention": torch.stack([samples[sample][1][prompt] for sample, prompt in rows]),
            "question": torch.stack([samples[sample][2][prompt] for sample, prompt in rows]),
            "grid": grids.pop(),
            "key": [self._keys[sample] for sample, _ in rows],
        }

    def _tensors(self, sample: int) -> tuple[Tensor, Tensor, Tensor]:
        stored = self._reader[sample]
        return stored.states, stored.attention, stored.question

    def _load(self) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
        numbers = tqdm(range(len(self._keys)), desc="load shards", unit="image", delay=2, leave=False)
        return {n: tuple(tensor.clone() for tensor in self._tensors(n)) for n in numbers}  # type: ignore[misc]


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

    Shards that fit are copied into memory once; larger ones are read through memory maps, in the same order.

    Args:
        directory: folder of the harvest.
        batch_size: rows (maps) per batch.
        num_workers: processes that read shards; of no use, and therefore not started, when all is in memory.
        seed: of the shuffle.
        memory_limit: bytes of shards that may be kept in memory; by default a quarter of this machine's.

    Raises:
        UnfinishedHarvestError: the folder has no index.
    """

    def __init__(
        self,
        directory: str | Path,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        memory_limit: int | None = None,
    ) -> None:
        super().__init__()
        self.directory = Path(directory)
        self.batch_size = batch_size
        self.seed = seed
        self.index = read_index(self.directory)
        size = sum(shard["bytes"] for shard in self.index["shards"])
        limit = _quarter_of_memory() if memory_limit is None else memory_limit
        self.in_memory = size <= limit
        self.num_workers = 0 if self.in_memory else num_workers
        self._rows: dict[str, ShardRows] = {}
        way = "kept in memory" if self.in_memory else "read through memory maps"
        tqdm.write(f"shards: {size / 1e6:,.1f} MB in {self.directory}, {way} (limit {limit / 1e6:,.0f} MB)")

    @property
    def fingerprint(self) -> str:
        """Checksum of the data, for tracking."""
        return self.index["fingerprint"]

    @property
    def hidden_size(self) -> int:
        """Width d of the states."""
        return self.rows("train")[[0]]["states"].shape[-1]

    def rows(self, split: str) -> ShardRows:
        """The rows of a split, opened at first use."""
        if split not in self._rows:
            self._rows[split] = ShardRows(ShardReader(self.directory, split), self.in_memory)
        return self._rows[split]

    def setup(self, stage: str) -> None:
        """Opens (and loads) what a stage needs: fit, validate or test."""
        needed = {"fit": SPLITS[:2], "validate": SPLITS[1:2], "test": SPLITS[2:]}
        for split in needed.get(stage, ()):
            self.rows(split)

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
        rows = self.rows(split)
        return DataLoader(
            rows,
            sampler=GridBatches(rows.grids, self.batch_size, shuffle, self.seed),  # type: ignore[arg-type]
            batch_size=None,  # the sampler already yields batches of rows
            collate_fn=_as_it_is,  # type: ignore[arg-type]
            num_workers=self.num_workers,
        )

    def state_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the training states per feature, each image once.

        Returns:
            mean [d] and std [d], float32.
        """
        total = squares = torch.zeros(())
        tokens = 0
        reader = ShardReader(self.directory, "train")
        for sample in tqdm(reader, desc="state statistics", unit="image", delay=2, leave=False):
            states = sample.states.double()  # [N, d]
            total = total + states.sum(0)
            squares = squares + states.square().sum(0)
            tokens += len(states)
        mean = total / tokens
        return mean.float(), (squares / tokens - mean.square()).clamp_min(0).sqrt().float()


def _as_it_is(batch: Batch) -> Batch:
    # torch's default conversion (and its pinning) would turn the grid's tuple into a list
    return batch


def _quarter_of_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
