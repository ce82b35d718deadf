"""What the plug-in costs inside vLLM: prefill and decode with and without it, on a model large enough to measure.

.venv-vllm/bin/python -m benchmarks.vllm
.venv-vllm/bin/python -m benchmarks.vllm --rounds 100 --seconds 1200 --only prefill
.venv-vllm/bin/python -m benchmarks.vllm --rounds 0              # its share alone, which noise hardly moves

The random LLaVA of 220 M parameters of benchmarks.prefill in float32, 576 visual of about 600 tokens, blocks 0-5 of 16
edited, a predictor that reads the question. Prefill: one request, one new token, an image that was not seen before.
Decode: eight requests without an image, 32 new tokens each.

First the plug-in's share, in one engine in this process: thread time of the editor's calls, of all thread time. Then
two engines in processes of their own, with and without SCR_PREDICTOR, take turns, and the one without also against
itself in the same round: CPU time of the engine's processes, all their threads; the ratio is the median over rounds,
with its 95 % interval and the quartiles of the rounds. Needs the environment of `make test-vllm`.
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
from PIL import Image
from transformers import AutoProcessor

from benchmarks.models import PATCH, SMALL, build_llava, build_predictor, millions
from benchmarks.rounds import Ratio
from scenes import CHECKPOINT
from scr_runtime import SCRConfig, describe_model, save_predictor
from scr_runtime.vllm.editor import Editor

CONFIG = SCRConfig(num_sources=32, edit_layers=(0, 5), attention_layers=(4, 8))  # as in benchmarks.prefill
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}  # fmt: skip

IDLE = 1.3
"""Seconds before each measurement: vLLM's worker spins for a second behind a request, which is no part of the next."""


def write(folder: Path) -> None:
    """The model with its processor, and a predictor for it."""
    processor: Any = AutoProcessor.from_pretrained(CHECKPOINT)
    model = build_llava(replace(SMALL, words=len(processor.tokenizer)))
    model.config.image_token_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    processor.patch_size, sides = PATCH, {"height": SMALL.pixels, "width": SMALL.pixels}
    processor.image_processor.size = {"shortest_edge": SMALL.pixels}
    processor.image_processor.crop_size = sides
    print(f"a LLaVA of {millions(model):.0f} M parameters", flush=True)
    state = {
        name.replace("model.vision_tower.", "model.vision_tower.vision_model.", 1): value
        for name, value in model.state_dict().items()
    }
    model.save_pretrained(folder / "model", state_dict=state)
    processor.save_pretrained(folder / "model")
    predictor = build_predictor(model)
    save_predictor(folder / "predictor", predictor, scr=CONFIG, model=describe_model(model, processor))


class Engine:
    """An engine whose CPU time can be read: in processes of its own, or in this one."""

    def __init__(self, folder: Path, *, edited: bool, here: bool = False) -> None:
        from vllm import LLM

        os.environ["SCR_PREDICTOR"] = str(folder / "predictor") if edited else ""
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(not here))
        mine = psutil.Process()
        before = {child.pid for child in mine.children(recursive=True)}
        self._llm: Any = LLM(
            str(folder / "model"), dtype="float32", enforce_eager=True, block_size=32, max_model_len=1024,
            max_num_batched_tokens=2048, max_num_seqs=8, kv_cache_memory_bytes=2**30, enable_prefix_caching=False,
            enable_chunked_prefill=False, limit_mm_per_prompt={"image": 1},
        )  # fmt: skip
        self._processes = [child for child in mine.children(recursive=True) if child.pid not in before]

    def run(self, prompts: list[Any], tokens: int) -> None:
        """Answers some requests."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=tokens, min_tokens=tokens)
        self._llm.generate(prompts, params, use_tqdm=False)

    def seconds(self, prompts: list[Any], tokens: int) -> float:
        """CPU seconds that the engine's processes take for some requests."""
        time.sleep(IDLE)
        start = self._spent()
        self.run(prompts, tokens)
        return self._spent() - start

    def close(self) -> None:
        """Ends an engine in this process."""
        self._llm.llm_engine.engine_core.shutdown()

    def _spent(self) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in self._processes)


Work = Callable[[int], tuple[list[Any], int]]
"""A number -> prompts, and how many new tokens each gets."""


def image_prompt(seed: int) -> Any:
    """A prompt about an image of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (SMALL.pixels, SMALL.pixels, 3), dtype=np.uint8)
    return {
        "prompt": "USER: <image> Is there a dog in the image? ASSISTANT:",
        "multi_modal_data": {"image": Image.fromarray(pixels)},
    }


TEXTS: list[Any] = [{"prompt": "USER: Is there a dog? ASSISTANT:"}] * 8
WORK: dict[str, tuple[str, Work]] = {
    "prefill": ("one request with an image", lambda number: ([image_prompt(number + 1000)], 1)),
    "decode": ("eight requests without an image, 32 tokens each", lambda number: (TEXTS, 32)),
}


def share(folder: Path, rounds: int = 9) -> None:
    """Prints what the editor's calls take of all thread time of an engine in this process."""
    spent: list[float] = []

    def timed(call: Callable[..., None]) -> Callable[..., None]:
        def timing(*args: Any) -> None:
            start = time.thread_time()
            call(*args)
            spent.append(time.thread_time() - start)

        return timing

    engine = Engine(folder, edited=True, here=True)
    with patch.multiple(Editor, begin=timed(Editor.begin), after_block=timed(Editor.after_block)):
        for kind, (_, make) in WORK.items():
            mine, all_of_it = list[float](), list[float]()
            for number in range(-4, rounds):  # the first four are not counted
                spent.clear()
                start = time.thread_time()
                engine.run(*make(number))
                if number >= 0:
                    all_of_it.append(time.thread_time() - start)
                    mine.append(sum(spent))
            low, high = np.percentile(np.divide(mine, all_of_it) * 100, [25, 75])
            took = f"{np.median(mine) * 1000:.1f} of {np.median(all_of_it) * 1000:.0f} ms of thread time"
            print(f"the edit's share of a {kind}: {took}, {low:.2f} - {high:.2f} % (quartiles)", flush=True)
    engine.close()


def measure(engines: dict[str, Engine], rounds: int, seconds: float, make: Work) -> None:
    """Prints a table: each engine's CPU time and its ratio to the one without the plug-in."""
    spent: dict[str, list[float]] = {name: [] for name in engines}
    end = time.monotonic() + seconds
    for turn in range(-1, rounds):  # the first round is not counted
        names = list(engines)[:: -1 if turn % 2 else 1]
        for place, name in enumerate(names):
            took = engines[name].seconds(*make(turn * len(names) + place))
            if turn >= 0:
                spent[name].append(took)
        if time.monotonic() > end and turn >= 1:
            break
    for name, times in spent.items():
        ratio = Ratio.of(times, spent["without"])
        low, high = median_interval([a / b for a, b in zip(times, spent["without"], strict=True)])
        took = f"{name:16} {np.median(times) * 1000:8.0f} ms   {ratio.median:.3f}   {low:.3f} - {high:.3f}"
        print(f"  {took}   {ratio.quartiles}   {len(times)} rounds", flush=True)


def median_interval(values: list[float]) -> tuple[float, float]:
    """95 % interval of the median, by the ranks between which it lies (normal approximation of the binomial)."""
    ranked, half = sorted(values), 0.98 * len(values) ** 0.5
    last = len(ranked) - 1
    return ranked[max(round(last / 2 - half), 0)], ranked[min(round(last / 2 + half), last)]


def main() -> None:
    """Prints two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds (default 9; 0: its share alone)")
    parser.add_argument("--seconds", type=float, default=200, help="of each table, at most (default 200)")
    parser.add_argument("--only", choices=("prefill", "decode"), help="one of the two tables")
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        share(folder)
        if options.rounds == 0:
            return
        edited = Engine(folder, edited=True)
        plain = Engine(folder, edited=False)
        engines = {"without": plain, "without, again": plain, "with": edited}
        for kind, (words, make) in WORK.items():
            if options.only in (None, kind):
                print(f"{kind}, {words}: CPU time, ratio, its 95 %, quartiles", flush=True)
                measure(engines, options.rounds, options.seconds, make)


if __name__ == "__main__":
    main()
