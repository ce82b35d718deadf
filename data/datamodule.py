"""Batches for the predictor: a LightningDataModule over the shards of a finished harvest."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from data.shards import SPLITS, Sample, ShardReader, read_index
from data.stream import StreamedRows

CACHES = ("auto", "device", "memory", "none", "stream")


class Batch(TypedDict):
    """Rows of one patch grid; a row is one prompt about one image.

    Attributes:
        states: block-0 output at the visual tokens, in the dtype of the shards. [B, N, d]
        attention: captured map, not normalised. [B, N], fp32
        question: pooled block-0 states of the prompt's text, dtype of the states. [B, d]
        grid: rows and columns of patches, N = rows * columns.
        key: sample key (image id) per row.
        weight: what a mean over these rows counts, so that the mean over processes is the mean over all their rows: 1,
            unless several processes have shares of different size.
    """

    states: Tensor
    attention: Tensor
    question: Tensor
    grid: tuple[int, int]
    key: list[str]
    weight: float


class Part(NamedTuple):
    """Row numbers of one batch, or of one process's share of it, and the weight of the share."""

    numbers: Sequence[int]
    weight: float = 1.0


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
        self._held = None if device is None else _Held(reader, device)
        self._means: dict[int, Tensor] | None = None

    def with_mean_maps(self) -> ShardRows:
        """The same rows, each with the mean of its image's maps for a map, [N], every one summing to 1 before."""
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
            self._means[sample] = (maps / total.where(total > 0, 1.0)).mean(dim=0)
        return self._means[sample]


def stack_rows(rows: Sequence[tuple[Sample, int]]) -> dict[str, Tensor]:
    """Stacks (sample as stored, number of its prompt) pairs of one grid."""
    tensors = {
        "states": torch.stack([sample.states for sample, _ in rows]),
        "attention": torch.stack([sample.attention[prompt] for sample, prompt in rows]),
        "question": torch.stack([sample.question[prompt] for sample, prompt in rows]),
    }
    if tensors["states"].dtype == torch.int8:
        tensors["scales"] = torch.stack([sample.scales for sample, _ in rows if sample.scales is not None])
    return tensors


def as_batch(tensors: Mapping[str, Tensor], grid: tuple[int, int], keys: list[str], weight: float) -> Batch:
    """Names what a batch holds; int8 states become float32."""
    states = tensors["states"]
    if "scales" in tensors:
        states = states * tensors["scales"][..., None]  # float32, in one go
    return {
        "states": states,
        "attention": tensors["attention"],
        "question": tensors["question"],
        "grid": grid,
        "key": keys,
        "weight": weight,
    }


class _Held:
    """All samples of a split on one device: for each grid, one tensor of each kind, prompts one after another."""

    def __init__(self, reader: ShardReader, device: torch.device) -> None:
        self._device = device
        samples: dict[tuple[int, int], list[int]] = {}
        for sample, grid in enumerate(reader.grids):
            samples.setdefault(grid, []).append(sample)
        self._tensors: dict[tuple[int, int], dict[str, Tensor]] = {}
        self._place: dict[int, tuple[int, int]] = {}  # sample -> place among its grid's samples, and of its first row
        with tqdm(total=len(reader), desc="load shards", unit="image", delay=2, leave=False) as progress:
            for grid, numbers in samples.items():
                first = reader.stored(numbers[0])
                rows = sum(reader.prompts[number] for number in numbers)
                kinds = {"states": len(numbers), "scales": len(numbers), "attention": rows, "question": rows}
                held = {}
                for name, count in kinds.items():
                    like: Tensor | None = getattr(first, name)
                    if like is not None:
                        shape = like.shape if name in ("states", "scales") else like.shape[1:]
                        held[name] = torch.empty(count, *shape, dtype=like.dtype, device=device)
                row = 0
                for place, number in enumerate(numbers):
                    sample = reader.stored(number)
                    for name, tensor in held.items():
                        if name in ("states", "scales"):
                            tensor[place] = getattr(sample, name)
                        else:
                            tensor[row : row + reader.prompts[number]] = getattr(sample, name)
                    self._place[number] = place, row
                    row += reader.prompts[number]
                    progress.update()
                self._tensors[grid] = held

    def gather(self, grid: tuple[int, int], rows: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        """Copies the rows (sample, prompt) of a grid out, as `stack_rows` would stack them."""
        places = [self._place[sample][0] for sample, _ in rows]
        numbers = [self._place[sample][1] + prompt for sample, prompt in rows]
        both = torch.tensor([places, numbers]).to(self._device, non_blocking=True)
        return {
            name: tensor.index_select(0, both[0 if name in ("states", "scales") else 1])
            for name, tensor in self._tensors[grid].items()
        }


class GridBatches(Sampler[Part]):
    """Batches of row numbers with one grid each.

    Shuffled, every epoch is a new permutation that depends on (seed, epoch) alone: rows are permuted inside their
    grid, then the batches among each other. Lightning calls `set_epoch`, but after it made the first epoch's iterator:
    a fit that goes on has to say where.

    Several processes (ranks) share each shuffled batch: the batches are those of one process, and all ranks have the
    same number of them. In order, each row belongs to one rank, whose batches may be fewer than another's.

    Args:
        grids: patch grid per row.
        batch_size: rows per batch, of all ranks together where it is shuffled; the last one of a grid may be smaller.
        shuffle: permute; otherwise rows come in order, grid after grid.
        seed: of the permutations.
        rank: this process's number.
        ranks: processes.
        start: epoch to begin with, and how many of its batches to leave out: where an interrupted fit goes on.
    """

    def __init__(
        self,
        grids: Sequence[tuple[int, int]],
        batch_size: int,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
        start: tuple[int, int] = (0, 0),
    ) -> None:
        self._groups: dict[tuple[int, int], list[int]] = {}
        for row, grid in enumerate(grids):
            if shuffle or row % ranks == rank:
                self._groups.setdefault(grid, []).append(row)
        self._batch_size = batch_size
        self._shuffle = shuffle
        self._seed = seed
        self._rank, self._ranks = rank, ranks
        self._start = start
        self._epoch = start[0]

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
        skip = self._start[1] if self._epoch == self._start[0] else 0
        return iter([self._share(batch) for batch in batches[skip:]])

    def _share(self, batch: list[int]) -> Part:
        own = batch[self._rank :: self._ranks]
        # a rank with nothing to do takes part in the step all the same, with a row that does not count
        return Part(own or batch[:1], len(own) * self._ranks / len(batch))


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """Random numbers that depend on seed and epoch alone."""
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


class StreamedBatches:
    """Batches of a stream.

    Attributes:
        sampler: what makes the order; Lightning calls its `set_epoch`.
    """

    def __init__(self, rows: StreamedRows) -> None:
        self.sampler = rows

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        for rows in self.sampler:
            yield as_batch(stack_rows(rows), rows[0][0].grid, [sample.key for sample, _ in rows], 1.0)


class ShardDataModule(pl.LightningDataModule):
    """Train, validation and test batches (`Batch`) of a finished harvest.

    Where the shards are kept changes the speed alone: batches are the same, in the same order.

        device    every tensor lives on the accelerator that the fit runs on; outside of a fit, in memory
        memory    every tensor is copied into memory once
        none      each batch is read through memory maps
        stream    the train split is read tar by tar, in an order of its own (data/stream.py); the other splits, which
                  are small, as by auto

    Args:
        directory: folder of the harvest.
        batch_size: rows (maps) per batch.
        num_workers: processes that read shards; of no use, and therefore not started, unless the cache is none.
        seed: of the shuffle.
        cache: device, memory, none, stream, or auto: the first of the first three that the shards fit into.
        memory_limit: bytes of shards that auto may keep in memory; by default a quarter of this machine's.
        stream_from: where the train tars of a stream are, with `{shard}` for a shard's name: a path, an http(s)
            URL, or `pipe:` and a command that writes the tar to its output; None: the directory.
        train_images: images of the train split to take, the first of its seeded order; None: all.
        mean_maps: fit to the mean map of an image's prompts; validation and test keep the map of each prompt.

    Raises:
        UnfinishedHarvestError: the folder has no index.
        ValueError: an unknown cache, a source that is not one, more images than there are, or a choice of images or
            maps for a stream.
    """

    def __init__(
        self,
        directory: str | Path,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        cache: str = "auto",
        memory_limit: int | None = None,
        stream_from: str | None = None,
        train_images: int | None = None,
        mean_maps: bool = False,
    ) -> None:
        super().__init__()
        if cache not in CACHES:
            raise ValueError(f"trainer.cache={cache!r}: use {', '.join(CACHES)}")
        self.directory = Path(directory)
        self.batch_size = batch_size
        self.seed = seed
        self.index = read_index(self.directory)
        self.streams = cache == "stream"
        self.choose(train_images, mean_maps)
        if stream_from is not None and not (self.streams and "{shard}" in stream_from):
            raise ValueError(
                f"trainer.stream_from={stream_from!r}: it needs trainer.cache=stream, and {{shard}} in it"
            )
        self._stream_from = stream_from
        held = [shard for shard in self.index["shards"] if not (self.streams and shard["split"] == "train")]
        self.bytes: int = sum(shard["bytes"] for shard in held)
        self._limit = limit = _quarter_of_memory() if memory_limit is None else memory_limit
        fits = self.bytes <= limit
        self.in_memory = fits if cache in ("auto", "stream") else cache != "none"
        self.num_workers = 0 if self.in_memory and not self.streams else num_workers
        self._cache = cache
        self._rows: dict[tuple[str, torch.device | None], ShardRows] = {}
        self._device: torch.device | None = None  # where the running fit keeps its rows
        self._start = (0, 0)  # epoch and batch where the fit goes on
        way = "kept in memory" if self.in_memory else "read through memory maps"
        size = f"{self.bytes / 1e6:,.1f} MB"
        why = f"{size} are {'within' if fits else 'over'} the limit of {limit / 1e6:,.0f} MB"
        if self.streams:
            _say(f"trainer.cache=stream: the train split is read from {stream_from or self.directory} shard by shard")
        _say(f"{size} in {self.directory}, {way}: {why if cache in ('auto', 'stream') else f'trainer.cache={cache}'}")

    def choose(self, train_images: int | None, mean_maps: bool) -> None:
        """Takes other images or maps to fit to; see the arguments of the same names."""
        images = sum(shard["samples"] for shard in self.index["shards"] if shard["split"] == "train")
        if train_images is not None and not 1 <= train_images <= images:
            raise ValueError(
                f"trainer.train_images={train_images}: {self.directory} has {images} images to fit to; lower it, or "
                "raise harvest.samples"
            )
        if self.streams and (train_images is not None or mean_maps):
            raise ValueError("trainer.cache=stream takes all images and the map of each prompt: choose another cache")
        self.train_images, self.mean_maps = train_images, mean_maps

    @property
    def fingerprint(self) -> str:
        """Checksum of the data, for tracking."""
        return self.index["fingerprint"]

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the batches and their order; caches, workers and processes do not."""
        identity = {"fingerprint": self.fingerprint, "batch_size": self.batch_size, "seed": self.seed}
        chosen = {"stream": self.streams, "train_images": self.train_images, "mean_maps": self.mean_maps}
        return identity | {name: value for name, value in chosen.items() if value}

    @property
    def hidden_size(self) -> int:
        """Width d of the states."""
        return self.rows("validation" if self.streams else "train")[Part([0])]["states"].shape[-1]

    def count(self, split: str) -> int:
        """Rows (maps) of a split."""
        if split == "train" and self.train_images is not None:
            return self.rows(split).of_images(self.train_images)
        return sum(shard["rows"] for shard in self.index["shards"] if shard["split"] == split)

    def state_dict(self) -> dict[str, Any]:
        """The place in the epoch, for a checkpoint of the fit."""
        if self.trainer is None:
            return {"epoch": 0, "batches": 0}
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        over = done >= self.trainer.num_training_batches
        return {"epoch": self.trainer.current_epoch + over, "batches": 0 if over else done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lets the fit begin where the checkpoint was made."""
        self._start = state_dict["epoch"], state_dict["batches"]

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
        if (
            self._cache in ("auto", "stream")
            and self.in_memory
            and processes > 1
            and processes * self.bytes > self._limit
        ):
            self.in_memory = False
            _say(f"{processes} processes would each keep {self.bytes / 1e6:,.1f} MB: read through memory maps instead")
        self._device = self._choose_device() if stage == "fit" else None
        needed = {"fit": SPLITS[self.streams : 2], "validate": SPLITS[1:2], "test": SPLITS[2:]}
        for split in needed.get(stage, ()):
            self.rows(split, self._device)

    def teardown(self, stage: str) -> None:
        """Frees the device."""
        self._rows = {place: rows for place, rows in self._rows.items() if place[1] in (None, torch.device("cpu"))}
        self._device = None
        self._start = (0, 0)

    def _choose_device(self) -> torch.device | None:
        """The accelerator of the fit, if the shards are to be kept there."""
        device: Any = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        if device.type == "cpu":
            if self._cache == "device":
                _say("trainer.cache=device, and the fit runs on the CPU: that is its memory")
            return None
        if self._cache == "device":
            return device
        if self._cache not in ("auto", "stream") or device.type != "cuda":
            return None
        free, _ = torch.cuda.mem_get_info(device)
        fits = self.bytes <= free // 2
        verdict = "kept on" if fits else "not kept on"
        _say(
            f"{self.bytes / 1e6:,.1f} MB {verdict} {device}: {'within' if fits else 'over'} half of {free / 1e6:,.0f} "
            "MB that are free there"
        )
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
        rank, ranks = _rank()
        start = self._start if shuffle else (0, 0)
        if self.streams and split == "train":
            return StreamedBatches(
                StreamedRows(
                    self.directory,
                    self.batch_size,
                    self.seed,
                    source=self._stream_from,
                    num_workers=self.num_workers,
                    rank=rank,
                    ranks=ranks,
                    start=start,
                )
            )
        rows = self.rows(split, self._device)
        grids = rows.grids
        if split == "train" and self.train_images is not None:
            grids = grids[: rows.of_images(self.train_images)]
        if split == "train" and self.mean_maps:
            rows = rows.with_mean_maps()
        return DataLoader(
            rows,
            sampler=GridBatches(grids, self.batch_size, shuffle, self.seed, rank, ranks, start),  # type: ignore[arg-type]
            batch_size=None,  # the sampler already yields batches of rows
            collate_fn=_as_it_is,  # type: ignore[arg-type]
            num_workers=0 if self._device else self.num_workers,
        )


def _rank() -> tuple[int, int]:
    """This process's number among those of the running fit, and theirs; outside of it, the only one."""
    running = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if running else (0, 1)


def _as_it_is(batch: Batch) -> Batch:
    # torch's default conversion (and its pinning) would turn the grid's tuple into a list
    return batch


def _say(message: str) -> None:
    tqdm.write(f"shards: {message}")


def _quarter_of_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
