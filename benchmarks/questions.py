"""What the second question about an image costs, as a ratio to a vanilla that keeps its image features as well.

python -m benchmarks.questions
python -m benchmarks.questions --repeats 40 --text 60

The model and the prompt are those of benchmarks.prefill: about 220 M parameters, 576 visual tokens of 616. Times are
CPU time of one thread, variants interleaved round by round; the ratio is the median over rounds, with quartiles.
Every time includes the session's own checks of image and prefix.
"""

from __future__ import annotations

import argparse
import operator
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.add_argument("--repeats", type=int, default=20, help="timed rounds (default 20)")
PARSER.add_argument("--text", type=int, default=30, help="text tokens behind the image (default 30)")
if __name__ == "__main__":
    PARSER.parse_args()  # before the imports below, which take seconds

import torch

from benchmarks.models import SMALL, build_llava, build_predictor, llava_inputs
from benchmarks.prefill import CONFIG
from benchmarks.rounds import Ratio, interleaved, thread_clock
from evaluation.tables import table
from scr_runtime import SCR

FIRST = "vanilla, features kept"


def main() -> None:
    """Prints one table."""
    options = PARSER.parse_args()
    torch.set_num_threads(1)
    times, kept = measure(options.text, options.repeats)
    print(f"{SMALL.side**2} visual tokens, {options.text} text tokens behind them; {options.repeats} rounds\n")
    rows = [["second question", "ms of thread time", "ratio", "quartiles", "MB kept"]]
    for name, mine in times.items():
        ratio = Ratio.of(mine, times[FIRST])
        held = f"{kept[name]:.1f}" if name in kept else "-"
        rows.append([name, f"{statistics.median(mine):.0f}", f"{ratio.median:.3f}", ratio.quartiles, held])
    print(table(rows))


@torch.no_grad()
def measure(text: int, rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Times the second question under each mode, after the first one about the same image.

    Returns:
        Milliseconds of every round; megabytes that each session keeps of the first question.
    """
    model = build_llava()
    predictor = build_predictor(model)
    runtimes = {
        FIRST: SCR(model, mode="off"),
        "vanilla again": SCR(model, mode="off"),
        "one-pass": SCR(model, config=CONFIG, mode="one-pass", predictor=predictor),
        "two-pass": SCR(model, config=CONFIG, mode="two-pass"),
        "auto, all fall back": SCR(model, config=CONFIG, mode="auto", predictor=predictor, threshold=2.0),
    }
    first, whole = (llava_inputs(text=(10, text), first_word=10 + number) for number in range(2))
    second = {name: value for name, value in whole.items() if name != "pixel_values"}

    def timed(scr: SCR, call: Callable[[], Any]) -> Callable[[], float]:
        def once() -> float:
            with scr:
                return thread_clock(call)

        return once

    calls: dict[str, Callable[[], float]] = {}
    kept: dict[str, float] = {}
    with ExitStack() as sessions:
        for name, scr in runtimes.items():
            with scr:
                image = sessions.enter_context(scr.image(**first))
                image(**first, logits_to_keep=1)
            kept[name] = image.nbytes / 1e6
            calls[name] = timed(scr, lambda image=image: image(**second, logits_to_keep=1))
        for name, alone in ((FIRST, "vanilla, no session"), ("two-pass", "two-pass, no session")):
            calls[alone] = timed(runtimes[name], lambda: model(**whole, logits_to_keep=1))
        return interleaved(calls, operator.call, rounds), kept


if __name__ == "__main__":
    main()
