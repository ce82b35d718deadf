"""How fast a fit's batches are read from shards: each cache, beside plain webdataset streaming.

python -m benchmarks.reading
python -m benchmarks.reading --samples 400 --folder /path/on/the/disk/in/question

Synthetic shards in LLaVA-1.5-7B's size: 576 x 4096 float16, 4.7 MB a sample, 50 a shard. Every way yields the same
batches of stacked tensors; all but webdataset in a shuffled order. Ways take turns; MB/s of wall time, medians over
rounds, after one round to warm the page cache.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.add_argument("--samples", type=int, default=200, help="samples of 4.7 MB (default 200)")
PARSER.add_argument("--batch", type=int, default=8, help="rows per batch (default 8)")
PARSER.add_argument("--rounds", type=int, default=5, help="timed rounds after one to warm up (default 5)")
PARSER.add_argument("--folder", help="where the shards are written (default: the temporary folder)")
if __name__ == "__main__":
    PARSER.parse_args()  # before the imports below, which take seconds

import safetensors.torch
import torch
from torch import Tensor
from webdataset.compat import WebDataset

from benchmarks.rounds import interleaved, wall_clock
from data.datamodule import ShardDataModule
from data.index import write_index
from data.sample import STATES_DTYPES, Sample, quantise, question_dtype
from data.settings import Cache, ReadingSettings, StatesDtype
from data.shards import ShardWriter
from evaluation.tables import table

TOKENS, WIDTH, SHARD = 576, 4096, 50


def write_shards(folder: Path, samples: int, states_dtype: StatesDtype) -> list[str]:
    """Random samples with one map each; returns the tars."""
    dtype = STATES_DTYPES[states_dtype]
    names = [f"train-{number:05d}" for number in range(-(-samples // SHARD))]
    states = torch.randn(TOKENS, WIDTH)
    stored, scales = quantise(states) if dtype == torch.int8 else (states.to(dtype), None)
    for number, name in enumerate(names):
        with ShardWriter(folder, name, "") as writer:
            for image_id in range(number * SHARD, min((number + 1) * SHARD, samples)):
                writer.write(
                    Sample(
                        image_id, "", stored, torch.rand(1, TOKENS), torch.randn(1, WIDTH).to(question_dtype(dtype)),
                        ((24, 24),), [{}], [0.0], scales,
                    )
                )  # fmt: skip
    write_index(folder, {"train": names}, {}, {})
    return [str(folder / f"{name}.tar") for name in names]


def plain_webdataset(tars: list[str], batch: int) -> Iterator[list[Tensor]]:
    """The tars as a stream, decoded and stacked."""
    rows: list[dict[str, Tensor]] = []
    for sample in WebDataset(tars, shardshuffle=False):
        rows.append(safetensors.torch.load(sample["safetensors"]))
        if len(rows) == batch:
            yield [torch.stack([row[name] for row in rows]) for name in ("states", "attention", "question")]
            rows = []


def main() -> None:
    """Prints one table."""
    options = PARSER.parse_args()

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = ways(Path(folder), options.samples, options.batch)
        epochs = {name: partial(consume, batches) for name, batches in found.items()}
        times = interleaved(epochs, wall_clock, options.rounds, warm_up=1)
    megabytes = options.samples * TOKENS * WIDTH * 2 / 1e6
    rates = {name: statistics.median(1e3 * megabytes / taken for taken in values) for name, values in times.items()}
    print(
        f"\n{options.samples} samples, batches of {options.batch}, {options.rounds} rounds; MB of fp16 states a second"
    )
    first = next(iter(rates.values()))
    rows = [[name, f"{rate:,.0f}", f"{rate / first:.2f}"] for name, rate in rates.items()]
    print(table([["way", "MB/s", "x webdataset"], *rows]))


def ways(folder: Path, samples: int, batch: int) -> dict[str, Callable[[], Iterable[object]]]:
    """Writes the shards; returns what reads an epoch of batches, the yardstick first."""
    half, small = folder / "float16", folder / "int8"
    half.mkdir()
    small.mkdir()
    tars = write_shards(half, samples, "float16")
    write_shards(small, samples, "int8")

    def module(directory: Path, cache: Cache) -> Callable[[], Iterable[object]]:
        data = ShardDataModule(directory, ReadingSettings(batch_size=batch, cache=cache))
        return lambda: data.loader("train", shuffle=True)

    return {
        "plain webdataset, streamed": lambda: plain_webdataset(tars, batch),
        "cache=none: memory maps": module(half, "none"),
        "cache=memory": module(half, "memory"),
        "cache=stream": module(half, "stream"),
        "int8, cache=none, to float32": module(small, "none"),
    }


def consume(batches: Callable[[], Iterable[object]]) -> None:
    """Reads every batch."""
    deque(batches(), maxlen=0)


if __name__ == "__main__":
    main()
