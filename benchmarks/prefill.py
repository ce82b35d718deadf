"""What a prefill costs under each mode, as a ratio to vanilla, on a model large enough to measure.

python -m benchmarks.prefill
python -m benchmarks.prefill --repeats 30 --batch 2
python -m benchmarks.prefill --repeats 12 --only online,uniform
python -m benchmarks.prefill --repeats 0             # the counts alone

Times: a random LLaVA of about 220 M parameters with 576 visual tokens of 616; the layer ranges are the paper's
fractions of depth. CPU time of one thread, variants interleaved round by round; the ratio is the median over rounds,
with quartiles. Online edits as many blocks as the others, behind its map.

Counts: operators and host syncs more than vanilla, of a narrow model of 32 blocks in bfloat16 with the paper's layers
(0-11 edited, attention of 8-16). benchmarks/counting.py says what counts as a kernel and what as a sync. Branches are
those of an accelerator: on a CPU, scr_runtime reads the scores of a prefill at once, which costs no operator.
"""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager, nullcontext
from typing import Any

PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.add_argument("--repeats", type=int, default=20, help="timed rounds (default 20; 0: counts alone)")
PARSER.add_argument("--batch", type=int, default=1, help="images per prefill (default 1)")
PARSER.add_argument("--only", help="modes whose time is taken, separated by commas (default: all)")
if __name__ == "__main__":
    PARSER.parse_args()  # before the imports below, which take seconds

import torch

from benchmarks.counting import accelerator_branches, counted
from benchmarks.models import NARROW, SMALL, build_llava, build_predictor, llava_inputs, millions
from evaluation.latency import prefill_costs
from evaluation.tables import table
from scr_runtime import SCR, SCRConfig

CONFIG = SCRConfig(num_sources=32, edit_layers=(0, 5), attention_layers=(4, 8))  # of 16; the paper's 0-11, 8-16 of 32


def runtimes(model: Any, config: SCRConfig) -> dict[str, SCR]:
    """Every mode on one model, with a random predictor."""
    predictor = build_predictor(model)
    behind = config.behind_map(model.config.get_text_config().num_hidden_layers)
    return {
        "two-pass": SCR(model, config=config, mode="two-pass"),
        "one-pass": SCR(model, config=config, mode="one-pass", predictor=predictor),
        "auto, no fallback": SCR(model, config=config, mode="auto", predictor=predictor, threshold=0.0),
        "auto, all fall back": SCR(model, config=config, mode="auto", predictor=predictor, threshold=2.0),
        "online": SCR(model, config=behind, mode="online"),
        "uniform": SCR(model, config=config, mode="uniform"),
    }


def main() -> None:
    """Prints one table of times, and one of counts."""
    options = PARSER.parse_args()
    if options.repeats:
        print_times(options.repeats, options.batch, options.only)
    print_counts(options.batch)


def print_times(repeats: int, batch: int, only: str | None = None) -> None:
    """Thread time of a prefill under each mode, or under those that are named."""
    model, inputs = build_llava(), llava_inputs(batch=batch)
    modes = runtimes(model, CONFIG)
    modes = {name: scr for name, scr in modes.items() if only is None or name in only.split(",")}

    def applied(name: str) -> AbstractContextManager[Any]:
        return modes.get(name) or nullcontext()

    costs = prefill_costs(model, inputs, ["vanilla", "vanilla again", *modes], applied, repeats=repeats)
    print(
        f"{millions(model):.0f} M parameters, batch {batch}, {inputs['input_ids'].shape[1]} tokens, "
        f"{SMALL.side**2} visual; torch {torch.__version__}, {repeats} rounds\n"
    )
    rows = [["mode", "ms of thread time", "ratio to vanilla", "quartiles"]]
    rows += [
        [name, f"{cost.milliseconds:.0f}", f"{cost.ratio:.3f}", f"{cost.low:.3f} - {cost.high:.3f}"]
        for name, cost in costs.items()
    ]
    print(table(rows), end="\n\n")


@torch.no_grad()
def print_counts(batch: int) -> None:
    """Operators and syncs of a prefill and of a decode step under each mode, as an accelerator would see them."""
    model = build_llava(NARROW, dtype=torch.bfloat16)
    inputs = llava_inputs(NARROW, batch, dtype=torch.bfloat16)
    token = torch.full((batch, 1), 7)
    counts = {}
    with accelerator_branches():
        for name, scr in {"vanilla": nullcontext(), **runtimes(model, SCRConfig())}.items():
            with scr:
                prefill = counted(lambda: model(**inputs, logits_to_keep=1))
                cache = model(**inputs, logits_to_keep=1).past_key_values
                decode = counted(lambda cache=cache: model(input_ids=token, past_key_values=cache))
            counts[name] = prefill, decode
    vanilla, vanilla_decode = counts["vanilla"]
    rows = [["mode", "prefill", "kernels more", "syncs more", "largest tensor (MB)", "decode: kernels", "syncs more"]]
    for name, (prefill, decode) in counts.items():
        row = [name, f"{prefill.kernels.total():,}", f"{prefill.net(vanilla):+d}"]
        row += [f"{prefill.syncs.total() - vanilla.syncs.total():+d}", f"{prefill.largest / 1e6:.2f}"]
        row += [f"{decode.net(vanilla_decode):+d}", f"{decode.syncs.total() - vanilla_decode.syncs.total():+d}"]
        rows.append(row)
    print(f"32 blocks, hidden size 64, bfloat16, batch {batch}; operators, counted by dispatch\n")
    print(table(rows))


if __name__ == "__main__":
    main()
