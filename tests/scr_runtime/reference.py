"""The naive reference: eager attention matrices and Python loops, written from the paper's text (arXiv 2602.22469).

It shares no code with scr_runtime. The maker of a prompt says where its patches are.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scr_runtime import PredictorConfig, SCRConfig, SourcePredictor

IMAGE_TOKEN = 99


class Image(NamedTuple):
    """The patches of one image: batch row, their positions in row-major order, and the grid."""

    row: int
    positions: list[int]
    grid: tuple[int, int]


def reference_images(model: Any, inputs: dict[str, Tensor]) -> list[Image]:
    """The images of a LLaVA-1.5 prompt."""
    vision = model.config.vision_config
    side = vision.image_size // vision.patch_size
    skip = int(model.config.vision_feature_select_strategy == "full")
    found = []
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        places = [place for place, token in enumerate(ids) if token == IMAGE_TOKEN]
        for start in range(0, len(places), side**2 + skip):
            found.append(Image(row, places[start + skip : start + skip + side**2], (side, side)))
    return found


def decoder_blocks(model: Any) -> Any:
    if hasattr(model, "transformer"):
        return model.transformer.h
    return getattr(model.model, "language_model", model.model).layers


def eager_copy(model: Any) -> Any:
    model = copy.deepcopy(model)
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    return model


def reference_maps(
    model: Any,
    inputs: dict[str, Tensor],
    config: SCRConfig,
    prompt_length: int | None = None,
    images: list[Image] | None = None,
    visual: Tensor | None = None,
) -> list[Tensor]:
    """Attention maps from whole eager attention matrices, one [N] per image."""
    with torch.no_grad():
        attentions = eager_copy(model)(**inputs, output_attentions=True).attentions
    first, last = config.attention_layers
    mean = torch.stack(attentions[first : last + 1]).mean((0, 2))  # [B, S, S]
    visual = inputs["input_ids"] == IMAGE_TOKEN if visual is None else visual
    end = inputs["input_ids"].shape[1] if prompt_length is None else prompt_length
    maps = []
    for row, positions, _ in reference_images(model, inputs) if images is None else images:
        queries = [
            place
            for place in range(positions[-1] + 1, end)
            if inputs["attention_mask"][row, place] and not visual[row, place]
        ]
        maps.append(mean[row][queries][:, positions].mean(0))
    return maps


def reference_sources(
    attention: Tensor, config: SCRConfig, grid: tuple[int, int] | None = None, k: int | None = None
) -> list[int]:
    rows, columns = grid or (int(len(attention) ** 0.5),) * 2
    candidates = [
        (-float(value), index)
        for index, value in enumerate(attention)
        if not config.exclude_border or (0 < index // columns < rows - 1 and 0 < index % columns < columns - 1)
    ]
    k = min(config.num_sources if k is None else k, max(len(candidates) // 2, 1))
    ranked = [index for _, index in sorted(candidates)]
    return sources_apart(ranked, columns, config.connectivity)[:k] if config.suppress_claimed else ranked[:k]


def sources_apart(ranked: list[int], columns: int, connectivity: int) -> list[int]:
    """Decision D7's other reading, patch after patch: who is next to an earlier source comes after all who are not."""
    free: list[int] = []
    for patch in ranked:
        steps = [(abs(patch // columns - s // columns), abs(patch % columns - s % columns)) for s in free]
        if all(max(step) > 1 or (connectivity == 4 and sum(step) > 1) for step in steps):
            free.append(patch)
    return free + [patch for patch in ranked if patch not in free]


def reference_edit(hidden: Tensor, image: Image, sources: list[int], config: SCRConfig) -> None:
    """Eq. (1), source after source in descending attention; claimed neighbours stay claimed."""
    rows, columns = image.grid
    positions = image.positions
    before = hidden.clone()
    taken = set(sources)
    for source in sources:
        for row in range(source // columns - 1, source // columns + 2):
            for column in range(source % columns - 1, source % columns + 2):
                near = abs(row - source // columns) + abs(column - source % columns)
                index = row * columns + column
                if not (0 <= row < rows and 0 <= column < columns) or index in taken:
                    continue
                if config.connectivity == 4 and near != 1:
                    continue
                taken.add(index)
                hidden[positions[index]] += (config.strength - 1) * before[positions[source]]
        hidden[positions[source]] = before[positions[source]] / config.strength


def reference_logits(
    model: Any,
    inputs: dict[str, Tensor],
    config: SCRConfig,
    sources: list[list[int]] | None = None,
    prompt_length: int | None = None,
    images: list[Image] | None = None,
    visual: Tensor | None = None,
) -> tuple[Tensor, list[list[int]]]:
    """Two whole passes: eager maps, then a forward whose blocks are followed by loops."""
    eager = eager_copy(model)
    images = reference_images(model, inputs) if images is None else images
    if sources is None:
        maps = reference_maps(model, inputs, config, prompt_length, images, visual)
        sources = [reference_sources(a, config, image.grid) for a, image in zip(maps, images, strict=True)]

    def edit(module: Any, args: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        for image, chosen in zip(images, sources, strict=True):
            reference_edit(hidden[image.row], image, chosen, config)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    for layer in range(config.edit_layers[0], config.edit_layers[1] + 1):
        decoder_blocks(eager)[layer].register_forward_hook(edit)
    with torch.no_grad():
        return eager(**inputs).logits, sources


def reference_greedy(
    model: Any,
    inputs: dict[str, Tensor],
    config: SCRConfig,
    steps: int,
    images: list[Image] | None = None,
    visual: Tensor | None = None,
) -> Tensor:
    """Greedy decoding by whole forward passes over a growing prompt, with the sources of the first."""
    prompt = inputs["input_ids"].shape[1]
    images = reference_images(model, inputs) if images is None else images
    current, sources = dict(inputs), None
    for _ in range(steps):
        logits, sources = reference_logits(model, current, config, sources, prompt, images, visual)
        token = logits[:, -1].argmax(-1, keepdim=True)
        current["input_ids"] = torch.cat([current["input_ids"], token], 1)
        current["attention_mask"] = torch.cat([current["attention_mask"], torch.ones_like(token)], 1)
        if "mm_token_type_ids" in current:
            current["mm_token_type_ids"] = torch.cat([current["mm_token_type_ids"], torch.zeros_like(token)], 1)
    return current["input_ids"]


def kept(inputs: dict[str, Tensor], logits: Tensor) -> Tensor:
    return logits[inputs["attention_mask"].bool()]


def hook_count(model: torch.nn.Module) -> int:
    tables = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_always_called",
        "_forward_hooks_with_kwargs",
    )
    return sum(len(getattr(module, table)) for module in model.modules() for table in tables)


def make_predictor(model: Any, seed: int = 0, **kwargs: Any) -> SourcePredictor:
    """A random predictor with every kind of feature."""
    torch.manual_seed(seed)
    size = getattr(model.config, "text_config", model.config).hidden_size
    settings: dict[str, Any] = {"rank": 8, "width": 16, "context": "both"} | kwargs
    return SourcePredictor(PredictorConfig(size, **settings)).eval()
