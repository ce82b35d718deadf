"""How long an epoch of the fit takes at LLaVA-1.5-7B's size, beside a plain webdataset + DataLoader loop.

python -m benchmarks.train
python -m benchmarks.train --samples 400 --rounds 5 --threads 2 --folder /path/on/the/disk/in/question
python -m benchmarks.train --device cuda --samples 5000        # an epoch from device memory

On the CPU: synthetic shards of 576 x 4096 float16, 4.7 MB an image, 50 a shard. The plain loop decodes the tars in
order to float32, stacks and steps; the others take batches from the data module as a fit does. All of them have the
same predictor, loss, optimiser and batch size; they take turns in one process; medians over rounds, after one to warm
up. Seconds are of wall time; those of the processor stand beside them, for machines that do other things too.

With --device: the states lie on the device as the data module's device cache holds them, drawn there at random. Needs
torch, scr_runtime and predictor/losses.py (hence pydantic) alone: it runs where webdataset and Lightning are not
installed.

The data module's ways run as in a fit, in memory that malloc keeps; the plain loop in that of any process.
"""

from __future__ import annotations

import argparse
import operator
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.add_argument("--samples", type=int, default=256, help="images of 4.7 MB (default 256)")
PARSER.add_argument("--batch", type=int, default=64, help="rows per batch (default 64)")
PARSER.add_argument("--rounds", type=int, default=3, help="timed rounds after one to warm up (default 3)")
PARSER.add_argument("--threads", type=int, default=1, help="torch's threads (default 1)")
PARSER.add_argument("--folder", help="where the shards are written (default: the temporary folder)")
PARSER.add_argument("--device", default="shards", help="cuda, or cpu: an epoch from that memory, without shards")
if __name__ == "__main__":
    PARSER.parse_args()  # before the imports below, which take seconds

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor

from benchmarks.rounds import interleaved, wall_and_process_clock, wall_clock
from predictor.losses import kl
from scr_runtime import PredictorConfig, SCRConfig, SourcePredictor
from scr_runtime.rule import source_rule

TOKENS, WIDTH, GRID = 576, 4096, (24, 24)
FULL = 5000  # images of the paper's fit
Batch = Mapping[str, Any]
Batches = Callable[[], Iterable[Batch]]
PLAIN = "plain webdataset loop"


class Fit:
    """A predictor and its optimiser; `epoch` trains on batches."""

    def __init__(self, device: str, precision: str) -> None:
        torch.manual_seed(0)
        self.network = SourcePredictor(PredictorConfig(WIDTH)).to(device)
        self.optimiser = torch.optim.AdamW(self.network.parameters(), lr=1e-3, fused=device != "cpu")
        self.rule = source_rule(SCRConfig(), GRID, torch.device(device))
        self.device, self.mixed = device, precision == "bf16-mixed"

    def epoch(self, batches: Iterable[Batch]) -> int:
        """Trains on every batch; returns the rows."""
        rows = 0
        for batch in batches:
            with torch.autocast(self.device, torch.bfloat16) if self.mixed else nullcontext():
                scores = self.network(batch["states"], GRID, batch["question"])
                loss = kl(scores, batch["attention"], self.rule)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            self.optimiser.step()
            self.optimiser.zero_grad()
            rows += len(scores)
        return rows


def plain_loop(tars: list[str], batch: int) -> Iterator[Batch]:
    """What one writes first: decode to float32, DataLoader, default collation."""
    import safetensors.torch
    from torch.utils.data import DataLoader
    from webdataset.compat import WebDataset

    def decode(sample: Mapping[str, Any]) -> dict[str, Tensor]:
        tensors = safetensors.torch.load(sample["safetensors"])
        return {
            "states": tensors["states"].float(),
            "attention": tensors["attention"][0],
            "question": tensors["question"][0].float(),
        }

    stream: Any = WebDataset(tars, shardshuffle=False).map(decode)
    return iter(DataLoader(stream, batch_size=batch))


def on_cpu(options: argparse.Namespace) -> None:
    """Prints the table of shards."""
    from evaluation.tables import table
    from predictor.memory import keep_freed_memory

    def timed(way: str, epoch: Callable[[], int]) -> tuple[float, float]:
        def whole() -> None:
            assert epoch() == options.samples

        keep_freed_memory(way != PLAIN)
        return wall_and_process_clock(whole)

    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        epochs = ways(Path(folder), options.samples, options.batch)
        calls = {way: partial(timed, way, epoch) for way, epoch in epochs.items()}
        times: dict[str, list[tuple[float, float]]] = interleaved(calls, operator.call, options.rounds, warm_up=1)
    scale = FULL / options.samples
    header = ["way", "images/s", f"s per {FULL:,} images", "of the processor", "x plain", "x plain (processor)"]
    lines = [header]
    for way, mine in times.items():
        wall, cpu = (statistics.median(values) / 1e3 for values in zip(*mine, strict=True))
        ratios = [(base[0] / own[0], base[1] / own[1]) for base, own in zip(times[PLAIN], mine, strict=True)]
        line = [way, f"{options.samples / wall:,.0f}", f"{wall * scale:.1f}", f"{cpu * scale:.1f}"]
        lines.append(line + [f"{statistics.median(values):.2f}" for values in zip(*ratios, strict=True)])
    print(f"\n{options.samples} images of one map, batches of {options.batch}, {options.rounds} rounds, {_setting()}")
    print(table(lines))


def ways(folder: Path, samples: int, batch: int) -> dict[str, Callable[[], int]]:
    """Writes the shards; returns what runs an epoch and returns its rows, the yardstick first."""
    from benchmarks.reading import write_shards
    from data.datamodule import ShardDataModule
    from data.settings import Cache, ReadingSettings

    tars = write_shards(folder, samples, "float16")

    def loader(cache: Cache) -> Batches:
        data = ShardDataModule(folder, ReadingSettings(batch_size=batch, cache=cache))
        return lambda: data.loader("train", shuffle=True)

    def fitted(precision: str, batches: Batches) -> Callable[[], int]:
        fit = Fit("cpu", precision)
        return lambda: fit.epoch(batches())

    memory, maps = loader("memory"), loader("none")
    return {
        PLAIN: fitted("32-true", lambda: plain_loop(tars, batch)),
        "cache=memory": fitted("32-true", memory),
        "cache=none (memory maps)": fitted("32-true", maps),
        "cache=stream": fitted("32-true", loader("stream")),
        "cache=memory, bf16-mixed": fitted("bf16-mixed", memory),
        "cache=none, bf16-mixed": fitted("bf16-mixed", maps),
        "batches of cache=memory alone": lambda: sum(len(batch["states"]) for batch in memory()),
    }


def on_device(options: argparse.Namespace) -> None:
    """Prints seconds of an epoch from device memory."""
    device = options.device
    states = torch.empty(options.samples, TOKENS, WIDTH, dtype=torch.float16, device=device)
    for part in states.split(50):
        part.normal_()
    attention = torch.rand(options.samples, TOKENS, device=device)
    question = torch.randn(options.samples, WIDTH, device=device).half()

    def batches() -> Iterator[Batch]:
        for rows in torch.randperm(options.samples).split(options.batch):
            places = rows.to(device, non_blocking=True)
            yield {
                name: tensor.index_select(0, places)
                for name, tensor in (("states", states), ("attention", attention), ("question", question))
            }

    def epoch(fit: Fit) -> None:
        fit.epoch(batches())
        if device != "cpu":
            torch.accelerator.synchronize()

    print(f"{options.samples} images on {device}, batches of {options.batch}, {options.rounds} rounds, {_setting()}")
    for precision in ("32-true", "bf16-mixed"):
        once = partial(epoch, Fit(device, precision))
        times = interleaved({precision: once}, wall_clock, options.rounds, warm_up=1)
        seconds = statistics.median(times[precision]) / 1e3
        whole = seconds * FULL / options.samples
        print(f"{precision}: {seconds:.3f} s an epoch; by proportion {whole:.3f} s for {FULL:,} images")


def _setting() -> str:
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads"


def main() -> None:
    """Prints one table."""
    options = PARSER.parse_args()
    torch.set_num_threads(options.threads)
    if options.device != "shards":
        on_device(options)
        return
    try:
        on_cpu(options)
    except ModuleNotFoundError as error:
        PARSER.exit(1, f"{error.name} is not installed: the table of shards needs the train extra; --device works\n")


if __name__ == "__main__":
    main()
