"""Trains the scene model from nothing, with a fixed number of steps and a seed, and measures it as POPE does.

Two stages:

A. the vision tower alone: which category is seen in each patch, and which are in the image at all;
B. the tower is frozen; projector and language model learn yes/no questions and captions.

In stage B the categories that are asked about in vain are drawn from all absent ones, most of them from other
contexts. So what usually stands together is a good guess, and the model keeps it as a prior beside what it sees:
that is where its hallucinations come from.

All questions of an image share one visual prefix: they are packed as branches behind it, each of which sees
the prefix and itself (`PackedLayout`). That is the same computation as one question at a time, on
less than a fifth of the tokens.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from scenes.categories import CATEGORIES
from scenes.model import (
    CAPTION_QUESTIONS,
    GRID,
    HIDDEN,
    PATCH,
    build_model,
    build_processor,
    build_tokenizer,
    chat,
    vocabulary,
    yes_no_question,
)
from scenes.world import Scene, caption, render_scene

QUESTIONS = 10  # yes/no questions packed behind one image
POSITIVES = 4  # of them at most so many about a category that is present
_QUESTION_LENGTH = 13  # tokens from "Is" to "</s>", with a name of two words
_CAPTION_LENGTH = 40
_IGNORED = -100


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what comes out, besides the seed."""

    tower_steps: int = 400
    """Steps of stage A."""
    tower_batch: int = 64
    """Images a step in stage A."""
    tower_rate: float = 3e-3
    """Peak learning rate of stage A."""
    language_steps: int = 600
    """Steps of stage B."""
    language_batch: int = 8
    """Images a step in stage B, each with `QUESTIONS` questions and a caption."""
    language_rate: float = 3e-3
    """Peak learning rate of stage B."""
    caption_weight: float = 0.5
    """Weight of the caption loss beside the yes/no loss."""

    def scaled(self, factor: float) -> Recipe:
        """The same recipe with `factor` times the steps, at least 2 in each stage."""
        if factor <= 0:
            raise ValueError(f"steps scale {factor}: give a number greater than 0, such as 0.5")
        steps = {name: max(2, round(getattr(self, name) * factor)) for name in ("tower_steps", "language_steps")}
        return Recipe(**{**self.__dict__, **steps})


# -- packing ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackedLayout:
    """Where the tokens of a packed row stand: "USER: <image>" x 144, then branches of fixed lengths.

    Each branch is padded at its end; a pad is behind everything that is read, so it needs no mask of its own.
    """

    branches: tuple[int, ...]
    """Length of each branch in tokens."""

    @property
    def prefix(self) -> int:
        """Tokens before the first branch."""
        return 2 + GRID * GRID

    def position_ids(self) -> Tensor:
        """[1, L]: every branch counts on from the prefix."""
        parts = [torch.arange(self.prefix)]
        parts += [torch.arange(self.prefix, self.prefix + length) for length in self.branches]
        return torch.cat(parts)[None]

    def mask(self, dtype: torch.dtype) -> Tensor:
        """[1, 1, L, L], 0 where a query may look: causal, and never into another branch."""
        owner = torch.cat(
            [torch.zeros(self.prefix)] + [torch.full((n,), i + 1.0) for i, n in enumerate(self.branches)]
        )
        same = (owner[:, None] == owner[None]) | (owner[None] == 0)
        allowed = same & torch.ones(len(owner), len(owner), dtype=torch.bool).tril()
        return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)[None, None]


@lru_cache(maxsize=8)
def _layout_tensors(layout: PackedLayout, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return layout.position_ids(), layout.mask(dtype)


TRAIN_LAYOUT = PackedLayout((_QUESTION_LENGTH,) * QUESTIONS + (_CAPTION_LENGTH,))


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    return build_tokenizer()


@lru_cache(maxsize=4096)
def _branch(question: str, answer: str, length: int) -> tuple[list[int], list[int]]:
    """Token ids and labels of one branch; a label is the token that follows, if it is an answer's."""
    asked = _tokenizer()(f"{question} ASSISTANT:").input_ids
    told = _tokenizer()(f"{answer}</s>").input_ids if answer else []
    ids = (asked + told)[:length]
    labels = ([_IGNORED] * (len(asked) - 1) + told)[:length]
    pad = _tokenizer().pad_token_id
    return ids + [pad] * (length - len(ids)), labels + [_IGNORED] * (length - len(labels))


def visual_features(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """The tower's patch states [B, 144, d] as the projector sees them, from pixels [B, 3, 96, 96]."""
    tower = model.model.vision_tower
    return tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-1][:, 1:]


def packed_hidden(
    model: LlavaForConditionalGeneration, projected: Tensor, text: Tensor, layout: PackedLayout
) -> list[Tensor]:
    """States of all branches of a batch in one pass.

    Args:
        model: The scene model.
        projected: [B, 144, d] projected patches.
        text: [B, sum of branch lengths] token ids of the branches.
        layout: Where the branches stand.

    Returns:
        After the embedding and after each layer, the last one normed: [B, sum of branch lengths, d].
    """
    embed = model.get_input_embeddings()
    words = vocabulary()
    start = embed(torch.tensor([[words["USER"], words[":"]]])).expand(len(text), -1, -1)
    row = torch.cat([start, projected, embed(text)], dim=1)  # [B, L, d]
    position_ids, mask = _layout_tensors(layout, row.dtype)
    states = model.model.language_model(
        inputs_embeds=row,
        attention_mask=mask,
        position_ids=position_ids,
        use_cache=False,
        output_hidden_states=True,
    ).hidden_states
    return [state[:, layout.prefix :] for state in states]


def packed_logits(
    model: LlavaForConditionalGeneration, projected: Tensor, text: Tensor, layout: PackedLayout
) -> Tensor:
    """Logits of all branches, [B, sum of branch lengths, vocabulary]; see `packed_hidden`."""
    return model.lm_head(packed_hidden(model, projected, text, layout)[-1])


# -- data ------------------------------------------------------------------------------------------


class _Scenes(Dataset[dict[str, Tensor]]):
    """Fresh scenes of the stream "fit", with packed questions and captions where `lessons`."""

    def __init__(self, seed: int, start: int, count: int, lessons: bool) -> None:
        self._seed, self._start, self._count, self._lessons = seed, start, count, lessons

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        index = self._start + item
        scene = render_scene(self._seed, "fit", index)
        present = torch.zeros(len(CATEGORIES))
        present[scene.present] = 1.0
        sample = {
            "image": torch.from_numpy(scene.image),  # [96, 96, 3] uint8
            "labels": torch.from_numpy(scene.labels),  # [96, 96] uint8
            "present": present,  # [40]
        }
        if self._lessons:
            rng = np.random.default_rng([self._seed, 1_000, index])
            sample["text"], sample["targets"] = _lesson(scene, rng)
        return sample


def _lesson(scene: Scene, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Token ids and labels of one image's branches in `TRAIN_LAYOUT`, each [sum of branch lengths]."""
    present = scene.present
    absent = [i for i in range(len(CATEGORIES)) if i not in present]
    asked = [(int(i), "yes") for i in rng.permutation(present)[:POSITIVES]]
    asked += [(int(i), "no") for i in rng.permutation(absent)[: QUESTIONS - len(asked)]]
    branches = [_branch(yes_no_question(CATEGORIES[i].name), answer, _QUESTION_LENGTH) for i, answer in asked]
    prompt = CAPTION_QUESTIONS[int(rng.random() < 0.25)]
    branches.append(_branch(prompt, caption(scene), _CAPTION_LENGTH))
    ids, labels = (torch.tensor(list(chain.from_iterable(part))) for part in zip(*branches, strict=True))
    return ids, labels


def _batches(
    seed: int, start: int, steps: int, batch: int, lessons: bool, workers: int
) -> Iterator[dict[str, Tensor]]:
    data = _Scenes(seed, start, steps * batch, lessons)
    return iter(DataLoader(data, batch_size=batch, num_workers=workers, prefetch_factor=4 if workers else None))


def _pixels(image: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 96, 96, 3] uint8 -> [B, 3, 96, 96] from -1 to 1, as the processor gives them."""
    return ((image.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5).to(dtype)


def patch_labels(labels: Tensor) -> Tensor:
    """[B, 96, 96] -> [B, 144]: the category (from 1) seen most in a patch, 0 if under a fifth."""
    rows = labels.long().unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).reshape(len(labels), GRID * GRID, -1)
    counts = torch.zeros(*rows.shape[:2], len(CATEGORIES) + 1, dtype=torch.int16)
    counts.scatter_add_(2, rows, torch.ones_like(rows, dtype=torch.int16))
    most, category = counts[..., 1:].max(-1)
    return torch.where(most >= PATCH * PATCH // 5, category + 1, 0)


# -- optimisation ----------------------------------------------------------------------------------


class _Masters:
    """Trains low-precision weights through fp32 copies: Muon for hidden matrices, AdamW for everything else.

    Weights in pure bfloat16 are about three times faster than autocast at this size.
    """

    def __init__(self, groups: list[tuple[nn.Module, float]], steps: int) -> None:
        self._pairs: list[tuple[nn.Parameter, Tensor]] = []
        muon: list[dict[str, Any]] = []
        adam: list[dict[str, Any]] = []
        for module, rate in groups:
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


def _fit_tower(
    model: LlavaForConditionalGeneration, heads: TowerHeads, recipe: Recipe, seed: int, workers: int
) -> list[float]:
    """Stage A; gives the loss of every step."""
    tower = model.model.vision_tower
    masters = _Masters(
        [
            (tower.embeddings, recipe.tower_rate),
            (tower.pre_layrnorm, recipe.tower_rate),
            (tower.encoder, recipe.tower_rate),
            (heads, recipe.tower_rate),
        ],
        recipe.tower_steps,
    )
    losses: list[float] = []
    with tqdm(total=recipe.tower_steps, desc="A tower", unit="step") as progress:
        for batch in _batches(seed, 0, recipe.tower_steps, recipe.tower_batch, False, workers):
            features = visual_features(model, _pixels(batch["image"], model.dtype))
            loss = heads.loss(features, batch["labels"], batch["present"])
            masters.step(loss)
            losses.append(loss.item())
            progress.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}", refresh=False)
            progress.update()
    return losses


def _alignment(model: LlavaForConditionalGeneration, projected: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of projected object patches over the embeddings of the 40 names, by cosine."""
    last_words = torch.tensor([_tokenizer()(c.name).input_ids[-1] for c in CATEGORIES])
    names = F.normalize(model.get_input_embeddings()(last_words).float(), dim=-1)  # [40, d]
    target = patch_labels(labels)
    seen = target > 0
    patches = F.normalize(projected[seen].float(), dim=-1)
    return F.cross_entropy(patches @ names.T / 0.1, target[seen] - 1)


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


def _fit_language(model: LlavaForConditionalGeneration, recipe: Recipe, seed: int, workers: int) -> list[float]:
    """Stage B; gives the yes/no loss of every step."""
    steps, batch_size, rate = recipe.language_steps, recipe.language_batch, recipe.language_rate
    names = NameHeads().to(model.dtype)
    parts = (model.model.multi_modal_projector, model.model.language_model, model.lm_head, names)
    masters = _Masters([(part, rate) for part in parts], steps)
    start = recipe.tower_steps * recipe.tower_batch
    split = QUESTIONS * _QUESTION_LENGTH
    losses: list[float] = []
    right: list[float] = []
    with tqdm(total=steps, desc="B language", unit="step") as progress:
        for step, batch in enumerate(_batches(seed, start, steps, batch_size, True, workers)):
            with torch.no_grad():
                features = visual_features(model, _pixels(batch["image"], model.dtype))
            projected = model.model.multi_modal_projector(features)  # [B, 144, d]
            states = packed_hidden(model, projected, batch["text"], TRAIN_LAYOUT)
            logits = model.lm_head(states[-1]).float()
            targets = batch["targets"]
            answers, told = targets[:, :split], targets[:, :split] != _IGNORED
            yes_no = F.cross_entropy(logits[:, :split][told], answers[told])
            caption_loss = F.cross_entropy(logits[:, split:].flatten(0, 1), targets[:, split:].flatten())
            early = names.loss(states, answers)
            loss = yes_no + recipe.caption_weight * caption_loss + early
            if (weight := 1 - step / (0.6 * steps)) > 0:
                loss = loss + weight * _alignment(model, projected, batch["labels"])
            masters.step(loss)
            losses.append(yes_no.item())
            # Half of the tokens are "</s>", which is always right.
            right.append(2 * (logits[:, :split].argmax(-1) == answers)[told].float().mean().item() - 1)
            means = {"yes_no": np.mean(losses[-30:]), "right": np.mean(right[-30:]), "early": early.item()}
            means["caption"] = caption_loss.item()
            progress.set_postfix({key: f"{value:.3f}" for key, value in means.items()}, refresh=False)
            progress.update()
    return losses


def fit(out: Path, seed: int = 0, recipe: Recipe | None = None, check: int = 500, workers: int = 1) -> dict[str, Any]:
    """Trains the scene model, saves it in fp16, loads it again and measures it.

    Args:
        out: Folder of the checkpoint; replaced when the training is over.
        seed: Seed of the weights and of the scenes.
        recipe: Steps and rates; the default made the shipped checkpoint.
        check: Held-out images of the evaluation.
        workers: Processes that render scenes beside the training.

    Returns:
        {"losses": {stage: [loss of every step]}, "rows": of `evaluate`, "captions": of `evaluate_captions`}.

    Raises:
        ValueError: `out` exists and is not a checkpoint that may be replaced.
    """
    if out.exists() and any(out.iterdir()) and not (out / "fit.json").is_file():
        raise ValueError(
            f"{out} holds other files than a checkpoint: give --out a new or empty folder, or a checkpoint"
        )
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
    _tell("A tower", recipe.tower_steps * recipe.tower_batch, losses["A"], begin, f", mAP {precision:.3f}")
    losses["B"] = _fit_language(model, recipe, seed, workers)
    _tell("B language", recipe.language_steps * recipe.language_batch, losses["B"], begin)

    save_checkpoint(model, out, {"seed": seed, "recipe": recipe.__dict__})
    size = sum(file.stat().st_size for file in out.iterdir()) / 1e6
    print(f"saved in fp16, {size:.1f} MB; the figures below are of the saved model, loaded again, run in fp32")
    rows, captions = evaluate_checkpoint(out, seed, check)
    return {"losses": losses, "rows": rows, "captions": captions}


def _tell(stage: str, images: int, losses: list[float], begin: float, more: str = "") -> None:
    first, last = np.mean(losses[:20]), np.mean(losses[-100:])
    minutes = (time.perf_counter() - begin) / 60
    print(
        f"{stage}: {len(losses):,} steps, {images:,} images, loss {first:.3f} -> {last:.3f}{more}, "
        f"{minutes:.1f} min so far",
        flush=True,
    )


def save_checkpoint(model: LlavaForConditionalGeneration, out: Path, provenance: dict[str, Any]) -> None:
    """Writes model (fp16) and processor in the form that `from_pretrained` reads, and swaps the folder in."""
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    model.half().save_pretrained(fresh)
    build_processor().save_pretrained(fresh)
    (fresh / "fit.json").write_text(json.dumps({**provenance, "torch": torch.__version__}, indent=1) + "\n")
    fresh.chmod(0o755)
    for file in fresh.iterdir():
        file.chmod(0o644)  # safetensors writes 0600
    retired = out.with_name(f".{out.name}.retired")
    shutil.rmtree(retired, ignore_errors=True)
    if out.exists():
        out.rename(retired)
    fresh.rename(out)
    shutil.rmtree(retired, ignore_errors=True)


# -- evaluation ------------------------------------------------------------------------------------


@torch.no_grad()
def tower_precision(model: LlavaForConditionalGeneration, heads: TowerHeads, seed: int, count: int = 300) -> float:
    """Mean average precision of the tower's image logits over the categories, on the stream "fit-check"."""
    scenes = [render_scene(seed, "fit-check", i) for i in range(count)]
    images = torch.from_numpy(np.stack([scene.image for scene in scenes]))
    scores = torch.cat([heads(visual_features(model, _pixels(part, model.dtype)))[1] for part in images.split(50)])
    truth = torch.zeros(count, len(CATEGORIES))
    for row, scene in enumerate(scenes):
        truth[row, scene.present] = 1
    precisions = []
    for category in range(len(CATEGORIES)):
        ranked = truth[scores[:, category].argsort(descending=True), category]
        if ranked.sum() > 0:
            at = ranked.cumsum(0) / torch.arange(1, count + 1)
            precisions.append(float((at * ranked).sum() / ranked.sum()))
    return float(np.mean(precisions))


def pope_questions(scenes: list[Scene], seed: int) -> list[dict[str, list[int]]]:
    """POPE's questions for scenes with at least three categories (arXiv 2305.10355).

    Args:
        scenes: The scenes; frequency and co-occurrence are counted over them.
        seed: Seed of the draw.

    Returns:
        Per scene the category indices to ask about: "positive" (3 that are present) and, absent from
        it, 3 each of "random", "popular" (the most frequent) and "adversarial" (those that stand most often
        beside a positive one).
    """
    count = len(CATEGORIES)
    together = np.zeros((count, count))
    for scene in scenes:
        together[np.ix_(scene.present, scene.present)] += 1
    frequency = together.diagonal().copy()
    np.fill_diagonal(together, -1)
    rng = np.random.default_rng([seed, 2_000])
    questions = []
    for scene in scenes:
        absent = [i for i in range(count) if i not in scene.present]
        positive = [int(i) for i in rng.permutation(scene.present)[:3]]
        adversarial: list[int] = []
        for known in positive:
            adversarial.append(
                max((i for i in absent if i not in adversarial), key=lambda i: (together[known, i], -i))
            )
        popular = sorted(absent, key=lambda i: (-frequency[i], i))[:3]
        drawn = [int(i) for i in rng.permutation(absent)[:3]]
        questions.append({"positive": positive, "random": drawn, "popular": popular, "adversarial": adversarial})
    return questions


@torch.no_grad()
def evaluate(model: LlavaForConditionalGeneration, seed: int, count: int) -> list[dict[str, float | str]]:
    """POPE-like figures on `count` scenes of the stream "fit-check", which no stage was trained on.

    Returns:
        One row for each of random, popular, adversarial: accuracy, hr = FP / (FP + TN), tpr, yes (share of
        answers), auc.
    """
    scenes: list[Scene] = []
    index = 0
    while len(scenes) < count:
        scene = render_scene(seed, "fit-check", index)
        index += 1
        if len(scene.present) >= 3:
            scenes.append(scene)
    asked = pope_questions(scenes, seed)
    kinds = ("positive", "random", "popular", "adversarial")
    layout = PackedLayout((_QUESTION_LENGTH,) * 3 * len(kinds))
    words = vocabulary()
    margins: list[Tensor] = []
    for begin in tqdm(range(0, count, 20), desc="evaluate", unit="batch"):
        images = torch.from_numpy(np.stack([scene.image for scene in scenes[begin : begin + 20]]))
        rows, places = [], []
        for questions in asked[begin : begin + 20]:
            named = [CATEGORIES[i].name for kind in kinds for i in questions[kind]]
            branches = [_branch(yes_no_question(name), "no", _QUESTION_LENGTH) for name in named]
            rows.append([token for ids, _ in branches for token in ids])
            places.append([n * _QUESTION_LENGTH + labels.index(words["no"]) for n, (_, labels) in enumerate(branches)])
        projected = model.model.multi_modal_projector(visual_features(model, _pixels(images, model.dtype)))
        logits = packed_logits(model, projected, torch.tensor(rows), layout)
        at = torch.tensor(places)  # [B, 12]
        answers = logits.gather(1, at[..., None].expand(-1, -1, logits.shape[-1])).float()
        margins.append(answers[..., words["yes"]] - answers[..., words["no"]])
    margin = torch.cat(margins).view(count, len(kinds), 3)
    positive = margin[:, 0].flatten()
    result: list[dict[str, float | str]] = []
    for number, kind in enumerate(kinds[1:], start=1):
        negative = margin[:, number].flatten()
        tpr, hr = float((positive > 0).float().mean()), float((negative > 0).float().mean())
        above = (positive[:, None] > negative[None]).float().mean() + (
            positive[:, None] == negative[None]
        ).float().mean() / 2
        result.append(
            {
                "split": kind,
                "questions": 6 * count,
                "accuracy": (tpr + 1 - hr) / 2,
                "hr": hr,
                "tpr": tpr,
                "yes": (tpr + hr) / 2,
                "auc": float(above),
            }
        )
    return result


def _load(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def evaluate_captions(folder: Path, seed: int, count: int) -> dict[str, float]:
    """Greedy captions of held-out scenes by processor and `generate`: CHAIR (arXiv 1809.02156) and recall."""
    model = _load(folder)
    processor = AutoProcessor.from_pretrained(folder)
    scenes = [render_scene(seed, "fit-check", index) for index in range(count)]
    said = wrong = bad = found = there = 0
    for begin in tqdm(range(0, count, 50), desc="captions", unit="batch"):
        part = scenes[begin : begin + 50]
        images = [Image.fromarray(scene.image) for scene in part]
        inputs = processor(images=images, text=[chat(CAPTION_QUESTIONS[0])] * len(part), return_tensors="pt")
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=48)
        texts = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for scene, text in zip(part, texts, strict=True):
            named = {i for i, category in enumerate(CATEGORIES) if f" {category.name}" in f" {text}"}
            truth = set(scene.present)
            said, wrong, bad = said + len(named), wrong + len(named - truth), bad + bool(named - truth)
            found, there = found + len(named & truth), there + len(truth)
    return {
        "chair_s": bad / count,
        "chair_i": wrong / max(said, 1),
        "recall": found / there,
        "said": said / count,
    }


def evaluate_checkpoint(folder: Path, seed: int, count: int) -> tuple[list[dict[str, float | str]], dict[str, float]]:
    """Loads a checkpoint through the Auto classes, measures it, prints the tables and gives them back."""
    model = _load(folder)
    rows = evaluate(model, seed, count)
    print(f"\nYes/no questions as in POPE, {count} held-out scenes x 6 questions a split, greedy")
    print(f"{'split':12}{'accuracy':>10}{'HR':>8}{'TPR':>8}{'yes':>8}{'AUC':>8}")
    for row in rows:
        print(
            f"{row['split']:12}{row['accuracy']:10.3f}"
            + "".join(f"{row[k]:8.3f}" for k in ("hr", "tpr", "yes", "auc"))
        )
    captions = evaluate_captions(folder, seed, min(count, 300))
    print(
        f"\nCaptions of {min(count, 300)} held-out scenes, greedy, at most 48 tokens: "
        f"CHAIR-s {captions['chair_s']:.3f}, CHAIR-i {captions['chair_i']:.3f}, "
        f"recall {captions['recall']:.3f}, {captions['said']:.1f} objects named"
    )
    return rows, captions
