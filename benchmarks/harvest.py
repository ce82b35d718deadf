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
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

import data.harvest
from benchmarks.prefill import CONFIG, IMAGE_TOKEN, SIDE, build_model
from data.harvest import Harvester, ShardPlan
from data.images import CocoImages
from data.shards import Sample, ShardReader, ShardWriter, write_index
from data.vlm import chat_inputs, shared_chat_inputs
from evaluation.report import table
from scr_runtime import capture

CATEGORIES = ("person", "car", "dog", "cat", "chair", "bottle", "bird", "boat")
TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message['content'] %}{% if part['type'] == 'image' %}<image> "
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def build_processor() -> LlavaProcessor:
    """CLIP's preprocessing at 336 pixels, and a vocabulary of a few words."""
    words = ["<pad>", "<unk>", "<s>", "</s>", "USER", "ASSISTANT", ":", "Is", "there", "a", "in", "the", "image", "?"]
    vocabulary = {word: number for number, word in enumerate([*words, *CATEGORIES])} | {"<image>": IMAGE_TOKEN}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )
    side = 14 * SIDE
    pixels = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return LlavaProcessor(
        image_processor=pixels,
        tokenizer=tokenizer,
        patch_size=14,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
    )


def write_images(root: Path, count: int) -> CocoImages:
    """Random JPEGs of 640 x 480 in COCO layout."""
    (root / "images").mkdir()
    generator = np.random.default_rng(0)
    for image_id in range(1, count + 1):
        small = generator.integers(0, 255, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(small).resize((640, 480)).save(root / "images" / f"{image_id}.jpg")
    record = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(1, count + 1)],
        "annotations": [{"id": i, "image_id": i, "category_id": 1 + i % 4} for i in range(1, count + 1)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(CATEGORIES, start=1)],
    }
    (root / "instances.json").write_text(json.dumps(record))
    return CocoImages(root / "images", root / "instances.json")


class TimedWriter(ShardWriter):
    """Adds up the wall time spent in writing."""

    seconds = 0.0

    def write(self, sample: Sample) -> None:
        """Writes a sample."""
        started = time.perf_counter()
        super().write(sample)
        TimedWriter.seconds += time.perf_counter() - started

    def __exit__(self, *error: Any) -> None:
        started = time.perf_counter()
        super().__exit__(*error)
        TimedWriter.seconds += time.perf_counter() - started


def naive_harvest(model: Any, harvester: Harvester, plan: ShardPlan, directory: Path) -> None:
    """What one would write first."""
    token = model.config.image_token_id
    first, last = CONFIG.attention_layers
    with ShardWriter(directory, plan.name, "") as writer:
        for image_id in plan.image_ids:
            maps, questions, states = [], [], torch.empty(0)
            prompts = harvester.prompts(image_id)
            for question in prompts:
                inputs = chat_inputs(harvester.processor, [harvester.images.open(image_id)], [question.text])
                with torch.no_grad():
                    output = model(**inputs, output_attentions=True, output_hidden_states=True)
                visual = inputs["input_ids"][0] == token
                after = torch.arange(len(visual)) > visual.nonzero().max()
                layers = torch.stack(output.attentions[first : last + 1])[:, 0]  # [L, H, S, S]
                maps.append(layers[:, :, after][..., visual].mean((0, 1, 2)))
                hidden = output.hidden_states[1][0]  # [S, d]
                states = hidden[visual]
                questions.append(hidden[after].mean(0).half())
            writer.write(
                Sample(
                    image_id, "", states.half(), torch.stack(maps), torch.stack(questions), (SIDE, SIDE),
                    [{}] * len(prompts), [0.0] * len(prompts),
                )
            )  # fmt: skip


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2, help="images per batch and round (default 2)")
    parser.add_argument("--prompts", type=int, default=2, help="prompts per image (default 2)")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds after one warm-up (default 3)")
    options = parser.parse_args()

    torch.set_num_threads(1)
    model, eager = build_model(), build_model()
    eager.set_attn_implementation("eager")
    data.harvest.ShardWriter = TimedWriter  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as folder:
        images = write_images(Path(folder), options.images)
        ours, naive = Path(folder, "ours"), Path(folder, "naive")
        ours.mkdir()
        naive.mkdir()
        harvester = Harvester(
            ours,
            model=model,
            processor=build_processor(),
            config=CONFIG,
            images=images,
            prompts_per_image=options.prompts,
            prompt_mix=("present", "random"),
            batch_size=options.images * options.prompts,
            states_dtype="float16",
            seed=0,
            settings_fingerprint="",
            allowed_bad=0,
        )
        plan = ShardPlan("train-00000", "train", images.ids, ())
        pictures = [images.open(image_id) for image_id in images.ids]
        texts = [[question.text for question in harvester.prompts(image_id)] for image_id in images.ids]
        rows = [picture for picture in pictures for _ in range(options.prompts)]
        batch: Any = chat_inputs(harvester.processor, rows, [text for about in texts for text in about])
        shared, repeats = shared_chat_inputs(harvester.processor, pictures, texts)
        assert repeats == options.prompts or options.prompts == 1
        wall: list[float] = []

        def harvest() -> None:
            started = time.perf_counter()
            harvester.harvest_shard(plan)
            wall.append(time.perf_counter() - started)

        def prefill() -> None:
            with torch.no_grad():
                model(**batch, use_cache=True, logits_to_keep=1)

        variants: dict[str, Callable[[], object]] = {
            "vanilla prefill": prefill,
            "naive harvest": lambda: naive_harvest(eager, harvester, plan, naive),
            "harvest": harvest,
            "  its diagnostic run": lambda: capture(model, CONFIG, shared, repeats),
            "  the same, images not shared": lambda: capture(model, CONFIG, batch),
        }
        times: dict[str, list[float]] = {name: [] for name in variants}
        for turn in range(1 + options.rounds):
            for name, run in variants.items():
                if turn == 1 and name == "harvest":
                    TimedWriter.seconds = 0.0
                    wall.clear()
                started = time.process_time()
                run()
                if turn:
                    times[name].append(time.process_time() - started)
        difference = compare(ours, naive)

    costs = {name: statistics.median(values) / options.images for name, values in times.items()}
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(
        f"{parameters:.0f} M parameters, {options.images} images x {options.prompts} prompts of "
        f"{batch['input_ids'].shape[1]} tokens; torch {torch.__version__}, {options.rounds} rounds\n"
        f"largest difference between the maps of harvest and naive harvest: {difference:.1e}\n"
    )
    print(
        table(
            [["variant", "CPU s per image", "images/s", "x vanilla", "x naive"]]
            + [
                [name, f"{cost:.2f}", f"{1 / cost:.3f}", *(f"{costs[n] / cost:.2f}" for n in list(costs)[:2])]
                for name, cost in costs.items()
            ]
        )
    )
    print(f"\nwriter: {TimedWriter.seconds / sum(wall):.2%} of the harvest's wall time")


def compare(ours: Path, naive: Path) -> float:
    """Largest difference of two folders' maps."""
    readers = []
    for folder in (ours, naive):
        write_index(folder, {"train": ["train-00000"]}, {}, {})
        readers.append(ShardReader(folder, "train"))
    return max(float((a.attention - b.attention).abs().max()) for a, b in zip(*readers, strict=True))


if __name__ == "__main__":
    main()
