"""Does a predictor gain from the first attention layer behind block 0, which is known before the edit?

    python train.py model=scene-next harvest.samples=2000 evaluation.images=0
    python -m benchmarks.probe runs/harvest/scene-next-... model=scene-next

The queries of the question and the keys of the patches in block 1 follow from block 0's output by weights of the
model: with them, a predictor would see the attention of that one layer before anything is edited. Here the layer is
run as it is, so that the gain is the most that any approximation of it (pooled queries, low rank) could bring. The
logarithm of its attention from the text to the patches is put beside each patch's states, and the same network is
fitted:

    none      states, position, question: the default predictor
    mean      and one number per patch, the mean over the heads
    heads     and one number per patch and head

Beside them stands the choice of sources by that layer's mean attention, without a predictor.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.add_argument("folder", type=Path, help="a finished harvest")
PARSER.add_argument("settings", nargs="*", help="those of the harvest, and of the fits: key=value")
PARSER.add_argument("--seeds", type=int, default=3)
if __name__ == "__main__":
    PARSER.parse_args()  # before the imports below, which take seconds

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from benchmarks.transfer import fitted, over_seeds
from configs import TrainConfig, load_config
from data.batches import Batch, Part, ShardRows
from data.chat import chat_inputs
from data.datamodule import ShardDataModule
from data.images import CocoImages
from data.sample import Sample
from data.shards import ShardReader
from data.vlm import load_vlm
from evaluation.tables import table
from pipeline.exits import quieten_libraries
from pipeline.harvest import training_images
from pipeline.stages import measure
from predictor.module import SourceModule
from scr_runtime.families import blocks_of, family_of
from scr_runtime.layout import visual_layout

Kind = Literal["none", "mean", "heads"]
Probe = dict[tuple[str, int, int], Tensor]
"""[H, N] attention of each head, by sample key, place of the grid, and number of the prompt."""
SPLITS = ("train", "validation", "test")
SHOWN = ("recall", "ndcg", "mass")


class _Read(BaseException):
    """Leaves the model when the layer has run."""


class FirstLayer:
    """A model, and what its first attention layer behind the state layer looks at."""

    def __init__(self, config: TrainConfig) -> None:
        self.model, self.processor = load_vlm(config.model)
        self.model.set_attn_implementation("eager")
        self.family = family_of(self.model)
        layer: Any = blocks_of(self.model)[config.scr.state_layer + 1]
        layer.self_attn.register_forward_hook(self._read)
        self._weights: Tensor | None = None

    def _read(self, module: nn.Module, args: Any, output: Any) -> None:
        self._weights = output[1]  # [P, H, S, S]
        raise _Read

    @torch.no_grad()
    def look(self, images: CocoImages, sample: Sample) -> Iterator[tuple[int, int, Tensor]]:
        """Place of the grid, number of the prompt, and [H, N] attention, mean over the text behind the image."""
        texts = [str(prompt["text"]) for prompt in sample.prompts]
        picture = images.open(sample.image_id)
        inputs: Any = chat_inputs(self.processor, [picture] * len(texts), texts)
        with contextlib.suppress(_Read):
            self.model(**inputs, use_cache=False)
        assert self._weights is not None
        visual = self.family.visual_tokens(self.model, inputs["input_ids"])
        layout = visual_layout(visual, inputs["attention_mask"], self.family.image_grids(self.model, inputs))
        length = inputs["input_ids"].shape[1]
        places = [0] * len(texts)
        found: dict[int, tuple[int, Tensor]] = {}
        for group in layout.groups:
            for number, image in enumerate(group.images):
                row = int(group.rows[number])
                text = self._weights[row, :, -layout.text_rows :, group.positions[number] - row * length]  # [H, T, N]
                found[image] = row, torch.einsum("htn,t->hn", text, group.text_weights[number])
        for image in sorted(found):
            row, attention = found[image]
            yield places[row], row, attention
            places[row] += 1


def probe(config: TrainConfig, folder: Path) -> Probe:
    """Looks at every sample of a harvest that is fitted to, or measured on."""
    layer, images, found = FirstLayer(config), training_images(config), {}
    for split in SPLITS:
        reader = ShardReader(folder, split)
        keys = reader.keys[: config.trainer.train_images] if split == "train" else reader.keys
        for number, key in enumerate(tqdm(keys, desc=split)):
            for place, prompt, attention in layer.look(images, reader[number]):
                found[key, place, prompt] = attention
    return found


class ProbedRows(ShardRows):
    """Rows whose states have the probe's features behind them."""

    def __init__(self, rows: ShardRows, probe: Mapping[tuple[str, int, int], Tensor], kind: Kind) -> None:
        self.__dict__.update(rows.__dict__)
        self._probe, self._kind = probe, kind

    def __getitem__(self, part: Part) -> Batch:
        batch = super().__getitem__(part)
        keys = [(self._keys[sample], place, prompt) for sample, place, prompt in map(self._rows.__getitem__, part[0])]
        heads = torch.stack([self._probe[key] for key in keys]).transpose(1, 2)  # [B, N, H]
        seen = heads.mean(-1, keepdim=True) if self._kind == "mean" else heads
        batch["states"] = torch.cat([batch["states"].float(), seen.clamp_min(1e-9).log()], dim=-1)
        batch["question"] = functional.pad(batch["question"].float(), (0, seen.shape[-1]))
        return batch


class Probed(ShardDataModule):
    """A harvest with the probe's features."""

    probe: Probe
    kind: Kind = "none"

    def rows(self, split: str, device: torch.device | None = None) -> ShardRows:
        rows = super().rows(split, device)
        return rows if self.kind == "none" else ProbedRows(rows, self.probe, self.kind)

    @property
    def identity(self) -> dict[str, Any]:
        return super().identity | {"probe": self.kind}


def measured(config: TrainConfig, score: Any, data: Any) -> list[float]:
    """Recall, NDCG and mass on the test split."""
    found = measure(config, data, score, data.kind)
    return [found[name].mean for name in SHOWN]


def compare(configs: Sequence[TrainConfig], folder: Path) -> list[list[str]]:
    """The table of kinds."""
    data = Probed(folder, configs[0].trainer)
    data.probe = probe(configs[0], folder)
    data.kind = "mean"
    alone = measured(configs[0], lambda batch: batch["states"][..., -1], data)
    rows = [["predictor reads", *SHOWN], ["(block 1's attention alone)", *(f"{value:.3f}" for value in alone)]]
    kinds: tuple[Kind, ...] = ("none", "mean", "heads")
    for kind in kinds:
        data.kind = kind

        def one(config: TrainConfig) -> list[float]:
            own = data.for_fit(config.trainer, seed=config.seed, mean_maps=False)
            steps = config.trainer.max_epochs * len(own.train_dataloader())
            module: SourceModule = fitted(config, own, own.hidden_size, steps, None)
            return measured(config, module.score, own)

        rows.append([kind, *over_seeds(one, configs)])
        print(rows[-1], flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    arguments = PARSER.parse_args(argv)
    quieten_libraries()
    configs = [load_config([*arguments.settings, f"seed={seed}"]) for seed in range(arguments.seeds)]
    rows = compare(configs, arguments.folder)
    print(f"\non the test split, mean (range) over {arguments.seeds} seeds\n")
    print(table(rows))


if __name__ == "__main__":
    main()
