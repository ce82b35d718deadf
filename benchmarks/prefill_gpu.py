"""What a prefill and a decode step cost on a GPU, at the real shapes of LLaVA-1.5 and Qwen2-VL with random weights.

python -m benchmarks.prefill_gpu                              # all shapes that fit the device
python -m benchmarks.prefill_gpu --model llava-1.5-7b --repeats 50 --json costs.json
python -m benchmarks.prefill_gpu --device cpu --tiny          # a smoke test anywhere

Needs torch, transformers (5.16 or newer), scr_runtime and benchmarks/, and none of the packages of the training: it
runs on a machine with a GPU and little else. Weights are random: time does not depend on them, and the predictor's
confidence is set by thresholds. Times are CUDA events around the call, the host's part included where the device waits
for it; modes are interleaved round by round, ratios are medians over rounds with quartiles. "auto, 30 %" is one image
per prefill, of which 3 in 10 fall back. Kernels are those that torch's profiler saw on the device. Peak memory is over
what lay there before the call.
"""

from __future__ import annotations

import argparse
import json
import operator
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import cycle
from pathlib import Path
from typing import Any

MODELS = ("llava-1.5-7b", "llava-1.5-13b", "qwen2-vl-7b")
PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.add_argument("--model", choices=MODELS, action="append", help="shape (default: all)")
PARSER.add_argument("--device", default="cuda", help="cuda, cuda:1, cpu (default cuda)")
PARSER.add_argument("--repeats", type=int, default=30, help="timed rounds (default 30; a multiple of 10)")
PARSER.add_argument("--tiny", action="store_true", help="a tiny LLaVA in float32 instead of the real shapes")
PARSER.add_argument("--json", type=Path, help="also write every number there")
if __name__ == "__main__":
    PARSER.parse_args()  # before the imports below, which take seconds

import torch
import transformers

from benchmarks.models import Shape, build_llava, build_predictor, build_qwen, llava_inputs, qwen_inputs
from benchmarks.rounds import Ratio, device_clock, interleaved, wall_clock
from evaluation.tables import table
from scr_runtime import SCR, SCRConfig, errors

TEXT = (10, 54)  # tokens before and behind the image: 640 in all with 576 visual
_TOWER = (1024, 4096, 24, 16)
LLAVA = {
    "llava-1.5-7b": Shape(4096, 11_008, 32, 32, _TOWER, words=32_064),
    "llava-1.5-13b": Shape(5120, 13_824, 40, 40, _TOWER, words=32_064),
    "tiny": Shape(64, 128, 6, 4, (32, 64, 2, 2), side=6, words=32_064),
}
SETTINGS = {  # the layers of arXiv 2602.22469
    "llava-1.5-7b": SCRConfig(edit_layers=(0, 11), attention_layers=(8, 16)),
    "llava-1.5-13b": SCRConfig(edit_layers=(0, 11), attention_layers=(8, 16)),
    "qwen2-vl-7b": SCRConfig(edit_layers=(0, 15), attention_layers=(8, 16)),
    "tiny": SCRConfig(num_sources=8, edit_layers=(0, 1), attention_layers=(1, 2)),
}
Attached = AbstractContextManager[Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Measures the chosen shapes, one table each; returns the exit code."""
    options = PARSER.parse_args(argv)
    cuda = options.device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        print("no CUDA device; --device cpu --tiny is a smoke test", file=sys.stderr)
        return 1
    if cuda:
        torch.cuda.set_device(options.device)
    where = torch.cuda.get_device_name(options.device) if cuda else "CPU"
    print(f"{where}; torch {torch.__version__}, transformers {transformers.__version__}, {options.repeats} rounds")
    results: list[dict[str, Any]] = []
    for name in ["tiny"] if options.tiny else options.model or MODELS:
        print(f"\n{name}")
        try:
            rows = measure(name, options.device, options.repeats)
        except (errors.UnsupportedModelError, torch.OutOfMemoryError) as error:
            print(f"skipped: {str(error).splitlines()[0]}")
        else:
            print(as_table(rows))
            results += rows
        if cuda:
            torch.cuda.empty_cache()
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


@torch.no_grad()
def measure(name: str, device: str, rounds: int) -> list[dict[str, Any]]:
    """One row per mode: prefill, decode step, kernels, memory.

    Raises:
        UnsupportedModelError: SCR can't run this shape with this release of transformers.
        torch.OutOfMemoryError: It doesn't fit.
    """
    model, inputs = build(name, device)
    clock = device_clock if device.startswith("cuda") else wall_clock
    token = torch.full((1, 1), 7, device=device)

    def prefill() -> Any:
        return model(**inputs, logits_to_keep=1)

    def decode_step() -> Callable[[], Any]:
        past = prefill().past_key_values
        return lambda: model(input_ids=token, past_key_values=past, use_cache=True)

    def timed(attached: Iterator[Attached]) -> Callable[[], tuple[float, float]]:
        def once() -> tuple[float, float]:
            with next(attached):
                elapsed = clock(prefill)
                step = decode_step()
                step()
                return elapsed, clock(step)

        return once

    attached = modes(model, SETTINGS[name])
    calls = {mode: timed(cycle(turns)) for mode, turns in attached.items()}
    times: dict[str, list[tuple[float, float]]] = interleaved(calls, operator.call, rounds)
    base = [list(clocked) for clocked in zip(*times["vanilla"], strict=True)]
    rows: list[dict[str, Any]] = []
    for mode, turns in attached.items():
        mine = [list(clocked) for clocked in zip(*times[mode], strict=True)]
        with turns[0]:
            row = {"model": name, "mode": mode, **_summary("prefill", mine[0], base[0])}
            row |= _summary("decode", mine[1], base[1])
            row |= {"prefill_kernels": kernels(prefill, device), "decode_kernels": kernels(decode_step(), device)}
            rows.append(row | {"prefill_peak_mb": peak_memory(prefill, device)})
    return rows


def build(name: str, device: str) -> tuple[Any, dict[str, Any]]:
    """A model of a named shape, and the inputs of one image."""
    dtype = torch.float32 if name == "tiny" else torch.bfloat16
    if name in LLAVA:
        shape = LLAVA[name]
        return build_llava(shape, device, dtype), llava_inputs(shape, text=TEXT, device=device, dtype=dtype)
    model = build_qwen(device, dtype)
    return model, qwen_inputs(model, text=TEXT, device=device, dtype=dtype)


def modes(model: Any, config: SCRConfig) -> dict[str, list[Attached]]:
    """Mode -> what is attached to the model, in turn."""
    predictor = build_predictor(model)
    keep = SCR(model, config=config, mode="auto", predictor=predictor, threshold=0.0)
    fall = SCR(model, config=config, mode="auto", predictor=predictor, threshold=2.0)
    behind = config.behind_map(model.config.get_text_config().num_hidden_layers)
    return {
        "vanilla": [nullcontext()],
        "vanilla again": [nullcontext()],
        "two-pass": [SCR(model, config=config, mode="two-pass")],
        "one-pass": [SCR(model, config=config, mode="one-pass", predictor=predictor)],
        "online": [SCR(model, config=behind, mode="online")],
        "auto, 0 % fall back": [keep],
        "auto, 30 %": [fall, keep, keep, fall, keep, keep, fall, keep, keep, keep],
        "auto, 100 %": [fall],
    }


def peak_memory(call: Callable[[], object], device: str) -> float | None:
    """Peak megabytes over what is allocated now; ``None`` without a GPU."""
    if not device.startswith("cuda"):
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def kernels(call: Callable[[], object], device: str) -> int | None:
    """Kernels and copies that the profiler saw on the device; ``None`` without a GPU."""
    if not device.startswith("cuda"):
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type.name == "CUDA" for event in profiler.events() or [])


def _summary(what: str, mine: list[float], base: list[float]) -> dict[str, float]:
    """Medians; means where a mode alternates, so that its rare expensive prefills count."""
    ratio = Ratio.of(mine, base)
    return {
        f"{what}_ms": statistics.median(mine),
        f"{what}_mean_ms": statistics.fmean(mine),
        f"{what}_added_ms": statistics.median(a - b for a, b in zip(mine, base, strict=True)),
        f"{what}_ratio": ratio.median,
        f"{what}_mean_ratio": statistics.fmean(mine) / statistics.fmean(base),
        f"{what}_ratio_low": ratio.low,
        f"{what}_ratio_high": ratio.high,
    }


def as_table(rows: list[dict[str, Any]]) -> str:
    """What matters most of each mode; "more" is over vanilla, the first row."""
    header = ["mode", "ms", "added", "ratio", "quartiles", "mean", "kernels", "more", "peak MB", "decode ms", "more"]

    def count(value: float | None, less: float = 0) -> str:
        return "-" if value is None else f"{value - less:,.0f}"

    lines = [header]
    for row in rows:
        line = [row["mode"], f"{row['prefill_ms']:.2f}", f"{row['prefill_added_ms']:+.2f}"]
        line += [f"{row['prefill_ratio']:.3f}", f"{row['prefill_ratio_low']:.3f}-{row['prefill_ratio_high']:.3f}"]
        line += [f"{row['prefill_mean_ratio']:.3f}", count(row["prefill_kernels"])]
        line += [count(row["prefill_kernels"], rows[0]["prefill_kernels"] or 0), count(row["prefill_peak_mb"])]
        line += [f"{row['decode_ms']:.3f}", count(row["decode_kernels"], rows[0]["decode_kernels"] or 0)]
        lines.append(line)
    return table(lines)


if __name__ == "__main__":
    sys.exit(main())
