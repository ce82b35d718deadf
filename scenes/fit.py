"""Trains the scene model from nothing, with a fixed number of steps and a seed.

Two stages:

A. the vision tower alone: which category is seen in each patch, and which are in the image at all;
B. the tower is frozen; projector and language model learn yes/no questions and captions (`scenes.packing`).

In stage B the negative questions are drawn from all absent categories, most of them from other contexts. So what
usually stands together is a good guess, and the model keeps it as a prior beside what it sees: that is where its
hallucinations come from.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

from scenes.categories import CATEGORIES
from scenes.drawing import render_scene
from scenes.model import GRID, HIDDEN, build_model, build_processor, vocabulary
from scenes.packing import (
    IGNORED,
    QUESTION_LENGTH,
    QUESTIONS,
    TRAIN_LAYOUT,
    FitScenes,
    SceneModel,
    normalised,
    packed_states,
    patch_labels,
    tokenizer,
    visual_features,
)
from scenes.world import replace_folder

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what comes out, besides the seed.

    Attributes:
        tower_steps: Steps of stage A.
        tower_batch: Images a step in stage A.
        tower_rate: Peak learning rate of stage A.
        language_steps: Steps of stage B.
        language_batch: Images a step in stage B, each with `QUESTIONS` questions and a caption.
        language_rate: Peak learning rate of stage B.
        caption_weight: Weight of the caption loss beside the yes/no loss.
    """

    tower_steps: int = 400
    tower_batch: int = 64
    tower_rate: float = 3e-3
    language_steps: int = 600
    language_batch: int = 8
    language_rate: float = 3e-3
    caption_weight: float = 0.5

    def scaled(self, factor: float) -> Recipe:
        """The same recipe with `factor` times the steps, at least 2 in each stage.

        Raises:
            ValueError: `factor` is not above 0.
        """
        return scaled_steps(self, factor)


AnyRecipe = TypeVar("AnyRecipe", bound="DataclassInstance")


def scaled_steps(recipe: AnyRecipe, factor: float) -> AnyRecipe:
    """A recipe with `factor` times the steps, at least 2 in each stage.

    Raises:
        ValueError: `factor` is not above 0.
    """
    if factor <= 0:
        raise ValueError(f"steps scale {factor}: give a number greater than 0, such as 0.5")
    names = [field.name for field in dataclasses.fields(recipe) if field.name.endswith("_steps")]
    return dataclasses.replace(recipe, **{name: max(2, round(getattr(recipe, name) * factor)) for name in names})


def fit(out: Path, seed: int = 0, recipe: Recipe | None = None, workers: int = 1) -> dict[str, list[float]]:
    """Trains the scene model and saves it in fp16.

    Args:
        out: Folder of the checkpoint; replaced when the training is over.
        seed: Seed of the weights and of the scenes.
        recipe: Steps and rates; the default made the shipped checkpoint.
        workers: Processes that render scenes beside the training.

    Returns:
        Stage ("A", "B") -> the loss of every step; in stage B that of the yes/no questions.

    Raises:
        ValueError: `out` exists and is not a checkpoint that may be replaced.
    """
    check_folder(out)
    recipe = recipe or Recipe()
    torch.manual_seed(seed)
    model = build_model()
    _start_positions(model)
    _start_attention(model)
    heads = TowerHeads()
    model.bfloat16().train()
    heads.bfloat16()
    print(f"scenes fit: {model.num_parameters():,} parameters, seed {seed}, {torch.get_num_threads()} threads")
    print(f"{recipe}")
    losses: dict[str, list[float]] = {}
    begin = time.perf_counter()

    losses["A"] = _fit_tower(model, heads, recipe, seed, workers)
    precision = tower_precision(model, heads, seed)
    report_stage("A tower", recipe.tower_steps * recipe.tower_batch, losses["A"], begin, f", mAP {precision:.3f}")
    losses["B"] = _fit_language(model, recipe, seed, workers)
    report_stage("B language", recipe.language_steps * recipe.language_batch, losses["B"], begin)

    save_checkpoint(model, out, {"seed": seed, "recipe": dataclasses.asdict(recipe)})
    print(f"saved in fp16, {sum(file.stat().st_size for file in out.iterdir()) / 1e6:.1f} MB")
    return losses


def check_folder(out: Path) -> None:
    """Raises a ValueError if a folder holds what a checkpoint may not replace."""
    if out.exists() and any(out.iterdir()) and not (out / "fit.json").is_file():
        raise ValueError(
            f"{out} holds other files than a checkpoint: give --out a new or empty folder, or a checkpoint"
        )


def _fit_tower(
    model: LlavaForConditionalGeneration, heads: TowerHeads, recipe: Recipe, seed: int, workers: int
) -> list[float]:
    """Stage A; returns the loss of every step."""
    tower = model.model.vision_tower
    parts = (tower.embeddings, tower.pre_layrnorm, tower.encoder, heads)
    masters = _Masters(parts, recipe.tower_rate, recipe.tower_steps)
    scenes = FitScenes(seed, 0, recipe.tower_steps * recipe.tower_batch, lessons=False)
    losses: list[float] = []
    with tqdm(total=recipe.tower_steps, desc="A tower", unit="step") as progress:
        for batch in scenes.batches(recipe.tower_batch, workers):
            features = visual_features(model, normalised(batch["image"], model.dtype))
            loss = heads.loss(features, batch["labels"], batch["present"])
            masters.step(loss)
            losses.append(loss.item())
            progress.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}", refresh=False)
            progress.update()
    return losses


class TowerHeads(nn.Module):
    """What stage A reads off the tower; not part of the checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.patch = nn.Linear(HIDDEN, len(CATEGORIES) + 1)
        self.image = nn.Linear(HIDDEN, len(CATEGORIES))
        # So the sum over the patches starts at p = .12, about the share of categories that an image shows.
        nn.init.constant_(self.image.bias, -math.log(GRID * GRID) - 2)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 144, d] -> patch logits [B, 144, 41] and image logits [B, 40], both fp32."""
        features = self.norm(features)
        return self.patch(features).float(), self.image(features).float().logsumexp(1)

    def loss(self, features: Tensor, labels: Tensor, present: Tensor) -> Tensor:
        """Patch cross-entropy plus image-level binary cross-entropy."""
        patches, image = self(features)
        per_patch = F.cross_entropy(patches.flatten(0, 1), patch_labels(labels).flatten())
        return per_patch + 2.0 * F.binary_cross_entropy_with_logits(image, present)


@torch.no_grad()
def tower_precision(model: LlavaForConditionalGeneration, heads: TowerHeads, seed: int, count: int = 300) -> float:
    """Mean average precision of the tower's image logits over the categories, on the stream "fit-check"."""
    scenes = [render_scene(seed, "fit-check", i) for i in range(count)]
    images = torch.from_numpy(np.stack([scene.image for scene in scenes]))
    parts = [normalised(part, model.dtype) for part in images.split(50)]
    scores = torch.cat([heads(visual_features(model, part))[1] for part in parts]).numpy()  # [count, 40]
    truth = np.zeros((count, len(CATEGORIES)), dtype=bool)
    for row, scene in enumerate(scenes):
        truth[row, scene.present] = True
    shown = truth.any(0)
    return float(average_precision_score(truth[:, shown], scores[:, shown]))


def _fit_language(model: LlavaForConditionalGeneration, recipe: Recipe, seed: int, workers: int) -> list[float]:
    """Stage B; returns the yes/no loss of every step."""
    steps, batch_size = recipe.language_steps, recipe.language_batch
    names = NameHeads().to(model.dtype)
    parts = (model.model.multi_modal_projector, model.model.language_model, model.lm_head, names)
    masters = _Masters(parts, recipe.language_rate, steps)
    scenes = FitScenes(seed, recipe.tower_steps * recipe.tower_batch, steps * batch_size, lessons=True)
    split = QUESTIONS * QUESTION_LENGTH
    losses: list[float] = []
    right: list[float] = []
    with tqdm(total=steps, desc="B language", unit="step") as progress:
        for step, batch in enumerate(scenes.batches(batch_size, workers)):
            with torch.no_grad():
                features = visual_features(model, normalised(batch["image"], model.dtype))
            projected = model.model.multi_modal_projector(features)  # [B, 144, d]
            states = packed_states(model, projected, batch["text"], TRAIN_LAYOUT)
            logits = model.lm_head(states[-1]).float()
            targets = batch["targets"]
            answers, is_answer = targets[:, :split], targets[:, :split] != IGNORED
            yes_no = F.cross_entropy(logits[:, :split][is_answer], answers[is_answer])
            caption_loss = F.cross_entropy(logits[:, split:].flatten(0, 1), targets[:, split:].flatten())
            early = names.loss(states, answers)
            loss = yes_no + recipe.caption_weight * caption_loss + early
            if (weight := 1 - step / (0.6 * steps)) > 0:
                loss = loss + weight * _alignment(model, projected, batch["labels"])
            masters.step(loss)
            losses.append(yes_no.item())
            # Half of the tokens are "</s>", which is always right.
            right.append(2 * (logits[:, :split].argmax(-1) == answers)[is_answer].float().mean().item() - 1)
            means = {"yes_no": np.mean(losses[-30:]), "right": np.mean(right[-30:]), "early": early.item()}
            means["caption"] = caption_loss.item()
            progress.set_postfix({key: f"{value:.3f}" for key, value in means.items()}, refresh=False)
            progress.update()
    return losses


class NameHeads(nn.Module):
    """Deep supervision of stage B: the answer, read at the asked name after the layers 2 to 4 already."""

    layers = (2, 3, 4)

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Sequential(nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 1)) for _ in self.layers)

    def loss(self, states: list[Tensor], targets: Tensor) -> Tensor:
        """Binary cross-entropy, from states [B, T, d] per layer and targets [B, T] of the questions."""
        words = vocabulary()
        rows, colon = ((targets == words["yes"]) | (targets == words["no"])).nonzero(as_tuple=True)
        present = (targets[rows, colon] == words["yes"]).float()
        name = colon - 6  # behind it: in the image ? ASSISTANT :
        losses = [
            F.binary_cross_entropy_with_logits(head(states[layer][rows, name]).float()[:, 0], present)
            for layer, head in zip(self.layers, self.heads, strict=True)
        ]
        return torch.stack(losses).mean()


def _alignment(model: LlavaForConditionalGeneration, projected: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of projected object patches over the embeddings of the 40 names, by cosine."""
    last_words = torch.tensor([tokenizer()(c.name).input_ids[-1] for c in CATEGORIES])
    names = F.normalize(model.get_input_embeddings()(last_words).float(), dim=-1)  # [40, d]
    target = patch_labels(labels)
    seen = target > 0
    patches = F.normalize(projected[seen].float(), dim=-1)
    return F.cross_entropy(patches @ names.T / 0.1, target[seen] - 1)


def _start_positions(model: LlavaForConditionalGeneration) -> None:
    """Starts the tower's position embedding from sines and cosines of row and column."""
    quarter = HIDDEN // 4
    angle = torch.arange(GRID)[:, None] * torch.exp(-math.log(100.0) * torch.arange(quarter) / quarter)  # [12, d/4]
    axis = torch.cat([angle.sin(), angle.cos()], 1)  # [12, d/2]
    grid = torch.cat([axis[:, None].expand(GRID, GRID, -1), axis[None].expand(GRID, GRID, -1)], -1).flatten(0, 1)
    embedding = cast(nn.Embedding, model.model.vision_tower.embeddings.position_embedding)
    with torch.no_grad():
        embedding.weight[1:] = 0.1 * grid


def _start_attention(model: LlavaForConditionalGeneration) -> None:
    """Starts every language layer with W_q = W_k, orthogonal: a token first looks at tokens like itself.

    This is mimetic initialisation (arXiv 2305.09828). With patches pulled towards the name of what they show, a name
    looks at its patches from the start, which a random start has to discover.
    """
    for layer in model.model.language_model.layers:
        attention = cast(Any, layer).self_attn
        with torch.no_grad():
            shared = torch.empty(HIDDEN, HIDDEN)
            nn.init.orthogonal_(shared)
            attention.q_proj.weight.copy_(shared)
            attention.k_proj.weight.copy_(shared)


class _Masters:
    """Trains low-precision weights through fp32 copies: Muon for hidden matrices, AdamW for everything else.

    Weights in pure bfloat16 are about three times faster than autocast at this size.
    """

    def __init__(self, modules: Sequence[nn.Module], rate: float, steps: int) -> None:
        self._pairs: list[tuple[nn.Parameter, Tensor]] = []
        muon: list[dict[str, Any]] = []
        adam: list[dict[str, Any]] = []
        for module in modules:
            matrices, others = [], []
            for name, weight in module.named_parameters():
                master = weight.detach().float().clone()
                self._pairs.append((weight, master))
                hidden = master.ndim == 2 and "layers." in name
                (matrices if hidden else others).append(master)
            if matrices:
                muon.append({"params": matrices, "lr": rate})
            adam.append({"params": others, "lr": rate})
        self._optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(adam, betas=(0.9, 0.98), weight_decay=0.01)]
        if muon:
            self._optimizers.append(torch.optim.Muon(muon, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"))
        warm = max(1, min(100, steps // 10))

        def rate_at(step: int) -> float:
            return min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / steps)))

        self._schedules = [torch.optim.lr_scheduler.LambdaLR(o, rate_at) for o in self._optimizers]

    def step(self, loss: Tensor) -> None:
        """One step down the gradient of a loss, clipped to norm 1."""
        loss.backward()
        for weight, master in self._pairs:
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        nn.utils.clip_grad_norm_([master for _, master in self._pairs], 1.0)
        for optimizer in self._optimizers:
            optimizer.step()
        for schedule in self._schedules:
            schedule.step()
        with torch.no_grad():
            for weight, master in self._pairs:
                weight.copy_(master)


def save_checkpoint(model: SceneModel, out: Path, provenance: dict[str, Any], processor: Any = None) -> None:
    """Writes model (fp16) and processor in the form that `from_pretrained` reads, and moves the whole folder in."""
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    model.half().save_pretrained(fresh)
    (processor or build_processor()).save_pretrained(fresh)
    (fresh / "fit.json").write_text(json.dumps({**provenance, "torch": torch.__version__}, indent=1) + "\n")
    fresh.chmod(0o755)
    for file in fresh.iterdir():
        file.chmod(0o644)  # safetensors writes 0600
    replace_folder(fresh, out)


def report_stage(stage: str, images: int, losses: list[float], begin: float, more: str = "") -> None:
    """Prints what a stage took, and its loss at its start and end."""
    first, last = np.mean(losses[:20]), np.mean(losses[-100:])
    minutes = (time.perf_counter() - begin) / 60
    print(
        f"{stage}: {len(losses):,} steps, {images:,} images, loss {first:.3f} -> {last:.3f}{more}, "
        f"{minutes:.1f} min so far",
        flush=True,
    )
