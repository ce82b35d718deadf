"""Trains scene-next from nothing, with a fixed number of steps and a seed, so that it feels the edit.

The vision tower has one block. What a patch shows is worked out by the tower and the decoder's first blocks together,
the blocks that SCR edits, and is read by the question in the blocks behind them. Three stages:

A. patches: the category seen in each patch, read off the states that leave the last edited block;
B. names: all 40 names stand behind an image, each in a branch that does not see the others (`scenes.packing`), and
   each is told whether it is there, after 8, 12 and 16 blocks; the loss of stage A continues and fades, and
   everything is trained from the pixels on;
C. answers: yes/no questions and captions as in `scenes.fit`, with no loss on any patch; the tower and the edited
   blocks rest, because the few answers of a step blur what they have learned (docs/scenes.md has the figures).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import LlavaNextForConditionalGeneration

from data.wording import with_article
from scenes.categories import CATEGORIES
from scenes.fit import check_folder, report_stage, save_checkpoint, scaled_steps
from scenes.model import vocabulary
from scenes.muon import Trainer
from scenes.next_lessons import BRANCHES, NO_PATCH, QUESTIONS, Lessons, NextScenes
from scenes.next_model import HIDDEN, build_next_model, build_next_processor
from scenes.packing import (
    IGNORED,
    QUESTION_LENGTH,
    PackedLayout,
    packed_row,
    packed_states,
    tokenizer,
    whole_states,
)

EDITED = 6  # blocks 0 to 5; the loss on patches reads what leaves them
READ_AFTER = (8, 12, 16)  # blocks after which a name is read
_TO_NAME = 6  # tokens between the name and the answer: in the image ? ASSISTANT :
_TITLES: dict[Lessons, str] = {"patches": "A patches", "names": "B names", "answers": "C answers"}
_NAMES: list[list[int]] = [tokenizer()(with_article(category.name)).input_ids for category in CATEGORIES]
_NAME_ENDS = torch.tensor([len(name) for name in _NAMES]).cumsum(0) - 1  # places of their last words


@dataclass(frozen=True)
class NextRecipe:
    """Everything that decides what comes out, besides the seed.

    Attributes:
        patch_steps: Steps of stage A.
        patch_batch: Images a step in stage A.
        name_steps: Steps of stage B.
        name_batch: Images a step in stage B.
        answer_steps: Steps of stage C.
        answer_batch: Images a step in stage C, each with `QUESTIONS` questions and a caption.
        rate: Peak learning rate of stages A and B.
        answer_rate: Peak learning rate of stage C.
        caption_weight: Weight of the caption loss beside the yes/no loss.
    """

    patch_steps: int = 300
    patch_batch: int = 24
    name_steps: int = 160
    name_batch: int = 16
    answer_steps: int = 300
    answer_batch: int = 8
    rate: float = 3e-3
    answer_rate: float = 2e-3
    caption_weight: float = 0.5

    def scaled(self, factor: float) -> NextRecipe:
        """The same recipe with `factor` times the steps, at least 2 in each stage.

        Raises:
            ValueError: `factor` is not above 0.
        """
        return scaled_steps(self, factor)


def fit_next(out: Path, seed: int = 0, recipe: NextRecipe | None = None, workers: int = 1) -> dict[str, list[float]]:
    """Trains scene-next and saves it in fp16.

    Args:
        out: Folder of the checkpoint; replaced when the training is over.
        seed: Seed of the weights and of the scenes.
        recipe: Steps and rates; the default made the shipped checkpoint.
        workers: Processes that render scenes beside the training.

    Returns:
        Stage ("A", "B", "C") -> the loss of every step; in stage C that of the yes/no questions.

    Raises:
        ValueError: `out` exists and is not a checkpoint that may be replaced.
    """
    check_folder(out)
    recipe = recipe or NextRecipe()
    torch.manual_seed(seed)
    fitting = Fitting(build_next_model().train(), recipe, seed, workers)
    print(f"scenes fit: {fitting.model.num_parameters():,} parameters, seed {seed}, {torch.get_num_threads()} threads")
    print(f"{recipe}")
    stages = dict(zip(_TITLES.values(), (fitting.patches, fitting.names, fitting.answers), strict=True))
    losses: dict[str, list[float]] = {}
    begin = time.perf_counter()
    for title, stage in stages.items():
        losses[title[0]] = stage(title)
        report_stage(title, fitting.images(title)[1], losses[title[0]], begin)
    provenance = {"seed": seed, "sizes": "mixed", "recipe": dataclasses.asdict(recipe)}
    save_checkpoint(fitting.model, out, provenance, build_next_processor())
    print(f"saved in fp16, {sum(file.stat().st_size for file in out.iterdir()) / 1e6:.1f} MB")
    return losses


class Readers(nn.Module):
    """What the stages read off the decoder; not part of the checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.names = nn.ModuleList(nn.Sequential(nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 1)) for _ in READ_AFTER)
        self.ground = nn.Parameter(torch.randn(HIDDEN) * 0.1)
        self.sharpness = nn.Parameter(torch.tensor(10.0))
        self.rarity = nn.Parameter(torch.tensor(-12.0))

    def patch_loss(self, visual: Tensor, names: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Compares patches with the names of the same image, by cosine.

        Args:
            visual: [B, N, d] states of the visual tokens.
            names: [B, 40, d] states of the names, after as many blocks.
            batch: Has "labels" [B, N] and "present" [B, 40].

        Returns:
            Cross-entropy of each patch over the names and the ground, and binary cross-entropy of each name over the
            sum of its patches.
        """
        visual = F.normalize(visual, dim=-1)
        similar = self.sharpness * visual @ F.normalize(names, dim=-1).mT  # [B, N, 40]
        ground = self.sharpness * visual @ F.normalize(self.ground, dim=0)  # [B, N]
        logits = torch.cat([ground[..., None], similar], -1).flatten(0, 1)
        patches = F.cross_entropy(logits, batch["labels"].flatten(), ignore_index=NO_PATCH)
        found = similar.logsumexp(1) + self.rarity
        return patches, F.binary_cross_entropy_with_logits(found, batch["present"])

    def name_loss(self, states: list[Tensor], rows: Any, present: Tensor) -> Tensor:
        """Binary cross-entropy of `present`, read at `states[n][rows]` after each n of `READ_AFTER` blocks."""
        losses = [
            F.binary_cross_entropy_with_logits(reader(states[blocks][rows])[..., 0], present)
            for blocks, reader in zip(READ_AFTER, self.names, strict=True)
        ]
        return torch.stack(losses).mean()


class Fitting:
    """The stages of one training.

    Args:
        model: What is trained.
        recipe: Steps and rates.
        seed: Seed of the scenes.
        workers: Processes that render scenes beside the training.
    """

    def __init__(self, model: LlavaNextForConditionalGeneration, recipe: NextRecipe, seed: int, workers: int) -> None:
        self.model, self.readers = model, Readers()
        self._recipe, self._seed, self._workers = recipe, seed, workers

    def patches(self, title: str) -> list[float]:
        """Stage A, without the blocks behind the edited ones; returns the loss of the patches at every step."""
        recipe, core = self._recipe, self.model.model
        decoder = core.language_model
        modules = (core.vision_tower, core.multi_modal_projector, decoder.embed_tokens, decoder.layers[:EDITED])
        trainer = Trainer((*modules, self.readers), [core.image_newline], recipe.rate, recipe.patch_steps)
        losses: list[float] = []
        with tqdm(total=recipe.patch_steps, desc=title, unit="step") as progress:
            for batch in self._batches("patches", recipe.patch_steps, recipe.patch_batch):
                visual = self._visual(batch)
                projected, text, layout = self._with_names(visual)
                row, position_ids, mask = packed_row(self.model, projected, text, layout)
                positions = decoder.rotary_emb(row, position_ids)
                for block in decoder.layers[:EDITED]:
                    row = block(row, attention_mask=mask, position_ids=position_ids, position_embeddings=positions)
                patches, present = self._patch_losses(row, visual, layout, batch)
                trainer.step(patches + 2 * present)
                losses.append(patches.item())
                _show(progress, {"patches": _recent(losses), "present": present.item()})
        return losses

    def names(self, title: str) -> list[float]:
        """Stage B; returns the loss at the names at every step."""
        recipe = self._recipe
        trainer = self._trainer(recipe.name_steps)
        losses: list[float] = []
        with tqdm(total=recipe.name_steps, desc=title, unit="step") as progress:
            for step, batch in enumerate(self._batches("names", recipe.name_steps, recipe.name_batch)):
                visual = self._visual(batch)
                projected, text, layout = self._with_names(visual)
                states = whole_states(self.model, projected, text, layout)
                names = self.readers.name_loss(states, (slice(None), layout.prefix + _NAME_ENDS), batch["present"])
                patches, _ = self._patch_losses(states[EDITED], visual, layout, batch)
                trainer.step(4 * names + (1 - step / recipe.name_steps) * patches)
                losses.append(names.item())
                _show(progress, {"names": _recent(losses), "patches": patches.item()})
        return losses

    def answers(self, title: str) -> list[float]:
        """Stage C; returns the loss of the yes/no questions at every step."""
        recipe = self._recipe
        trainer = self._last_trainer(recipe.answer_steps)
        losses: list[float] = []
        right: list[float] = []
        with tqdm(total=recipe.answer_steps, desc=title, unit="step") as progress:
            for batch in self._batches("answers", recipe.answer_steps, recipe.answer_batch):
                visual = self._visual(batch)
                layout = PackedLayout(BRANCHES, 2 + visual.shape[1])
                states = packed_states(self.model, visual, batch["text"], layout)
                yes_no, caption, early, correct = self._answer_losses(states, batch["targets"])
                trainer.step(yes_no + recipe.caption_weight * caption + early)
                losses.append(yes_no.item())
                right.append(correct)
                means = {"yes_no": _recent(losses), "right": _recent(right)}
                _show(progress, means | {"caption": caption.item(), "early": early.item()})
        return losses

    def _trainer(self, steps: int) -> Trainer:
        """Of everything, from the pixels to the answer."""
        core = self.model.model
        modules = (core.vision_tower, core.multi_modal_projector, core.language_model, self.model.lm_head)
        return Trainer((*modules, self.readers), [core.image_newline], self._recipe.rate, steps)

    def _last_trainer(self, steps: int) -> Trainer:
        """Of what reads the patches: the tower, the edited blocks and the words stay as stage B left them."""
        core = self.model.model
        self.model.requires_grad_(False)
        modules = (core.language_model.layers[EDITED:], core.language_model.norm, self.model.lm_head)
        for module in modules:
            module.requires_grad_(True)
        return Trainer((*modules, self.readers.names), [], self._recipe.answer_rate, steps)

    def images(self, title: str) -> tuple[int, int]:
        """First scene of a stage, and how many it has: no stage sees one of another."""
        recipe = self._recipe
        counts = {
            "A patches": recipe.patch_steps * recipe.patch_batch,
            "B names": recipe.name_steps * recipe.name_batch,
            "C answers": recipe.answer_steps * recipe.answer_batch,
        }
        before = list(counts)[: list(counts).index(title)]
        return sum(counts[name] for name in before), counts[title]

    def _batches(self, lessons: Lessons, steps: int, size: int) -> Iterator[dict[str, Tensor]]:
        first, _ = self.images(_TITLES[lessons])
        return NextScenes(self._seed, first, steps, size, lessons).read(self._workers)

    def _visual(self, batch: dict[str, Tensor]) -> Tensor:
        """The visual tokens of a batch of images of one size, [B, N, d]."""
        found: Any = self.model.model.get_image_features(batch["pixels"], batch["size"])
        return torch.stack(list(found.pooler_output))

    def _with_names(self, visual: Tensor) -> tuple[Tensor, Tensor, PackedLayout]:
        """The prefix "<image> Is there", the 40 names behind it, and their layout; see `whole_states`."""
        words = vocabulary()
        shared = self.model.get_input_embeddings()(torch.tensor([[words["Is"], words["there"]]]))
        prefix = torch.cat([visual, shared.expand(len(visual), -1, -1)], 1)
        text = torch.tensor([[token for name in _NAMES for token in name]]).expand(len(visual), -1)
        return prefix, text, PackedLayout(tuple(map(len, _NAMES)), 2 + prefix.shape[1])

    def _patch_losses(
        self, states: Tensor, visual: Tensor, layout: PackedLayout, batch: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        return self.readers.patch_loss(
            states[:, 2 : 2 + visual.shape[1]], states[:, layout.prefix + _NAME_ENDS], batch
        )

    def _answer_losses(self, states: list[Tensor], targets: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
        """Losses of yes/no, of captions and at the names, and the share of right answers."""
        words, split = vocabulary(), QUESTIONS * QUESTION_LENGTH
        logits = self.model.lm_head(states[-1])
        answers, is_answer = targets[:, :split], targets[:, :split] != IGNORED
        yes_no = F.cross_entropy(logits[:, :split][is_answer], answers[is_answer])
        caption = F.cross_entropy(logits[:, split:].flatten(0, 1), targets[:, split:].flatten())
        rows, colon = ((answers == words["yes"]) | (answers == words["no"])).nonzero(as_tuple=True)
        present = (answers[rows, colon] == words["yes"]).float()
        early = self.readers.name_loss(states, (rows, colon - _TO_NAME), present)
        right = (logits[:, :split].argmax(-1) == answers)[rows, colon].float().mean().item()
        return yes_no, caption, early, right


def _recent(values: list[float]) -> float:
    return float(np.mean(values[-30:]))


def _show(progress: tqdm[Any], values: Mapping[str, float]) -> None:
    progress.set_postfix({key: f"{value:.3f}" for key, value in values.items()}, refresh=False)
    progress.update()
