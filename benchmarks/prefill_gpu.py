"""What a prefill and a decode step cost on a GPU, at the real shapes of LLaVA-1.5 and Qwen2-VL with random weights.

python -m benchmarks.prefill_gpu                              # all shapes that fit the device
python -m benchmarks.prefill_gpu --model llava-1.5-7b --repeats 50 --json costs.json
python -m benchmarks.prefill_gpu --device cpu --tiny          # a smoke test anywhere

Needs torch, transformers (5.16 or newer) and scr_runtime, and no other part of the project, so that the file can be
carried to a machine with a GPU. Weights are random: time does not depend on them, and the predictor's confidence is
set by thresholds. Times are CUDA events around the call, the host's part included where the device waits for it;
modes are interleaved round by round, ratios are medians over rounds with quartiles. "auto, 30 %" is one image per
prefill, of which 3 in 10 fall back. Kernels are those that torch's profiler saw on the device. Peak memory is over
what lay there before the call.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from scr_runtime import SCR, PredictorConfig, SCRConfig, SourcePredictor, errors

IMAGE_TOKEN = 31_990
TEXT = (10, 54)  # tokens before and after the image: 640 in all with 576 visual
LLAVA = {
    "llava-1.5-7b": {"hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "heads": 32},
    "llava-1.5-13b": {"hidden_size": 5120, "intermediate_size": 13_824, "num_hidden_layers": 40, "heads": 40},
}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "heads": 4}
MODELS = (*LLAVA, "qwen2-vl-7b")
SETTINGS = {  # the layers of arXiv 2602.22469
    "llava-1.5-7b": SCRConfig(edit_layers=(0, 11), attention_layers=(8, 16)),
    "llava-1.5-13b": SCRConfig(edit_layers=(0, 11), attention_layers=(8, 16)),
    "qwen2-vl-7b": SCRConfig(edit_layers=(0, 15), attention_layers=(8, 16)),
    "tiny": SCRConfig(edit_layers=(0, 1), attention_layers=(1, 2)),
}


class Skipped(Exception):  # noqa: N818 - says that a shape is left out, which is no error
    """A shape that this installation or device can't run."""


def build_llava(shape: dict[str, int], side: int, device: str, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """A random LLaVA and one image's inputs."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tiny = side < 24
    vision: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    if tiny:
        vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    settings: dict[str, Any] = {"image_token_id": IMAGE_TOKEN, "attn_implementation": "sdpa"}
    config = LlavaConfig(
        **settings,
        vision_config=CLIPVisionConfig(
            **vision, num_attention_heads=2 if tiny else 16, image_size=14 * side, patch_size=14
        ),
        text_config=LlamaConfig(
            vocab_size=32_064,
            hidden_size=shape["hidden_size"],
            intermediate_size=shape["intermediate_size"],
            num_hidden_layers=shape["num_hidden_layers"],
            num_attention_heads=shape["heads"],
            num_key_value_heads=shape["heads"],
            max_position_embeddings=4096,
        ),
        image_seq_length=side * side,
    )
    model = _on_device(lambda: LlavaForConditionalGeneration(config), device, dtype)
    return model, _inputs(device, side * side, IMAGE_TOKEN) | {
        "pixel_values": torch.randn(1, 3, 14 * side, 14 * side, device=device, dtype=dtype)
    }


def build_qwen(device: str, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """A random Qwen2-VL-7B and an image of 24 x 24 merged patches."""
    try:
        from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
    except ImportError as error:
        raise Skipped(str(error)) from error
    side = 24
    settings: dict[str, Any] = {
        "attn_implementation": "sdpa",
        "text_config": {
            "vocab_size": 152_064,
            "hidden_size": 3584,
            "intermediate_size": 18_944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16, "mlp_ratio": 4},
    }
    config = Qwen2VLConfig(**settings)
    model = _on_device(lambda: Qwen2VLForConditionalGeneration(config), device, dtype)
    patches = 4 * side * side  # before 2 x 2 are merged
    inputs = _inputs(device, side * side, config.image_token_id)
    visual = inputs["input_ids"] == config.image_token_id
    return model, inputs | {
        "pixel_values": torch.randn(patches, 3 * 2 * 14 * 14, device=device, dtype=dtype),
        "image_grid_thw": torch.tensor([[1, 2 * side, 2 * side]], device=device),
        "mm_token_type_ids": visual.int(),
    }


def _on_device(make: Callable[[], Any], device: str, dtype: torch.dtype) -> Any:
    former = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            return make().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(former)


def _inputs(device: str, visual: int, image_token: int) -> dict[str, Any]:
    ids = torch.tensor([[*range(5, 5 + TEXT[0]), *[image_token] * visual, *range(50, 50 + TEXT[1])]], device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Clock:
    """Milliseconds of a call, and the memory and kernels it takes."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")

    def time(self, call: Callable[[], object]) -> float:
        """On a GPU between two events, with an idle device before; else wall time."""
        if not self.cuda:
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start_event.record()
        call()
        end_event.record()
        torch.cuda.synchronize()
        return start_event.elapsed_time(end_event)

    def memory(self, call: Callable[[], object]) -> float | None:
        """Peak megabytes over what is allocated now; ``None`` without a GPU."""
        if not self.cuda:
            return None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6

    def kernels(self, call: Callable[[], object]) -> int | None:
        """Kernels and copies that the profiler saw on the device; ``None`` without a GPU."""
        if not self.cuda:
            return None
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            call()
            torch.cuda.synchronize()
        return sum(event.device_type.name == "CUDA" for event in profiler.events() or [])


def measure(name: str, model: Any, inputs: dict[str, Any], device: str, repeats: int) -> list[dict[str, Any]]:
    """One row per mode: prefill, decode step, kernels, memory."""
    clock = Clock(device)
    config = SETTINGS[name]
    predictor = SourcePredictor(PredictorConfig(model.config.get_text_config().hidden_size))
    predictor = predictor.eval().requires_grad_(False).to(device)
    predictor.set_drift(1.0, 1e9)
    try:
        keep = SCR(model, config=config, mode="auto", predictor=predictor, threshold=0.0)
        fall = SCR(model, config=config, mode="auto", predictor=predictor, threshold=2.0)
        modes: dict[str, list[AbstractContextManager[Any]]] = {  # what is attached, in turn
            "vanilla": [nullcontext()],
            "vanilla again": [nullcontext()],
            "two-pass": [SCR(model, config=config, mode="two-pass")],
            "one-pass": [SCR(model, config=config, mode="one-pass", predictor=predictor)],
            "auto, 0 % fall back": [keep],
            "auto, 30 %": [fall, keep, keep, fall, keep, keep, fall, keep, keep, keep],
            "auto, 100 %": [fall],
        }
    except errors.UnsupportedModelError as error:
        raise Skipped(str(error)) from error

    def prefill() -> Any:
        return model(**inputs, use_cache=True, logits_to_keep=1)

    def decode(output: Any) -> Callable[[], Any]:
        token = torch.full((1, 1), 7, device=device)
        return lambda: model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)

    times: dict[str, list[float]] = {mode: [] for mode in modes}
    steps: dict[str, list[float]] = {mode: [] for mode in modes}
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for turn in range(-2, repeats):  # two rounds to warm up
            for mode, attached in modes.items():
                with attached[turn % len(attached)]:
                    elapsed = clock.time(prefill)
                    step = decode(prefill())
                    step()
                    if turn >= 0:
                        times[mode].append(elapsed)
                        steps[mode].append(clock.time(step))
        for mode, attached in modes.items():
            with attached[0]:
                step = decode(prefill())
                rows.append(
                    {
                        "model": name,
                        "mode": mode,
                        **_summary("prefill", times[mode], times["vanilla"]),
                        **_summary("decode", steps[mode], steps["vanilla"]),
                        "prefill_kernels": clock.kernels(prefill),
                        "decode_kernels": clock.kernels(step),
                        "prefill_peak_mb": clock.memory(prefill),
                    }
                )
    return rows


def _summary(what: str, mine: list[float], base: list[float]) -> dict[str, float]:
    """Medians; means where a mode alternates, so that its rare expensive prefills count."""
    ratios = [a / b for a, b in zip(mine, base, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        f"{what}_ms": statistics.median(mine),
        f"{what}_mean_ms": statistics.fmean(mine),
        f"{what}_added_ms": statistics.median(a - b for a, b in zip(mine, base, strict=True)),
        f"{what}_ratio": statistics.median(ratios),
        f"{what}_mean_ratio": statistics.fmean(mine) / statistics.fmean(base),
        f"{what}_ratio_low": low,
        f"{what}_ratio_high": high,
    }


def _print(rows: list[dict[str, Any]]) -> None:
    def cell(value: Any, digits: int = 0) -> str:
        return "-" if value is None else f"{value:,.{digits}f}"

    base = rows[0]
    print(
        f"{'mode':22}{'ms':>9}{'added':>9}{'ratio':>8}  {'quartiles':13}{'mean':>7}"
        f"{'kernels':>9}{'more':>6}{'peak MB':>9}{'decode ms':>11}{'more':>6}"
    )
    for row in rows:
        more = [None if row[key] is None else row[key] - base[key] for key in ("prefill_kernels", "decode_kernels")]
        print(
            f"{row['mode']:22}{row['prefill_ms']:9.2f}{row['prefill_added_ms']:+9.2f}{row['prefill_ratio']:8.3f}  "
            f"{row['prefill_ratio_low']:.3f}-{row['prefill_ratio_high']:.3f}  {row['prefill_mean_ratio']:7.3f}"
            f"{cell(row['prefill_kernels']):>9}{cell(more[0]):>6}{cell(row['prefill_peak_mb']):>9}"
            f"{row['decode_ms']:11.3f}{cell(more[1]):>6}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Measures the chosen shapes, one table each; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, action="append", help="shape (default: all)")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, cpu (default cuda)")
    parser.add_argument("--repeats", type=int, default=30, help="timed rounds (default 30; a multiple of 10)")
    parser.add_argument("--tiny", action="store_true", help="a tiny LLaVA in float32 instead of the real shapes")
    parser.add_argument("--json", type=Path, help="also write every number there")
    options = parser.parse_args(argv)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("no CUDA device; --device cpu --tiny is a smoke test", file=sys.stderr)
        return 1
    if options.device.startswith("cuda"):
        torch.cuda.set_device(options.device)
    import transformers

    where = torch.cuda.get_device_name(options.device) if options.device.startswith("cuda") else "CPU"
    print(f"{where}; torch {torch.__version__}, transformers {transformers.__version__}, {options.repeats} rounds")
    results: list[dict[str, Any]] = []
    for name in ["tiny"] if options.tiny else options.model or MODELS:
        print(f"\n{name}")
        try:
            if options.tiny:
                model, inputs = build_llava(TINY, 6, options.device, torch.float32)
            elif name in LLAVA:
                model, inputs = build_llava(LLAVA[name], 24, options.device, torch.bfloat16)
            else:
                model, inputs = build_qwen(options.device, torch.bfloat16)
            rows = measure(name, model, inputs, options.device, options.repeats)
        except (Skipped, torch.OutOfMemoryError) as error:
            print(f"skipped: {str(error).splitlines()[0]}")
            continue
        finally:
            model = inputs = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        _print(rows)
        results += rows
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
