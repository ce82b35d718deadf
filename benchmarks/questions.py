"""What the second question about an image costs, as a ratio to a vanilla that keeps its image features as well.

python -m benchmarks.questions
python -m benchmarks.questions --repeats 40 --text 60

The model and the prompt are those of benchmarks.prefill: about 220 M parameters, 576 visual tokens of 616. Times are
CPU time of one thread, variants interleaved round by round; the ratio is the median over rounds, with quartiles.
Every time includes the session's own checks of image and prefix.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from benchmarks.prefill import CONFIG, IMAGE_TOKEN, SIDE, build_model
from evaluation.report import table
from scr_runtime import SCR, PredictorConfig, SourcePredictor


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20, help="timed rounds (default 20)")
    parser.add_argument("--text", type=int, default=30, help="text tokens behind the image (default 30)")
    options = parser.parse_args()

    torch.set_num_threads(1)
    model = build_model()
    first, second = (prompt(options.text, offset) for offset in (0, 1))
    second.pop("pixel_values")
    predictor = SourcePredictor(PredictorConfig(1024)).eval().requires_grad_(False)
    runtimes = {
        "vanilla, features kept": SCR(model, mode="off"),
        "vanilla again": SCR(model, mode="off"),
        "one-pass": SCR(model, config=CONFIG, mode="one-pass", predictor=predictor),
        "two-pass": SCR(model, config=CONFIG, mode="two-pass"),
        "auto, all fall back": SCR(model, config=CONFIG, mode="auto", predictor=predictor, threshold=2.0),
    }
    times: dict[str, list[float]] = {}
    kept: dict[str, float] = {}
    with ExitStack() as stack, torch.no_grad():
        calls: dict[str, tuple[SCR, Callable[[], Any]]] = {}
        for name, scr in runtimes.items():
            with scr:
                image = stack.enter_context(scr.image(**first))
                image(**first, logits_to_keep=1)
            kept[name] = image.nbytes / 1e6
            calls[name] = (scr, lambda image=image: image(**second, logits_to_keep=1))
        whole = second | {"pixel_values": first["pixel_values"]}
        for name in ("vanilla, features kept", "two-pass"):
            fresh = "vanilla, no session" if name != "two-pass" else "two-pass, no session"
            calls[fresh] = (runtimes[name], lambda: model(**whole, logits_to_keep=1))
        for turn in range(2 + options.repeats):
            for name, (scr, call) in calls.items():
                with scr:
                    start = time.thread_time_ns()
                    call()
                    elapsed = (time.thread_time_ns() - start) / 1e6
                if turn >= 2:
                    times.setdefault(name, []).append(elapsed)

    print(f"{SIDE * SIDE} visual tokens, {options.text} text tokens behind them; {options.repeats} rounds\n")
    rows = [["second question", "ms of thread time", "ratio", "quartiles", "MB kept"]]
    base = times["vanilla, features kept"]
    for name, mine in times.items():
        ratios = [a / b for a, b in zip(mine, base, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        held = f"{kept[name]:.1f}" if name in kept else "-"
        rows.append([name, f"{statistics.median(mine):.0f}", f"{middle:.3f}", f"{low:.3f} - {high:.3f}", held])
    print(table(rows))


def prompt(text: int, offset: int) -> dict[str, Any]:
    """A question behind ten tokens and one image."""
    ids = [1, *[5] * 9, *[IMAGE_TOKEN] * SIDE * SIDE, *range(10 + offset, 10 + offset + text)]
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "pixel_values": torch.randn(1, 3, 14 * SIDE, 14 * SIDE, generator=generator),
        "use_cache": True,
    }


if __name__ == "__main__":
    main()
