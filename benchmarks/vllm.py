"""What the plug-in costs inside vLLM: prefill and decode with and without it, on a model large enough to measure.

.venv-vllm/bin/python -m benchmarks.vllm
.venv-vllm/bin/python -m benchmarks.vllm --rounds 15 --seconds 250
python -m benchmarks.vllm --rounds 0                  # the edit alone, without vLLM

The random LLaVA of 220 M parameters of benchmarks.prefill in float32, 576 visual of about 600 tokens, blocks 0-5 of 16
edited, a predictor that reads the question. Two engines with and without SCR_PREDICTOR take turns, and each of them
also against itself in the same round. CPU time of the engine's process, all its threads; the ratio is the median over
rounds, with quartiles. Prefill: one request, one new token, an image that was not seen before. Decode: eight requests
without an image, 64 new tokens each. Needs the environment of `make test-vllm`.
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

import numpy as np
import psutil
import torch
from PIL import Image
from transformers import AutoProcessor

from benchmarks.models import PATCH, SMALL, build_llava, build_predictor, millions
from benchmarks.rounds import Ratio
from scenes import CHECKPOINT
from scr_runtime import SCRConfig, describe_model, save_predictor
from scr_runtime.families import FAMILIES
from scr_runtime.grids import ImageGrid
from scr_runtime.vllm.editor import Editor
from scr_runtime.vllm.images import Feature, Part, images_of
from scr_runtime.vllm.settings import ServeSettings

CONFIG = SCRConfig(num_sources=32, edit_layers=(0, 5), attention_layers=(4, 8))  # as in benchmarks.prefill
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
}  # fmt: skip


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
    """An engine in a process of its own, whose CPU time can be read."""

    def __init__(self, folder: Path, *, edited: bool) -> None:
        from vllm import LLM

        os.environ["SCR_PREDICTOR"] = str(folder / "predictor") if edited else ""
        mine = psutil.Process()
        before = {child.pid for child in mine.children(recursive=True)}
        self._llm: Any = LLM(
            str(folder / "model"), dtype="float32", enforce_eager=True, block_size=32, max_model_len=1024,
            max_num_batched_tokens=2048, max_num_seqs=8, kv_cache_memory_bytes=2**30, enable_prefix_caching=False,
            enable_chunked_prefill=False, limit_mm_per_prompt={"image": 1},
        )  # fmt: skip
        self._processes = [child for child in mine.children(recursive=True) if child.pid not in before]

    def seconds(self, prompts: list[Any], tokens: int) -> float:
        """CPU seconds that the engine's processes take for some requests."""
        from vllm import SamplingParams

        start = self._spent()
        params = SamplingParams(temperature=0, max_tokens=tokens, min_tokens=tokens)
        self._llm.generate(prompts, params, use_tqdm=False)
        return self._spent() - start

    def _spent(self) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in self._processes)


def image_prompt(seed: int) -> Any:
    """A prompt about an image of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (SMALL.pixels, SMALL.pixels, 3), dtype=np.uint8)
    return {
        "prompt": "USER: <image> Is there a dog in the image? ASSISTANT:",
        "multi_modal_data": {"image": Image.fromarray(pixels)},
    }


def edit_alone(rounds: int = 9) -> None:
    """Prints what the editor takes for a step with one image, in thread time: no engine, states of noise."""
    torch.set_num_threads(1)
    predictor = build_predictor(build_llava(replace(SMALL, layers=1)))
    editor = Editor(predictor, CONFIG, ServeSettings("here"), FAMILIES["llava"])
    grid, rows = ImageGrid((SMALL.side, SMALL.side)), SMALL.side**2 + 40
    part = Part(0, 0, rows, rows, [Feature(10, grid.tokens, {})])
    hidden, residual = torch.randn(2, rows, SMALL.hidden)
    spent: list[float] = []
    for _ in range(rounds):
        start = time.thread_time()
        editor.begin(images_of([part], lambda data: [grid], reads_question=True))
        for layer in editor.layers:
            editor.after_block(layer, hidden, residual)
        spent.append(time.thread_time() - start)
    print(f"the edit alone: {np.median(spent) * 1000:.0f} ms of thread time for an image", flush=True)


def measure(
    engines: dict[str, Engine], rounds: int, seconds: float, make: Callable[[int], tuple[list[Any], int]]
) -> None:
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
        took = f"{np.median(times) * 1000:8.0f} ms"
        print(f"  {name:16} {took}   {ratio.median:.3f}   {ratio.quartiles}   {len(times)} rounds", flush=True)


def main() -> None:
    """Prints two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds (default 9; 0: the edit alone)")
    parser.add_argument("--seconds", type=float, default=200, help="of each table, at most (default 200)")
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    edit_alone()
    if options.rounds == 0:
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        edited = Engine(folder, edited=True)
        plain = Engine(folder, edited=False)
        engines = {"without": plain, "without, again": plain, "with": edited}
        print("prefill, one request with an image: CPU time, ratio, quartiles", flush=True)
        measure(engines, options.rounds, options.seconds, lambda seed: ([image_prompt(seed + 1000)], 1))
        print("decode, eight requests without an image, 64 tokens each", flush=True)
        texts = [{"prompt": "USER: Is there a dog? ASSISTANT:"}] * 8
        measure(engines, options.rounds, options.seconds, lambda seed: (texts, 64))


if __name__ == "__main__":
    main()
