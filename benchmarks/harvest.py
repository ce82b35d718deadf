"""What the harvest of an image costs, beside a plain prefill of its prompts and beside a naive harvest.

python -m benchmarks.harvest
python -m benchmarks.harvest --images 4 --prompts 4 --rounds 5

The random LLaVA of benchmarks/prefill.py (220 M parameters, 576 visual tokens) and random JPEGs of COCO's size.
Variants take turns; times are CPU time of the process on one torch thread, medians over rounds.

    vanilla prefill     one plain forward (use_cache, logits of the last token) over the prepared batch; no decoding
    naive harvest       eager attention, output_attentions and output_hidden_states, one prompt at a time, everything
                        in sequence: decode, preprocess, forward, average, write
    harvest             what `python -m data.harvest` runs: decode, preprocess, diagnostic run, write
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.add_argument("--images", type=int, default=2, help="images per batch and round (default 2)")
PARSER.add_argument("--prompts", type=int, default=2, help="prompts per image (default 2)")
PARSER.add_argument("--rounds", type=int, default=3, help="timed rounds after one warm-up (default 3)")
if __name__ == "__main__":
    PARSER.parse_args()  # before the imports below, which take seconds

import numpy as np
import torch
from PIL import Image

from benchmarks.models import PATCH, SMALL, build_llava, millions
from benchmarks.prefill import CONFIG
from benchmarks.rounds import interleaved, wall_and_process_clock
from data.chat import chat_inputs, shared_chat_inputs
from data.harvester import Harvester, prepare
from data.images import CocoImages
from data.index import write_index
from data.plan import ShardPlan
from data.sample import Sample
from data.settings import HarvestSettings
from data.shards import ShardReader, ShardWriter
from evaluation.tables import table
from scenes.categories import CATEGORIES
from scenes.model import build_processor, vocabulary
from scr_runtime import capture

COSTS = ("vanilla prefill", "naive harvest", "harvest", "  its diagnostic run", "  the same, images not shared")
WRITING = "  its writing"


def main() -> None:
    """Prints one table."""
    options = PARSER.parse_args()
    torch.set_num_threads(1)
    model = build_llava()
    with tempfile.TemporaryDirectory() as folder:
        images = write_images(Path(folder), options.images + 2)
        # a harvest has three splits; only the shard of the first is made
        settings = HarvestSettings(
            samples=options.images,
            validation=1,
            test=1,
            prompts=["present", "random"],
            prompts_per_image=options.prompts,
            batch_size=options.images * options.prompts,
        )
        words = vocabulary() | {"<image>": SMALL.image_token}
        processor = build_processor(words, side=SMALL.pixels, patch=PATCH)
        ours = Path(folder, "ours")
        ours.mkdir()
        job, harvester = prepare(ours, model=model, processor=processor, scr=CONFIG, images=images, settings=settings)
        times, difference = measure(harvester, job.plans[0], Path(folder), options.rounds)
    print(
        f"{millions(model):.0f} M parameters, {options.images} images of {job.tokens_per_image} visual tokens x "
        f"{options.prompts} prompts; torch {torch.__version__}, {options.rounds} rounds\n"
        f"largest difference between the maps of harvest and naive harvest: {difference:.1e}\n"
    )
    costs = {name: statistics.median(cpu for _, cpu in times[name]) / 1e3 / options.images for name in times}
    rows = [["variant", "CPU s per image", "images/s", "x vanilla", "x naive"]]
    for name in COSTS:
        ratios = (f"{costs[base] / costs[name]:.2f}" for base in COSTS[:2])
        rows.append([name, f"{costs[name]:.2f}", f"{1 / costs[name]:.3f}", *ratios])
    print(table(rows))
    writing, whole = (statistics.median(wall for wall, _ in times[name]) for name in (WRITING, "harvest"))
    print(f"\nwriter: {writing / whole:.2%} of the harvest's wall time")


def measure(
    harvester: Harvester, plan: ShardPlan, folder: Path, rounds: int
) -> tuple[dict[str, list[tuple[float, float]]], float]:
    """Wall and CPU milliseconds of every variant, and the largest difference of the naive harvest's maps."""
    model, naive, again = harvester.model, folder / "naive", folder / "again"
    naive.mkdir()
    again.mkdir()
    eager = build_llava()
    eager.set_attn_implementation("eager")
    pictures = [harvester.images.open(image_id) for image_id in plan.image_ids]
    texts = [[question.text for question in harvester.prompts(image_id)] for image_id in plan.image_ids]
    prompts = len(texts[0])
    rows = [picture for picture in pictures for _ in range(prompts)]
    batch: Any = chat_inputs(harvester.processor, rows, [text for about in texts for text in about])
    shared, repeats = shared_chat_inputs(harvester.processor, pictures, texts)
    assert repeats == prompts
    harvester.harvest_shard(plan)
    samples = list(read(harvester.job.directory, plan))

    @torch.no_grad()
    def prefill() -> None:
        model(**batch, use_cache=True, logits_to_keep=1)

    calls: list[Callable[[], object]] = [
        prefill,
        lambda: naive_harvest(eager, harvester, plan, naive),
        lambda: harvester.harvest_shard(plan),
        lambda: capture(model, CONFIG, shared, repeats),
        lambda: capture(model, CONFIG, batch),
        lambda: write_shard(again, plan, samples),
    ]
    times = interleaved(dict(zip([*COSTS, WRITING], calls, strict=True)), wall_and_process_clock, rounds, warm_up=1)
    pairs = zip(samples, read(naive, plan), strict=True)
    return times, max(float((a.attention - b.attention).abs().max()) for a, b in pairs)


def write_images(root: Path, count: int) -> CocoImages:
    """Random JPEGs of 640 x 480 in COCO layout."""
    (root / "images").mkdir()
    generator = np.random.default_rng(0)
    for image_id in range(1, count + 1):
        small = generator.integers(0, 255, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(small).resize((640, 480)).save(root / "images" / f"{image_id}.jpg")
    record = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(1, count + 1)],
        "annotations": [
            {"id": i, "image_id": i, "category_id": CATEGORIES[i % 4].coco_id} for i in range(1, count + 1)
        ],
        "categories": [{"id": category.coco_id, "name": category.name} for category in CATEGORIES],
    }
    (root / "instances.json").write_text(json.dumps(record))
    return CocoImages(root / "images", root / "instances.json")


def naive_harvest(model: Any, harvester: Harvester, plan: ShardPlan, directory: Path) -> None:
    """What one would write first."""
    write_shard(directory, plan, [_naive_sample(model, harvester, image_id) for image_id in plan.image_ids])


@torch.no_grad()
def _naive_sample(model: Any, harvester: Harvester, image_id: int) -> Sample:
    first, last = CONFIG.attention_layers
    maps, questions, states = [], [], torch.empty(0)
    prompts = harvester.prompts(image_id)
    for question in prompts:
        inputs = chat_inputs(harvester.processor, [harvester.images.open(image_id)], [question.text])
        output = model(**inputs, output_attentions=True, output_hidden_states=True)
        visual = inputs["input_ids"][0] == SMALL.image_token
        behind = torch.arange(len(visual)) > visual.nonzero().max()
        layers = torch.stack(output.attentions[first : last + 1])[:, 0]  # [L, H, S, S]
        maps.append(layers[:, :, behind][..., visual].mean((0, 1, 2)))
        hidden = output.hidden_states[1][0]  # [S, d]
        states = hidden[visual]
        questions.append(hidden[behind].mean(0).half())
    grids = ((SMALL.side, SMALL.side),)
    facts: tuple[Any, Any] = [{}] * len(prompts), [0.0] * len(prompts)
    return Sample(image_id, "", states.half(), torch.stack(maps), torch.stack(questions), grids, *facts)


def write_shard(directory: Path, plan: ShardPlan, samples: list[Sample]) -> None:
    """Writes a shard."""
    with ShardWriter(directory, plan.name, "") as writer:
        for sample in samples:
            writer.write(sample)


def read(directory: Path, plan: ShardPlan) -> ShardReader:
    """The samples of a folder that holds one shard."""
    write_index(directory, {plan.split: [plan.name]}, {}, {})
    return ShardReader(directory, plan.split)


if __name__ == "__main__":
    main()
