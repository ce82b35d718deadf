"""Batches for the predictor: rows of shards, gathered from memory, a device or memory maps, and their order."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm

from data.grids import Grid
from data.ranks import Rank
from data.sample import Sample
from data.shards import ShardReader

_Place = tuple[int, int, int]  # of a row: its sample, the place of its grid in that, its prompt
_PER_IMAGE = ("states", "scales")  # all other tensors have one entry per prompt


class Batch(TypedDict):
    """Rows of one patch grid; a row is one prompt about one grid of an image.

    Attributes:
        states: block-0 output at the visual tokens, in the dtype of the shards. [B, N, d]
        attention: captured map, not normalised. [B, N], fp32
        question: pooled block-0 states of the prompt's text, dtype of the states. [B, d]
        grid: rows and columns of patches, N = rows * columns.
        key: sample key (image id) per row.
        place: of each row's grid among those of its image.
        weight: factor of a mean over these rows that makes the mean over processes the mean over all their rows: 1,
            unless several processes have shares of different size.
    """

    states: Tensor
    attention: Tensor
    question: Tensor
    grid: Grid
    key: list[str]
    place: list[int]
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
        grids: patch grid per row, image after image, of an image grid after grid.
    """

    def __init__(self, reader: ShardReader, device: torch.device | None) -> None:
        self._reader = reader
        self._keys = reader.keys
        self._rows: list[_Place] = [
            (sample, place, prompt)
            for sample, (grids, prompts) in enumerate(zip(reader.grids, reader.prompts, strict=True))
            for place in range(len(grids))
            for prompt in range(prompts)
        ]
        self.grids: list[Grid] = [reader.grids[sample][place] for sample, place, _ in self._rows]
        self._held = None if device is None else _HeldTensors(reader, device)
        self._means: dict[tuple[int, int], Tensor] | None = None

    def with_mean_maps(self) -> ShardRows:
        """The same rows, each with the mean of its image's maps as its map; each map is scaled to sum 1 before."""
        rows = copy.copy(self)
        rows._means = {}
        return rows

    def of_images(self, images: int) -> int:
        """Rows of the first so many images, which come before all others."""
        counts = zip(self._reader.grids[:images], self._reader.prompts[:images], strict=True)
        return sum(len(grids) * prompts for grids, prompts in counts)

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
            samples = {sample: self._reader.stored(sample) for sample, _, _ in rows}
            tensors = stack_rows([(samples[sample].part(place), prompt) for sample, place, prompt in rows])
        if self._means is not None:
            means = [self._mean(sample, place) for sample, place, _ in rows]
            tensors["attention"] = torch.stack(means).to(tensors["states"].device)
        return as_batch(tensors, grid, [(self._keys[sample], place) for sample, place, _ in rows], part.weight)

    def _mean(self, sample: int, place: int) -> Tensor:
        assert self._means is not None
        if (sample, place) not in self._means:
            maps = self._reader.stored(sample).part(place).attention  # [P, N]
            total = maps.sum(dim=-1, keepdim=True)
            self._means[sample, place] = (maps / total.where(total > 0, 1.0)).mean(dim=0)  # [N]
        return self._means[sample, place]


def stack_rows(rows: Sequence[tuple[Sample, int]]) -> dict[str, Tensor]:
    """Stacks (part of a sample as stored, number of its prompt) pairs of one grid.

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


def as_batch(
    tensors: Mapping[str, Tensor], grid: Grid, origins: Sequence[tuple[str, int]], weight: float = 1.0
) -> Batch:
    """Makes a batch of what `stack_rows` returns and of each row's key and place; int8 states become float32."""
    states = tensors["states"]
    if "scales" in tensors:
        states = states * tensors["scales"][..., None]  # float32, in one operation
    return {
        "states": states,
        "attention": tensors["attention"],
        "question": tensors["question"],
        "grid": grid,
        "key": [key for key, _ in origins],
        "place": [place for _, place in origins],
        "weight": weight,
    }


class _HeldTensors:
    """All parts of a split's samples on one device: per grid one tensor of each kind, prompts one after another."""

    def __init__(self, reader: ShardReader, device: torch.device) -> None:
        self._device = device
        parts: dict[Grid, list[tuple[int, int]]] = {}
        for sample, grids in enumerate(reader.grids):
            for place, grid in enumerate(grids):
                parts.setdefault(grid, []).append((sample, place))
        self._tensors: dict[Grid, dict[str, Tensor]] = {}
        # (sample, place) -> number among its grid's parts, and of its first row
        self._numbers: dict[tuple[int, int], tuple[int, int]] = {}
        total = sum(map(len, parts.values()))
        with tqdm(total=total, desc="load shards", unit="grid", delay=2, leave=False) as progress:
            for grid, same in parts.items():
                held = self._tensors[grid] = self._empty(reader, same)
                row = 0
                for number, (sample, place) in enumerate(same):
                    part, end = reader.stored(sample).part(place), row + reader.prompts[sample]
                    for name, tensor in held.items():
                        tensor[number if name in _PER_IMAGE else slice(row, end)] = getattr(part, name)
                    self._numbers[sample, place] = number, row
                    row = end
                    progress.update()

    def _empty(self, reader: ShardReader, parts: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        """Tensors for these parts, which share a grid: [S, ...] per part, [R, ...] per prompt."""
        sample, place = parts[0]
        rows = sum(reader.prompts[sample] for sample, _ in parts)
        held = {}
        for name, like in reader.stored(sample).part(place).tensors().items():
            shape = (len(parts), *like.shape) if name in _PER_IMAGE else (rows, *like.shape[1:])
            held[name] = torch.empty(shape, dtype=like.dtype, device=self._device)
        return held

    def gather(self, grid: Grid, rows: Sequence[_Place]) -> dict[str, Tensor]:
        """Copies rows of a grid out, as `stack_rows` would stack them."""
        places = [self._numbers[sample, place][0] for sample, place, _ in rows]
        numbers = [self._numbers[sample, place][1] + prompt for sample, place, prompt in rows]
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
