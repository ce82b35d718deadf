"""What a prefill costs under each mode, as a ratio to vanilla, on a model large enough to measure.

python -m benchmarks.prefill
python -m benchmarks.prefill --repeats 30 --batch 2

A random LLaVA of about 220 M parameters with 576 visual tokens of 616; the layer ranges are the paper's fractions
of depth. Times are CPU time of one thread, variants interleaved round by round; the ratio is the median over rounds,
with quartiles.
"""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from evaluation.latency import prefill_costs
from evaluation.report import table
from scr_runtime import SCR, PredictorConfig, SCRConfig, SourcePredictor

IMAGE_TOKEN = 999
SIDE = 24
CONFIG = SCRConfig(num_sources=32, edit_layers=(0, 5), attention_layers=(4, 8))  # of 16; the paper's 0-11, 8-16 of 32


def build_model(layers: int = 16, hidden: int = 1024, tower_layers: int = 8) -> LlavaForConditionalGeneration:
    """A random LLaVA with 24 x 24 patches."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"image_token_id": IMAGE_TOKEN}  # a dict: its type stub lacks the parameter
    config = LlavaConfig(
        **settings,
        vision_config=CLIPVisionConfig(
            hidden_size=384,
            intermediate_size=1536,
            num_hidden_layers=tower_layers,
            num_attention_heads=6,
            image_size=14 * SIDE,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            vocab_size=1000,
            hidden_size=hidden,
            intermediate_size=2816 * hidden // 1024,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 64,
            max_position_embeddings=1024,
        ),
        image_seq_length=SIDE * SIDE,
    )
    return LlavaForConditionalGeneration(config).eval()


def make_inputs(batch: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """One image and 40 words per row."""
    ids = [1, *[5] * 9, *[IMAGE_TOKEN] * SIDE * SIDE, *range(10, 40)]
    return {
        "input_ids": torch.tensor([ids] * batch),
        "attention_mask": torch.ones(batch, len(ids), dtype=torch.long),
        "pixel_values": torch.randn(batch, 3, 14 * SIDE, 14 * SIDE, dtype=dtype),
        "use_cache": True,
    }


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20, help="timed rounds (default 20)")
    parser.add_argument("--batch", type=int, default=1, help="images per prefill (default 1)")
    options = parser.parse_args()

    model = build_model()
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    inputs = make_inputs(options.batch)
    predictor = SourcePredictor(PredictorConfig(1024)).eval().requires_grad_(False)
    runtimes = {
        "two-pass": SCR(model, config=CONFIG, mode="two-pass"),
        "one-pass": SCR(model, config=CONFIG, mode="one-pass", predictor=predictor),
        "auto, no fallback": SCR(model, config=CONFIG, mode="auto", predictor=predictor, threshold=0.0),
        "auto, all fall back": SCR(model, config=CONFIG, mode="auto", predictor=predictor, threshold=2.0),
        "uniform": SCR(model, config=CONFIG, mode="uniform"),
    }

    def applied(name: str) -> AbstractContextManager[Any]:
        return runtimes.get(name) or nullcontext()

    names = ["vanilla", "vanilla again", *runtimes]
    costs = prefill_costs(model, inputs, names, applied, repeats=options.repeats)
    print(
        f"{parameters:.0f} M parameters, batch {options.batch}, {inputs['input_ids'].shape[1]} tokens, {SIDE * SIDE} visual; "
        f"predictor {predictor.count_parameters():,} parameters; torch {torch.__version__}, {options.repeats} rounds\n"
    )
    rows = [["mode", "ms of thread time", "ratio to vanilla", "quartiles"]]
    rows += [
        [name, f"{cost.milliseconds:.0f}", f"{cost.ratio:.3f}", f"{cost.low:.3f} - {cost.high:.3f}"]
        for name, cost in costs.items()
    ]
    print(table(rows))


if __name__ == "__main__":
    main()
