"""Tries to break what docs/reliability.md promises, at random, for as long as it is given.

python -m benchmarks.stress --minutes 10 --seed 0
python -m benchmarks.stress --minutes 10 --only calls
python -m benchmarks.stress --minutes 10 --only grids [--plain]   memory over prefills, with and without SCR

Three parts take turns:

    calls   threads call one model with an SCR: images, text, `generate`, beams, sessions; some of them are hit by an
            exception at any bytecode; the SCR is detached and attached in between
    files   a byte of a predictor folder or of a harvest is changed, cut off or added, and the folder is read
    grids   prefills of images whose grid changes all the time; the memory of the process is watched

It counts each answer as right, as refused (an error that the documentation names, or the exception that was thrown
in), as wrong, or as something left over: a hook, an attribute, a registry entry, memory. The last two have to be zero;
the exit code says so. `python -m benchmarks.kills` is about commands that are killed.
"""

from __future__ import annotations

import argparse
import ctypes
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PARSER = argparse.ArgumentParser("python -m benchmarks.stress", description="Tries to break the runtime's promises.")
PARSER.add_argument("--minutes", type=float, default=5.0, help="how long (default: 5)")
PARSER.add_argument("--seed", type=int, default=0, help="of everything that is random (default: 0)")
PARSER.add_argument("--only", choices=("calls", "files", "grids"), help="one part alone")
PARSER.add_argument("--plain", action="store_true", help="grids without SCR, for their memory")
if __name__ == "__main__":
    PARSER.parse_args()  # before the imports below, which take seconds

import psutil
import torch
from tqdm import tqdm

from data.errors import DataError
from data.harvest import harvest
from data.harvester import prepare
from data.shards import ShardReader
from evaluation.tables import table
from scr_runtime import SCR, describe_model, load_predictor, save_predictor
from scr_runtime.errors import PredictorError, SCRError
from tests.data import tiny
from tests.scr_runtime.calls import CONFIG, Calls, same
from tests.scr_runtime.leftovers import ENDS, snapshot
from tests.scr_runtime.reference import make_predictor
from tests.scr_runtime.tiny_families import TINY

COUNTS = ("right", "refused", "wrong", "left over")
MOST_GROWTH = 64.0  # MB that the process may grow by while grids change, after it has warmed up


class Tally:
    """Counts of one part, and what was wrong."""

    def __init__(self, part: str) -> None:
        self.part = part
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, kind: str, text: str = "") -> None:
        """Counts one outcome; a wrong one is printed."""
        with self._lock:
            self.counts[kind] += 1
        if kind in ("wrong", "left over"):
            tqdm.write(f"{self.part}: {kind}: {text}", file=sys.stderr)


# -- calls -----------------------------------------------------------------------------------------------------------


class CallsPart:
    """Overlapping calls on one model, some of which are interrupted."""

    def __init__(self, rng: random.Random) -> None:
        self.tally = Tally("calls")
        self._rng = rng
        self._calls = Calls()
        self._calls.scr.detach()
        self._vanilla = self._logits()
        self._calls.scr.attach()

    def round(self) -> None:
        """Two to four threads make one to three calls each; then the model is looked at."""
        names = list(self._calls.calls)
        plans = [self._rng.choices(names, k=self._rng.randint(1, 3)) for _ in range(self._rng.randint(2, 4))]
        threads = [threading.Thread(target=self._run, args=(plan,)) for plan in plans]
        for thread in threads:
            thread.start()
        hits = {}
        for thread in threads:
            if self._rng.random() < 0.4:
                time.sleep(self._rng.random() * 0.1)
                hits[thread] = self._rng.choice(ENDS)
                throw_into(thread, hits[thread])
        for thread in threads:
            thread.join(120)
            if thread.is_alive():
                self.tally.add("left over", "a thread that does not end")
        blocks = self._calls.model.model.language_model.layers
        if any(block._forward_hooks or block._forward_pre_hooks for block in blocks):
            self.tally.add("left over", "a hook on a block")
        if self._rng.random() < 0.2:
            self._detach_and_attach()

    def close(self) -> None:
        """Detaches, and compares the model with what it was."""
        self._detach_and_attach()
        self._calls.close()

    def _run(self, names: Sequence[str]) -> None:
        try:
            for name in names:
                try:
                    with torch.no_grad():
                        answer = self._calls.calls[name]()
                except SCRError as error:
                    self.tally.add("refused" if error.__cause__ is None else "wrong", f"{name}: {error!r}")
                    continue
                right = same(answer, self._calls.alone[name])
                self.tally.add("right" if right else "wrong", f"{name}: another answer than alone")
        except tuple(ENDS):
            self.tally.add("refused")  # what was thrown in has arrived
        except BaseException as error:
            self.tally.add("wrong", f"{names}: {error!r}")

    def _detach_and_attach(self) -> None:
        scr = self._calls.scr
        scr.detach()
        if snapshot(self._calls.model) != self._calls.before:
            self.tally.add("left over", "the model is not what it was before it was attached")
        answers = self._logits()
        if not all(torch.equal(one, other) for one, other in zip(answers, self._vanilla, strict=True)):
            self.tally.add("left over", "the logits are not those of the model alone")
        scr.attach()

    def _logits(self) -> list[torch.Tensor]:
        with torch.no_grad():
            return [self._calls.model(**prompt).logits for prompt in self._calls.prompts]


def throw_into(thread: threading.Thread, error: type[BaseException]) -> None:
    """Raises an exception in another thread, before its next bytecode; nothing happens in a thread that is over."""
    if thread.ident is not None and thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(error))


# -- files -----------------------------------------------------------------------------------------------------------


class FilesPart:
    """Folders one byte of which is another."""

    def __init__(self, rng: random.Random, folder: Path) -> None:
        self.tally = Tally("files")
        self._rng = rng
        self._predictor, self._harvest = folder / "predictor", folder / "harvest"
        self._scratch = folder / "scratch"
        calls = Calls()
        calls.close()
        predictor = make_predictor(calls.model)
        save_predictor(self._predictor, predictor, scr=CONFIG, model=describe_model(calls.model))
        self._state = load_predictor(self._predictor).state_dict()
        model, processor = tiny.build_llava()
        images = tiny.write_coco(folder / "coco", 24)
        harvest(*prepare(
            self._harvest, model=model, processor=processor, scr=tiny.CONFIG, images=images,
            settings=tiny.changed(samples=8, validation=2, test=2, shard_size=4), capture=tiny.fake_capture,
        ))  # fmt: skip
        self._samples = samples_of(self._harvest)

    def round(self) -> None:
        """Damages one file of a copy, and reads the folder."""
        source = self._rng.choice([self._predictor, self._harvest])
        shutil.rmtree(self._scratch, ignore_errors=True)
        shutil.copytree(source, self._scratch)
        file = self._rng.choice(sorted(path for path in self._scratch.iterdir() if path.is_file()))
        what = damage(file, self._rng)
        read: Callable[[], bool] = self._predictor_is_same if source == self._predictor else self._samples_are_same
        try:
            self.tally.add("right" if read() else "wrong", f"{what}: something else was read")
        except (PredictorError, DataError):
            self.tally.add("refused")
        except Exception as error:
            self.tally.add("wrong", f"{what}: {error!r}")

    def close(self) -> None:
        """Nothing to do."""

    def _predictor_is_same(self) -> bool:
        found = load_predictor(self._scratch).state_dict()
        return found.keys() == self._state.keys() and all(torch.equal(found[key], self._state[key]) for key in found)

    def _samples_are_same(self) -> bool:
        return samples_of(self._scratch) == self._samples


def damage(file: Path, rng: random.Random) -> str:
    """Flips a bit, cuts the end off, adds a byte, or empties a file; says what was done."""
    content = bytearray(file.read_bytes())
    kind = rng.choice(["flip"] * 6 + ["cut", "longer", "empty"])
    place = rng.randrange(len(content))
    if kind == "flip":
        content[place] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del content[place:]
    elif kind == "longer":
        content.append(rng.randrange(256))
    else:
        content.clear()
    file.write_bytes(content)
    return f"{file.name}, {kind} at {place}"


def samples_of(folder: Path) -> list[Any]:
    """All samples of a harvest, as plain values."""
    found = []
    for split in ("train", "validation", "test"):
        for sample in ShardReader(folder, split):
            maps = [map_.tolist() for map_ in sample.attention]
            found.append((sample.file, sample.grids, list(sample.prompts), sample.states.tolist(), maps))
    return found


# -- grids -----------------------------------------------------------------------------------------------------------


class GridsPart:
    """Prefills whose grid changes from one to the next."""

    def __init__(self, rng: random.Random, *, plain: bool = False) -> None:
        self.tally = Tally("grids")
        self._rng, self._plain = rng, plain
        self._model = TINY["qwen2-vl"].model()
        self._process = psutil.Process()
        self._done, self._memory = 0, dict[int, float]()

    def round(self) -> None:
        """Twenty prefills of random grids."""
        scr = SCR(self._model, config=CONFIG, mode="off" if self._plain else "two-pass")
        with torch.no_grad(), scr:
            for _ in range(20):
                grid = (self._rng.randint(3, 40), self._rng.randint(3, 40))
                self._model(**self._prompt(*grid))
                found = [report.grid for report in scr.reports]
                right = found == [grid] * (not self._plain)
                self.tally.add("right" if right else "wrong", f"{grid}: reported as {found}")
                self._done += 1
        if self._done % 500 == 0:
            ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps is no growth
            self._memory[self._done] = self._process.memory_info().rss / 1e6

    def _prompt(self, rows: int, columns: int) -> dict[str, torch.Tensor]:
        config = self._model.config
        tokens = [
            1,
            config.vision_start_token_id,
            *[config.image_token_id] * (rows * columns),
            config.vision_end_token_id,
        ]
        ids = torch.tensor([[*tokens, 5, 6, 7]])
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == config.image_token_id).long(),
            "pixel_values": torch.randn(4 * rows * columns, 3 * 2 * 4 * 4),
            "image_grid_thw": torch.tensor([[1, 2 * rows, 2 * columns]]),
        }

    def close(self) -> None:
        """Compares the memory with what it was after 500 prefills."""
        if not self._memory:
            return
        grown = max(self._memory.values()) - self._memory[500]
        curve = ", ".join(f"{count:,}: {size:.0f}" for count, size in self._memory.items())
        print(f"grids: MB after so many prefills: {curve}; grew by {grown:.0f} after the first 500")
        if grown > MOST_GROWTH:
            self.tally.add("left over", f"{grown:.0f} MB")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the parts in turn until the time is over; returns 1 if anything was wrong or left over."""
    options = PARSER.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        makers: dict[str, Callable[[random.Random], Any]] = {
            "calls": CallsPart, "files": lambda rng: FilesPart(rng, Path(folder)),
            "grids": lambda rng: GridsPart(rng, plain=options.plain),
        }  # fmt: skip
        chosen = [options.only] if options.only else list(makers)
        parts = [makers[name](random.Random(options.seed)) for name in chosen]
        end = time.monotonic() + 60 * options.minutes
        with tqdm(desc="stress", unit="round") as progress:
            while time.monotonic() < end:
                for part in parts:
                    part.round()
                    progress.update()
        for part in parts:
            part.close()
    tallies = [part.tally for part in parts]
    rows = [[tally.part, *(f"{tally.counts[kind]:,}" for kind in COUNTS)] for tally in tallies]
    print(table([["part", *COUNTS], *rows]))
    broken = sum(tally.counts[kind] for tally in tallies for kind in ("wrong", "left over"))
    print(f"{broken} wrong or left over" if broken else "nothing wrong, nothing left over")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
