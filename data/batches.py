"""Batches for the predictor: rows of shards, gathered from memory, a device or memory maps, and their order."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm

from data.ranks import Rank
from data.sample import Sample
from data.shards import ShardReader

Grid = tuple[int, int]
_PER_IMAGE = ("states", "scales")  # all other tensors have one entry per prompt


class Batch(TypedDict):
    """Rows of one patch grid; a row is one prompt about one image.

    Attributes:
        states: block-0 output at the visual tokens, in the dtype of the shards. [B, N, d]
        attention: captured map, not normalised. [B, N], fp32
        question: pooled block-0 states of the prompt's text, dtype of the states. [B, d]
        grid: rows and columns of patches, N = rows * columns.
        key: sample key (image id) per row.
        weight: factor of a mean over these rows that makes the mean over processes the mean over all their rows: 1,
            unless several processes have shares of different size.
    """

    states: Tensor
    attention: Tensor
    question: Tensor
    grid: Grid
    key: list[str]
    weight: float


class Part(NamedTuple):
    """Row numbers of one batch, or of one process's share of it, and the weight of the share."""

    numbers: Sequence[int]
    weight: float = 1.0


class Start(NamedTuple):
    """Where an interrupted fit resumes: the epoch to begin with, and how many of its batches to skip."""

    epoch: int = 0
    batches: int = 0


BEGINNING = Start()


class ShardRows(Dataset[Batch]):
    """The rows of one split: `rows[Part([3, 17, ...])]` is the batch of these rows, which have to share a grid.

    Args:
        reader: samples of the split.
        device: copy all tensors there now ("cpu": into memory), one [S, N, d] for each grid, from which batches are
            gathered; None reads each batch through the memory maps.

    Attributes:
        grids: patch grid per row, image after image.
    """

    def __init__(self, reader: ShardReader, device: torch.device | None) -> None:
        self._reader = reader
        self._keys = reader.keys
        # row -> (sample, prompt of that sample)
        self._rows = [(sample, prompt) for sample, count in enumerate(reader.prompts) for prompt in range(count)]
        self.grids = [reader.grids[sample] for sample, _ in self._rows]
        self._held = None if device is None else _HeldTensors(reader, device)
        self._means: dict[int, Tensor] | None = None

    def with_mean_maps(self) -> ShardRows:
        """The same rows, each with the mean of its image's maps as its map; each map is scaled to sum 1 before."""
        rows = copy.copy(self)
        rows._means = {}
        return rows

    def of_images(self, images: int) -> int:
        """Rows of the first so many images, which come before all others."""
        return sum(self._reader.prompts[:images])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, part: Part) -> Batch:
        grids = {self.grids[number] for number in part.numbers}
        if len(grids) != 1:
            raise ValueError(f"a batch needs rows of one grid, got {sorted(grids)}")
        grid = grids.pop()
        rows = [self._rows[number] for number in part.numbers]
        if self._held:
            tensors = self._held.gather(grid, rows)
        else:
            samples = {sample: self._reader.stored(sample) for sample, _ in rows}
            tensors = stack_rows([(samples[sample], prompt) for sample, prompt in rows])
        if self._means is not None:
            tensors["attention"] = torch.stack([self._mean(sample) for sample, _ in rows]).to(tensors["states"].device)
        return as_batch(tensors, grid, [self._keys[sample] for sample, _ in rows], part.weight)

    def _mean(self, sample: int) -> Tensor:
        assert self._means is not None
        if sample not in self._means:
            maps = self._reader.stored(sample).attention  # [P, N]
            total = maps.sum(dim=-1, keepdim=True)
            self._means[sample] = (maps / total.where(total > 0, 1.0)).mean(dim=0)  # [N]
        return self._means[sample]


def stack_rows(rows: Sequence[tuple[Sample, int]]) -> dict[str, Tensor]:
    """Stacks (sample as stored, number of its prompt) pairs of one grid.

    Returns:
        states [B, N, d], attention [B, N], question [B, d]; beside int8 states their scales [B, N].
    """
    tensors = {
        "states": torch.stack([sample.states for sample, _ in rows]),
        "attention": torch.stack([sample.attention[prompt] for sample, prompt in rows]),
        "question": torch.stack([sample.question[prompt] for sample, prompt in rows]),
    }
    if tensors["states"].dtype == torch.int8:
        tensors["scales"] = torch.stack([sample.scales for sample, _ in rows if sample.scales is not None])
    return tensors


def as_batch(tensors: Mapping[str, Tensor], grid: Grid, keys: list[str], weight: float) -> Batch:
    """Makes a batch of what `stack_rows` returns; int8 states become float32."""
    states = tensors["states"]
    if "scales" in tensors:
        states = states * tensors["scales"][..., None]  # float32, in one operation
    return {
        "states": states,
        "attention": tensors["attention"],
        "question": tensors["question"],
        "grid": grid,
        "key": keys,
        "weight": weight,
    }


class _HeldTensors:
    """All samples of a split on one device: for each grid, one tensor of each kind, prompts one after another."""

    def __init__(self, reader: ShardReader, device: torch.device) -> None:
        self._device = device
        samples: dict[Grid, list[int]] = {}
        for sample, grid in enumerate(reader.grids):
            samples.setdefault(grid, []).append(sample)
        self._tensors: dict[Grid, dict[str, Tensor]] = {}
        self._place: dict[int, tuple[int, int]] = {}  # sample -> place among its grid's samples, and of its first row
        with tqdm(total=len(reader), desc="load shards", unit="image", delay=2, leave=False) as progress:
            for grid, numbers in samples.items():
                held = self._tensors[grid] = self._empty(reader, numbers)
                row = 0
                for place, number in enumerate(numbers):
                    sample = reader.stored(number)
                    for name, tensor in held.items():
                        if name in _PER_IMAGE:
                            tensor[place] = getattr(sample, name)
                        else:
                            tensor[row : row + reader.prompts[number]] = getattr(sample, name)
                    self._place[number] = place, row
                    row += reader.prompts[number]
                    progress.update()

    def _empty(self, reader: ShardReader, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Tensors for these samples, which share a grid: [S, ...] per image, [R, ...] per prompt."""
        first = reader.stored(numbers[0])
        rows = sum(reader.prompts[number] for number in numbers)
        held = {}
        for name, like in first.tensors().items():
            shape = (len(numbers), *like.shape) if name in _PER_IMAGE else (rows, *like.shape[1:])
            held[name] = torch.empty(shape, dtype=like.dtype, device=self._device)
        return held

    def gather(self, grid: Grid, rows: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        """Copies the rows (sample, prompt) of a grid out, as `stack_rows` would stack them."""
        places = [self._place[sample][0] for sample, _ in rows]
        numbers = [self._place[sample][1] + prompt for sample, prompt in rows]
        both = torch.tensor([places, numbers]).to(self._device, non_blocking=True)  # [2, B]
        return {
            name: tensor.index_select(0, both[0 if name in _PER_IMAGE else 1])
            for name, tensor in self._tensors[grid].items()
        }


class GridBatches(Sampler[Part]):
    """Batches of row numbers with one grid each.

    Shuffled, every epoch is a new permutation that depends on (seed, epoch) alone: rows are permuted inside their
    grid, then the batches among each other. Lightning calls `set_epoch`, but only after it has made the first epoch's
    iterator: a resumed fit has to give its `start`.

    Several processes (ranks) share each shuffled batch: the batches are those of one process, and all ranks have the
    same number of them. In order, each row belongs to one rank, whose batches may be fewer than another's.

    Args:
        grids: patch grid per row.
        batch_size: rows per batch, of all ranks together where it is shuffled; the last one of a grid may be smaller.
        shuffle: permute; otherwise rows come in order, grid after grid.
        seed: of the permutations.
        rank: this process among those of the fit.
        start: where an interrupted fit resumes.
    """

    def __init__(
        self,
        grids: Sequence[Grid],
        batch_size: int,
        shuffle: bool,
        seed: int = 0,
        rank: Rank | None = None,
        start: Start = BEGINNING,
    ) -> None:
        self._rank = rank or Rank()
        self._groups: dict[Grid, list[int]] = {}
        for row, grid in enumerate(grids):
            if shuffle or self._rank.owner(row) == self._rank.number:
                self._groups.setdefault(grid, []).append(row)
        self._batch_size = batch_size
        self._shuffle = shuffle
        self._seed = seed
        self._start = start
        self._epoch = start.epoch

    def set_epoch(self, epoch: int) -> None:
        """Chooses the permutation of the next iteration."""
        self._epoch = epoch

    def __len__(self) -> int:
        return sum(-(-len(rows) // self._batch_size) for rows in self._groups.values())

    def __iter__(self) -> Iterator[Part]:
        generator = epoch_generator(self._seed, self._epoch)
        batches: list[list[int]] = []
        for rows in self._groups.values():
            order = torch.randperm(len(rows), generator=generator).tolist() if self._shuffle else range(len(rows))
            ordered = [rows[position] for position in order]
            batches += [ordered[i : i + self._batch_size] for i in range(0, len(ordered), self._batch_size)]
        if not self._shuffle:
            return iter([Part(batch) for batch in batches])
        batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        skip = self._start.batches if self._epoch == self._start.epoch else 0
        return iter([self._share(batch) for batch in batches[skip:]])

    def _share(self, batch: list[int]) -> Part:
        own = self._rank.share(batch)
        # a rank without rows takes part in the step all the same, with a row that does not count
        return Part(own or batch[:1], len(own) * self._rank.size / len(batch))


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """Random numbers that depend on seed and epoch alone."""
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)
