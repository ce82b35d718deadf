"""What a prefill costs under each mode, as a ratio to vanilla, on a model large enough to measure.

python -m benchmarks.prefill
python -m benchmarks.prefill --repeats 30 --batch 2
python -m benchmarks.prefill --repeats 0             # the counts alone

Times: a random LLaVA of about 220 M parameters with 576 visual tokens of 616; the layer ranges are the paper's
fractions of depth. CPU time of one thread, variants interleaved round by round; the ratio is the median over rounds,
with quartiles.

Counts: operators and host syncs more than vanilla, of a narrow model of 32 blocks in bfloat16 with the paper's layers
(0-11 edited, attention of 8-16). benchmarks/counting.py says what counts as a kernel and what as a sync. Branches are
those of an accelerator: on a CPU, scr_runtime reads the scores of a prefill at once, which costs no operator.
"""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from benchmarks.counting import accelerator_branches, counted
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


def runtimes(model: Any, config: SCRConfig) -> dict[str, SCR]:
    """Every mode on one model, with a random predictor that has a drift guard, as an exported one has."""
    predictor = SourcePredictor(PredictorConfig(model.config.text_config.hidden_size)).eval().requires_grad_(False)
    predictor.set_drift(1.0, 1e9)
    settings: dict[str, dict[str, Any]] = {
        "two-pass": {"mode": "two-pass"},
        "one-pass": {"mode": "one-pass", "predictor": predictor},
        "auto, no fallback": {"mode": "auto", "predictor": predictor, "threshold": 0.0},
        "auto, all fall back": {"mode": "auto", "predictor": predictor, "threshold": 2.0},
        "uniform": {"mode": "uniform"},
    }
    return {name: SCR(model, config=config, **setting) for name, setting in settings.items()}


def main() -> None:
    """Prints one table of times, and one of counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20, help="timed rounds (default 20; 0: counts alone)")
    parser.add_argument("--batch", type=int, default=1, help="images per prefill (default 1)")
    options = parser.parse_args()
    if options.repeats:
        print_times(options.repeats, options.batch)
    print_counts(options.batch)


def print_times(repeats: int, batch: int) -> None:
    """Thread time of a prefill under each mode."""
    model, inputs = build_model(), make_inputs(batch)
    modes = runtimes(model, CONFIG)

    def applied(name: str) -> AbstractContextManager[Any]:
        return modes.get(name) or nullcontext()

    costs = prefill_costs(model, inputs, ["vanilla", "vanilla again", *modes], applied, repeats=repeats)
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(
        f"{parameters:.0f} M parameters, batch {batch}, {inputs['input_ids'].shape[1]} tokens, {SIDE * SIDE} visual; "
        f"torch {torch.__version__}, {repeats} rounds\n"
    )
    rows = [["mode", "ms of thread time", "ratio to vanilla", "quartiles"]]
    rows += [
        [name, f"{cost.milliseconds:.0f}", f"{cost.ratio:.3f}", f"{cost.low:.3f} - {cost.high:.3f}"]
        for name, cost in costs.items()
    ]
    print(table(rows), end="\n\n")


def print_counts(batch: int) -> None:
    """Operators and syncs of a prefill and of a decode step under each mode, as an accelerator would see them."""
    model: Any = build_model(layers=32, hidden=64, tower_layers=1)
    model = model.to(torch.bfloat16)
    inputs = make_inputs(batch, torch.bfloat16)
    rows = [["mode", "prefill", "kernels more", "syncs more", "largest tensor (MB)", "decode: kernels", "syncs more"]]
    with accelerator_branches(), torch.no_grad():
        vanilla = vanilla_decode = None
        for name, scr in {"vanilla": nullcontext(), **runtimes(model, SCRConfig())}.items():
            with scr:
                prefill = counted(lambda: model(**inputs, logits_to_keep=1))
                cache = model(**inputs, logits_to_keep=1).past_key_values
                token = torch.full((batch, 1), 7)
                decode = counted(lambda token=token, cache=cache: model(input_ids=token, past_key_values=cache))
            vanilla, vanilla_decode = vanilla or prefill, vanilla_decode or decode
            rows.append(
                [
                    name,
                    f"{prefill.kernels.total():,}",
                    f"{prefill.net(vanilla):+d}",
                    f"{prefill.syncs.total() - vanilla.syncs.total():+d}",
                    f"{prefill.largest / 1e6:.2f}",
                    f"{decode.net(vanilla_decode):+d}",
                    f"{decode.syncs.total() - vanilla_decode.syncs.total():+d}",
                ]
            )
    print(f"32 blocks, hidden size 64, bfloat16, batch {batch}; operators, counted by dispatch\n")
    print(table(rows))


if __name__ == "__main__":
    main()
