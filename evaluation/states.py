"""Hidden states of a few images under every method: what is kept of two-pass's edit, norms, and the strongest edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from tqdm import tqdm

from evaluation.asking import Asker, Run, Task, by_image
from evaluation.batches import Batch, make_batch, make_batches, make_blocks
from evaluation.decoding import Decoding, yes_no_tokens
from evaluation.edits import SourceEdit, edited
from evaluation.fidelity import Kept, Sensitivity, kept, run_states, sensitivity
from evaluation.maps import BlockMaps, capture_maps, two_pass
from evaluation.methods import TWO_PASS, FromMap, Method, Predicted
from evaluation.questions import Item, Quiz
from evaluation.settings import EvaluationSettings
from scr_runtime import SourcePredictor
from scr_runtime.diagnostic import residual_stream
from scr_runtime.families import blocks_of

_STRONGEST = 2.0  # the largest strength that SCRConfig takes


@dataclass
class States:
    """What the hidden states say.

    Attributes:
        kept: Method -> per image, what it keeps of two-pass's edit.
        strongest: How far the model feels the strongest legal edit, over all blocks.
        norms: (method, part) -> mean norm behind each block, for vanilla and two-pass; part is sources, neighbours or
            rest.
        norm_attention: Mean rank correlation, over images, of a patch's state norm and its attention.
        norm_overlap: Mean share of two-pass's sources that are among the K patches of largest norm.
        grids: Grids of the images.
    """

    kept: dict[str, list[Kept]] = field(default_factory=dict[str, list[Kept]])
    strongest: Sensitivity | None = None
    norms: dict[tuple[str, str], list[float]] = field(default_factory=dict[tuple[str, str], list[float]])
    norm_attention: float = float("nan")
    norm_overlap: float = float("nan")
    grids: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])


def compare_states(
    asker: Asker,
    template: str,
    quiz: Quiz,
    methods: Sequence[Method],
    predictors: Mapping[str, SourcePredictor],
    settings: EvaluationSettings,
) -> States | None:
    """Runs one question of some images under every method, and compares what lies behind the last edited block.

    Args:
        asker: The model.
        template: Of the prompt, with {question} in it.
        quiz: The questions.
        methods: Rows of the tables.
        predictors: By name.
        settings: How many images.

    Returns:
        `None` without two-pass, which everything is compared with.
    """
    wanted = [method for method in methods if isinstance(method.entry.run, FromMap | Predicted)]
    if not any(method.name == TWO_PASS for method in wanted):
        return None
    firsts = {item.image: item for item in reversed(quiz.items)}
    items = [Item(name, firsts[name].text) for name in quiz.images[: settings.fidelity_images]]
    quiet = Task("states", items, template, Decoding("margin", 1, margins=False))
    run = Run(asker, quiet, [], predictors)
    found, strong = States(), list[tuple[float, float]]()
    overlaps: list[tuple[float, float]] = []
    blocks = make_blocks(items, template)
    with tqdm(total=len(items), desc="compare states", unit="image", disable=None) as progress:
        for rows in blocks:
            batches = [
                make_batch(asker.model, asker.processor, asker.pictures, own)
                for own in make_batches(rows, asker.batch_size)
            ]
            maps: dict[int, Any] = {}
            for batch in batches:
                captured = capture_maps(asker.model, asker.scr, batch)
                maps |= dict(zip((row.item for row in batch.rows), captured, strict=True))
            block = BlockMaps(rows, [maps[row.item] for row in rows], asker.scr, asker.seed)
            for batch in batches:
                _compare(run, wanted, batch, block, found)
                strong += _strongest(asker, batch, block)
                overlaps += _overlaps(batch, block)
                progress.update(len(batch.rows))
            if rows is blocks[0]:
                found.norms = _norms(run, next(m for m in wanted if m.name == TWO_PASS), batches[0], block)
    vanilla, edited_margins = np.array(strong).T
    layers = (asker.scr.state_layer, len(blocks_of(asker.model)) - 1)
    found.strongest = sensitivity(vanilla, edited_margins, _STRONGEST, layers)
    found.norm_attention, found.norm_overlap = (float(np.nanmean(values)) for values in zip(*overlaps, strict=True))
    return found


def _compare(run: Run, methods: Sequence[Method], batch: Batch, block: BlockMaps, found: States) -> None:
    model = run.asker.model
    two_pass_method = next(method for method in methods if method.name == TWO_PASS)

    def states(method: Method | None, last: int) -> Any:
        applied = nullcontext() if method is None else run.context(method, batch, block)
        return run_states(model, batch.prompts, last, applied, batch)

    known = {}  # last edited block -> vanilla's and two-pass's states behind it
    for method in methods:
        last = run.edit_layers(method)[1]
        if last not in known:
            known[last] = states(None, last), states(two_pass_method, last)
        vanilla, two = known[last]
        mine = two if method is two_pass_method else states(method, last)
        found.kept.setdefault(method.name, []).extend(kept(vanilla, two, mine))
    grid_of = {image: group.grid for group in batch.layout.groups for image in group.images}
    found.grids += [grid_of[image] for images in batch.images for image in images]


@torch.no_grad()
def _strongest(asker: Asker, batch: Batch, block: BlockMaps) -> list[tuple[float, float]]:
    """Per row, the yes margin of vanilla and of two-pass at the strongest legal edit over all blocks."""
    yes, no = yes_no_tokens(asker.processor.tokenizer)
    scr = replace(asker.scr, strength=_STRONGEST)
    layers = (scr.state_layer, len(blocks_of(asker.model)) - 1)
    act = SourceEdit(batch.layout, by_image(_sources(batch, block), batch.images), scr)
    length = batch.capture[0]["input_ids"].shape[1]
    margins: list[list[float]] = []
    for context in (nullcontext(), edited(asker.model, layers, length, act)):
        with context:
            logits = asker.model(**batch.prompts.inputs, logits_to_keep=1).logits[:, -1].float()
        margins.append((logits[:, yes].amax(-1) - logits[:, no].amax(-1)).tolist())
    return list(zip(*margins, strict=True))


def _sources(batch: Batch, block: BlockMaps) -> list[list[list[int]]]:
    return [[two_pass(block, at, n) for n in range(len(block.maps[at]))] for at in block.places(batch.rows)]


def _overlaps(batch: Batch, block: BlockMaps) -> list[tuple[float, float]]:
    """Per image, the rank correlation of norms and attention, and the share of sources of largest norm."""
    found: list[tuple[float, float]] = []
    for at in block.places(batch.rows):
        for one in block.maps[at]:
            rule = block.rule(one.grid)
            eligible = rule.eligible.cpu()
            ranks = [stats.rankdata(values[eligible].numpy()) for values in (one.norms, one.attention)]
            correlation = np.corrcoef(*ranks)[0, 1] if len(ranks[0]) > 1 else np.nan
            by_norm, by_map = (set(rule.choose(values[None])[0].tolist()) for values in (one.norms, one.attention))
            found.append((float(correlation), len(by_norm & by_map) / len(by_map)))
    return found


def _keep_output(outputs: list[Tensor], module: Any, arguments: Any, output: Any) -> None:
    outputs.append(residual_stream(output))


@torch.no_grad()
def _norms(run: Run, method: Method, batch: Batch, block: BlockMaps) -> dict[tuple[str, str], list[float]]:
    """Mean norm of the residual stream behind each block, at sources, their neighbours and all other patches."""
    asker = run.asker
    act = SourceEdit(batch.layout, by_image(_sources(batch, block), batch.images), asker.scr)
    found: dict[tuple[str, str], list[float]] = {}
    for name, context in (("vanilla", nullcontext()), (TWO_PASS, run.context(method, batch, block))):
        outputs: list[Tensor] = []
        handles = [layer.register_forward_hook(partial(_keep_output, outputs)) for layer in blocks_of(asker.model)]
        try:
            with context:
                asker.model(**batch.prompts.inputs, logits_to_keep=1)
        finally:
            for handle in handles:
                handle.remove()
        for hidden in outputs:
            norms = torch.linalg.vector_norm(hidden.float().reshape(-1, hidden.shape[-1]), dim=-1)
            plan = act.plan(hidden)
            patches = torch.cat([group.positions.flatten() for group in batch.layout.groups])
            neighbours = plan.targets[1:][plan.coefficients[1:] > 0].unique()
            touched = torch.cat([plan.sources, neighbours])
            rest = patches[~torch.isin(patches, touched)]
            for part, places in (("sources", plan.sources), ("neighbours", neighbours), ("rest", rest)):
                found.setdefault((name, part), []).append(float(norms[places].mean()))
    return found
