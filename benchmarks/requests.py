"""Does memory stay flat over many requests? One model, one SCR, and `generate` again and again.

python -m benchmarks.requests --requests 10000

Each request is an image with a question and two new tokens, in mode auto with about half of the images falling back;
every 500th loads the predictor again (`scr.load`). The model is a random LLaVA of the real class, its grid 6 x 6.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PARSER = argparse.ArgumentParser("python -m benchmarks.requests", description="Memory over many requests.")
PARSER.add_argument("--requests", type=int, default=10_000)
if __name__ == "__main__":
    PARSER.parse_args()  # before the imports below, which take seconds

import psutil
import torch

from scr_runtime import SCR, SCRConfig, describe_model, save_predictor
from tests.conftest import make_inputs, make_tiny_llava
from tests.scr_runtime.reference import make_predictor

CONFIG = SCRConfig(num_sources=4, edit_layers=(0, 2), attention_layers=(2, 4))
MOST_GROWTH = 16.0  # MB after the first tenth
_KINDS = 32


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the memory at each tenth; returns 1 if it grew by more than `MOST_GROWTH` after the first."""
    options = PARSER.parse_args(argv)
    torch.set_num_threads(1)
    model: Any = make_tiny_llava(0)
    predictor, process = make_predictor(model), psutil.Process()
    asked = [make_inputs(model, [1], seed=seed) for seed in range(_KINDS)]
    sizes: list[float] = []
    with tempfile.TemporaryDirectory() as place:
        folder = save_predictor(Path(place) / "p", predictor, scr=CONFIG, model=describe_model(model))
        start = time.monotonic()
        with SCR(model, predictor=folder, mode="auto", threshold=middle(model, folder, asked)) as scr:
            for number in range(1, options.requests + 1):
                model.generate(**asked[number % _KINDS], max_new_tokens=2, do_sample=False)
                if number % 500 == 0:
                    scr.load(folder)
                if number % max(options.requests // 10, 1) == 0:
                    gc.collect()
                    sizes.append(process.memory_info().rss / 1e6)
                    print(f"{number:7,} requests: {sizes[-1]:7.1f} MB", flush=True)
            print(f"{scr.stats!r}\n{options.requests / (time.monotonic() - start):.0f} requests a second")
    grown = sizes[-1] - sizes[0]
    print(f"grew by {grown:.1f} MB after the first tenth")
    return 1 if grown > MOST_GROWTH else 0


def middle(model: Any, folder: Path, asked: Sequence[dict[str, torch.Tensor]]) -> float:
    """A threshold that about half of the images are under."""
    found: list[float] = []
    with torch.no_grad(), SCR(model, predictor=folder, mode="one-pass") as scr:
        for inputs in asked:
            model(**inputs)
            found.append(scr.reports[0].confidence or 0.0)
    return sorted(found)[len(found) // 2]


if __name__ == "__main__":
    sys.exit(main())
