"""How long an epoch of the fit takes at LLaVA-1.5-7B's size, beside a plain webdataset + DataLoader loop.

python -m benchmarks.train
python -m benchmarks.train --samples 400 --rounds 5 --threads 2 --folder /path/on/the/disk/in/question
python -m benchmarks.train --device cuda --samples 5000        # an epoch from device memory

On the CPU: synthetic shards of 576 x 4096 float16, 4.7 MB an image, 50 a shard. The plain loop decodes the tars in
order to float32, stacks and steps; the others take batches from the data module as a fit does. All of them have the
same predictor, loss, optimiser and batch size; they take turns in one process; medians over rounds, after one to warm
up. Seconds are of wall time; those of the processor are told beside them, for machines that do other things too.

On a GPU: the states lie on the device as the data module's device cache holds them, drawn there at random. Needs
torch, scr_runtime and predictor/losses.py alone, so that it runs where webdataset and Lightning are not installed.

The data module's ways run as in a fit, in memory that malloc keeps; the plain loop in that of any process.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor

from predictor.losses import kl
from scr_runtime import PredictorConfig, SourcePredictor
from scr_runtime.redistribute import eligible_patches

TOKENS, WIDTH, GRID = 576, 4096, (24, 24)
FULL = 5000  # images of the paper's fit
Batch = Mapping[str, Any]
Epoch = Callable[[], Iterable[Batch]]


class Fit:
    """A predictor and its optimiser; `epoch` trains on batches."""

    def __init__(self, device: str, precision: str) -> None:
        torch.manual_seed(0)
        self.network = SourcePredictor(PredictorConfig(WIDTH)).to(device)
        self.optimiser = torch.optim.AdamW(self.network.parameters(), lr=1e-3, fused=device != "cpu")
        self.eligible = eligible_patches(GRID, True, torch.device(device))
        self.device, self.mixed = device, precision == "bf16-mixed"

    def epoch(self, batches: Iterable[Batch]) -> int:
        """Trains on every batch; returns the rows."""
        rows = 0
        for batch in batches:
            with torch.autocast(self.device, torch.bfloat16) if self.mixed else nullcontext():
                scores = self.network(batch["states"], GRID, batch["question"])
                loss = kl(scores, batch["attention"], self.eligible, 32)
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
    from benchmarks.reading import write_shards
    from data.datamodule import ShardDataModule
    from evaluation.report import table
    from predictor.fit import keep_freed_memory

    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        tars = write_shards(folder, options.samples, "float16")

        def loader(cache: str) -> Epoch:
            data = ShardDataModule(folder, batch_size=options.batch, cache=cache)
            return lambda: data.loader("train", shuffle=True)

        first = "plain webdataset loop"
        ways: dict[str, tuple[str, Epoch]] = {first: ("32-true", lambda: plain_loop(tars, options.batch))}
        caches = {"cache=memory": "memory", "cache=none (memory maps)": "none", "cache=stream": "stream"}
        ways |= {way: ("32-true", loader(cache)) for way, cache in caches.items()}
        ways["cache=memory, bf16-mixed"] = ("bf16-mixed", ways["cache=memory"][1])
        ways["cache=none, bf16-mixed"] = ("bf16-mixed", ways["cache=none (memory maps)"][1])
        fits = {way: Fit("cpu", precision) for way, (precision, _) in ways.items()}
        reading = ("batches of cache=memory alone", ways["cache=memory"][1])
        walls: dict[str, list[float]] = {way: [] for way in [*ways, reading[0]]}
        busy: dict[str, list[float]] = {way: [] for way in walls}
        for turn in range(1 + options.rounds):
            for way in walls:
                keep_freed_memory(way != first)
                wall, cpu = time.perf_counter(), time.process_time()
                if way in ways:
                    rows = fits[way].epoch(ways[way][1]())
                else:
                    rows = sum(len(batch["states"]) for batch in reading[1]())
                assert rows == options.samples
                if turn:
                    walls[way].append(time.perf_counter() - wall)
                    busy[way].append(time.process_time() - cpu)
    lines = [["way", "images/s", f"s per {FULL:,} images", "of the processor", "x plain", "x plain (processor)"]]
    for way in walls:
        wall, cpu = statistics.median(walls[way]), statistics.median(busy[way])
        scale = FULL / options.samples
        ratios = [statistics.median(a / b for a, b in zip(t[first], t[way], strict=True)) for t in (walls, busy)]
        lines.append(
            [way, f"{options.samples / wall:,.0f}", f"{wall * scale:.1f}", f"{cpu * scale:.1f}"]
            + [f"{ratio:.2f}" for ratio in ratios]
        )
    print(f"\n{options.samples} images of one map, batches of {options.batch}, {options.rounds} rounds, {_setting()}")
    print(table(lines))


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

    def waited(epoch: Callable[[], Any]) -> float:
        started = time.perf_counter()
        epoch()
        if device != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - started

    print(f"{options.samples} images on {device}, batches of {options.batch}, {options.rounds} rounds, {_setting()}")
    for precision in ("32-true", "bf16-mixed"):
        fit = Fit(device, precision)
        waited(lambda fit=fit: fit.epoch(batches()))
        seconds = statistics.median(waited(lambda fit=fit: fit.epoch(batches())) for _ in range(options.rounds))
        whole = seconds * FULL / options.samples
        print(f"{precision}: {seconds:.3f} s an epoch; by proportion {whole:.3f} s for {FULL:,} images")


def _setting() -> str:
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads"


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=256, help="images of 4.7 MB (default 256)")
    parser.add_argument("--batch", type=int, default=64, help="rows per batch (default 64)")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds after one to warm up (default 3)")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (default 1)")
    parser.add_argument("--folder", help="where the shards are written (default: the temporary folder)")
    parser.add_argument("--device", default="shards", help="cuda, or cpu: an epoch from that memory, without shards")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.device != "shards":
        on_device(options)
        return
    try:
        on_cpu(options)
    except ModuleNotFoundError as error:
        parser.exit(1, f"{error.name} is not installed: the table of shards needs the train extra; --device works\n")


if __name__ == "__main__":
    main()
