"""Source providers: the state layer's output in (block 0's, in the paper), one score per visual token out.

The same edit follows whichever provider was asked (decision D2):

    predicted   the SourcePredictor                                              one-pass
    diagnosed   a nested run of the next blocks on the same output               two-pass
    auto        the predictor, and the diagnostic for rows of low confidence
    uniform     a seeded random draw, the control
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from scr_runtime.attention import AttentionRows, MapComplete
from scr_runtime.config import SCRConfig
from scr_runtime.errors import UnsupportedModelError
from scr_runtime.families import Family
from scr_runtime.layout import ImageGroup, VisualLayout
from scr_runtime.network import SourcePredictor, raw_confidence
from scr_runtime.redistribute import Grid, claims_of, effective_num_sources, eligible_patches
from scr_runtime.session import NestedRun, Question

ONE_PASS, TWO_PASS, UNIFORM = "one-pass", "two-pass", "uniform"
LOW_CONFIDENCE, DRIFT, NOT_FINITE, NO_PREDICTOR = "low confidence", "drift", "not finite", "no predictor"
FALLBACKS = (LOW_CONFIDENCE, DRIFT, NOT_FINITE, NO_PREDICTOR)


@dataclass(frozen=True)
class Fallback:
    """Why the diagnostic run stood in for the predictor.

    Attributes:
        kind: One of ``FALLBACKS``.
        reason: The same in a sentence, with the values that decided.
    """

    kind: str
    reason: str


@dataclass
class Scores:
    """What a provider says about the images of one group.

    Attributes:
        scores: [I, N] float32.
        providers: Per image, who scored it: ``"one-pass"``, ``"two-pass"`` or ``"uniform"``.
        fallbacks: Per image, why the diagnostic run stood in for the predictor; ``None`` where it did not.
        predicted: [I, N] the predictor's scores, also where others stood in; ``None`` if it was not asked.
        spread: [I] how far the features reach that it read; ``None`` if it was not asked or has no drift guard.
    """

    scores: Tensor
    providers: list[str]
    fallbacks: list[Fallback | None]
    predicted: Tensor | None = None
    spread: Tensor | None = None


Provider = Callable[["Prefill"], list[Scores]]


@dataclass(frozen=True)
class Prefill:
    """What providers may look at, at the moment the block ``config.state_layer`` has run.

    Attributes:
        hidden: [B, S, d] output of that block, not edited yet.
        layout: Where the images are.
        config: The method's settings.
        blocks: The decoder blocks.
        args: Positional arguments of that block's call.
        kwargs: Keyword arguments of that block's call.
        family: Whose blocks these are.
        decoder_call: Keyword arguments of the decoder's call, where the family needs them.
        asked: The image session's question that this prompt is; ``None`` outside a session.
        wide: Whether a predictor will read patches and text: ``hidden`` is then converted to float32 once for both.
    """

    hidden: Tensor
    layout: VisualLayout
    config: SCRConfig
    blocks: nn.ModuleList
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    family: Family
    decoder_call: Mapping[str, Any]
    asked: Question | None = None
    wide: bool = False
    _gathered: dict[int, Tensor] = field(default_factory=dict[int, Tensor], init=False, repr=False)

    @functools.cached_property
    def _read(self) -> Tensor:
        """[B, S, d] what states and questions are read from."""
        return self.hidden.float() if self.wide else self.hidden

    def states(self, group: ImageGroup) -> Tensor:
        """[I, N, d] states of a group's patches, gathered once; float32 if ``wide``."""
        first = group.images[0]
        if first not in self._gathered:
            self._gathered[first] = self._read.reshape(-1, self.hidden.shape[-1])[group.positions]
        return self._gathered[first]

    def question(self, group: ImageGroup) -> Tensor:
        """[I, d] float32 mean state of the text that asks about each image."""
        rows = self._read[:, -self.layout.text_rows :].float()  # [B, T, d]
        own = rows.expand(len(group.images), -1, -1) if len(rows) == 1 else rows[group.rows]
        return torch.bmm(group.text_weights[:, None, :], own).squeeze(1)

    def diagnose(self, rows: list[int] | None = None) -> list[Tensor]:
        """Runs the blocks behind ``state_layer``, up to the last attention layer, and returns the attention maps.

        The run has no cache and is left inside the last attention, so that its block's MLP and all later blocks
        cost nothing. Blocks are entered through ``forward``: the hooks of the running pass don't see it.

        Args:
            rows: Batch rows to run; ``None`` for all.

        Returns:
            Per group, [I, N] float32: attention from text to patches, averaged over text rows, heads and
            ``attention_layers`` (arXiv 2602.22469). Images in other rows get meaningless values.

        Raises:
            UnsupportedModelError: If the blocks' masks differ, or their attention was changed after attaching.
        """
        first, last = self.config.attention_layers
        start = self.config.state_layer
        self._check_masks(start, last)
        batch, length, _ = self.hidden.shape
        captured = AttentionRows(self.config.attention_layers, self.layout.text_rows)
        kwargs = self._diagnostic_call()
        index = None
        if rows is not None:
            index = torch.tensor(rows).to(self.hidden.device, non_blocking=True)
            try:
                kwargs = {key: _select_rows(key, value, index, batch) for key, value in kwargs.items()}
            except _UnknownBatchDimension:
                rows = index = None  # all rows then: slower, and as exact
        between = self.family.between_blocks
        add = between(self.decoder_call) if between is not None else None
        tap = self.family.tap

        hidden = self.hidden if index is None else self.hidden[index]
        run = NestedRun(hidden, kwargs, captured, lambda total: total)
        if self.asked is not None and tap is None:
            run = self.asked.enter(hidden, kwargs, captured, rows, batch)

        def run_blocks(hidden: Tensor) -> None:
            for layer, block in enumerate(list(self.blocks)[start:], start):
                if layer > start:
                    output: Any = block.forward(hidden, **run.kwargs)
                    hidden = output[0] if isinstance(output, tuple) else output
                if add is not None:
                    hidden = add(layer, hidden, index)

        with ExitStack() as stack:
            if tap is None:
                run.kwargs["scr_rows"] = run.captured
            else:
                for layer, block in enumerate(self.blocks):
                    stack.callback(tap(block, layer, captured))
            # An empty context: transformers collects output_attentions through a context variable, and the
            # diagnostic's own must not be among them.
            with suppress(MapComplete):
                Context().run(run_blocks, run.hidden)
        total = run.captured.total
        if total is None and tap is not None:
            raise UnsupportedModelError(
                "the blocks' attention did not pass where its q and k are read (a fused kernel?); load the model "
                "with its plain attention, or use mode='one-pass' or 'uniform'"
            )
        if total is None:  # check_depth has seen that the layers exist, so their attention was not the wrapper
            block: Any = self.blocks[0]
            implementation = block.self_attn.config._attn_implementation
            raise UnsupportedModelError(
                f"the attention implementation was changed to {implementation!r} while SCR was attached; "
                "detach, change it, and attach again"
            )
        total = run.finish(total)
        place = None
        if rows is not None:
            place = torch.zeros(batch, dtype=torch.long)
            place[rows] = torch.arange(len(rows))
            place = place.to(self.hidden.device, non_blocking=True)
        maps: list[Tensor] = []
        for group in self.layout.groups:
            source = group.rows if place is None else place[group.rows]
            columns = torch.bmm(group.text_weights[:, None, :], total[source]).squeeze(1)  # [I, S]
            maps.append(columns.gather(1, group.positions % length) / (last - first + 1))
        return maps

    def _check_masks(self, start: int, last: int) -> None:
        """The run has one block's mask for all blocks, so that they have to be of one kind."""
        attention = getattr(self.blocks[0], "self_attn", None)
        kinds: list[str] = getattr(getattr(attention, "config", None), "layer_types", None) or []
        if len(set(kinds[start : last + 1])) > 1:
            raise UnsupportedModelError(
                f"blocks {start}-{last} mix attention of different reach ({sorted(set(kinds))}); the diagnostic run "
                "knows the mask of one. Use mode='one-pass' or 'uniform'."
            )

    def _diagnostic_call(self) -> dict[str, Any]:
        """The block's arguments but the hidden states, by name, without its cache."""
        kwargs = dict(self.kwargs)
        if self.args:
            names = list(inspect.signature(self.blocks[self.config.state_layer].forward).parameters)[1:]
            kwargs |= dict(zip(names, self.args, strict=False))
        kwargs |= {key: None for key in ("past_key_values", "past_key_value") if key in kwargs}
        kwargs |= {key: False for key in ("use_cache", "output_attentions") if key in kwargs}
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 4:
            # A static cache brings columns for later tokens.
            kwargs["attention_mask"] = mask[..., : self.hidden.shape[1]]
        return kwargs


def predicted(predictor: SourcePredictor) -> Provider:
    """One-pass: the predictor alone."""

    def provide(prefill: Prefill) -> list[Scores]:
        results: list[Scores] = []
        for group in prefill.layout.groups:
            question = prefill.question(group) if predictor.config.reads_question else None
            given = (prefill.states(group), group.grid, question)
            guarded = predictor.drift_limit is not None
            scores, spread = predictor.score_and_spread(*given) if guarded else (predictor(*given), None)
            count = len(group.images)
            results.append(Scores(scores, [ONE_PASS] * count, [None] * count, scores, spread))
        return results

    return provide


def diagnosed(fallback: Fallback | None = None) -> Provider:
    """Two-pass: the nested diagnostic run, for every image; ``fallback`` tells why, where it stands in."""

    def provide(prefill: Prefill) -> list[Scores]:
        return [Scores(scores, [TWO_PASS] * len(scores), [fallback] * len(scores)) for scores in prefill.diagnose()]

    return provide


def auto(predictor: SourcePredictor, threshold: float) -> Provider:
    """The predictor, and the diagnostic run for images whose scores are not to be trusted.

    Those are images of low confidence, images whose features are unlike those of the fit, and scores that are not
    finite. One host sync per prefill decides whether there are any.
    """
    ask = predicted(predictor)

    def provide(prefill: Prefill) -> list[Scores]:
        results = ask(prefill)
        columns: list[Tensor] = []
        for group, result in zip(prefill.layout.groups, results, strict=True):
            sure = confidence(predictor, result.scores, group.grid, prefill.config)
            drift = torch.ones_like(sure) if result.spread is None else predictor.drift(result.spread)
            finite = result.scores.isfinite().all(-1)
            columns.append(torch.stack([sure, finite.float(), group.rows.float(), drift]))
        table = torch.cat(columns, dim=1).T.tolist()  # the one sync: [confidence, finite, row, drift] per image

        limit = predictor.drift_limit
        verdicts = [_verdict(sure, bool(finite), threshold, drift, limit) for sure, finite, _, drift in table]
        rows = sorted({int(line[2]) for line, verdict in zip(table, verdicts, strict=True) if verdict})
        if not rows:
            return results
        maps = prefill.diagnose(None if len(rows) == len(prefill.hidden) else rows)
        start = 0
        for result, scores in zip(results, maps, strict=True):
            mine = verdicts[start : start + len(scores)]
            start += len(scores)
            low = torch.tensor([verdict is not None for verdict in mine], device=scores.device)
            result.scores = torch.where(low[:, None], scores, result.scores)
            result.providers = [TWO_PASS if verdict else ONE_PASS for verdict in mine]
            result.fallbacks = list(mine)
        return results

    return provide


def uniform(seed: int) -> Provider:
    """The Uniform-Smooth control of arXiv 2602.22469: sources drawn uniformly, from one seeded stream."""
    generators: dict[torch.device, torch.Generator] = {}

    def provide(prefill: Prefill) -> list[Scores]:
        device = prefill.hidden.device
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(seed)
        return [
            Scores(
                torch.rand(group.positions.shape, generator=generators[device], device=device),
                [UNIFORM] * len(group.images),
                [None] * len(group.images),
            )
            for group in prefill.layout.groups
        ]

    return provide


def confidence(predictor: SourcePredictor, scores: Tensor, grid: Grid, config: SCRConfig) -> Tensor:
    """[I] calibrated expected share of true sources among those that ``scores`` would choose."""
    eligible = eligible_patches(grid, config.exclude_border, scores.device)
    k = effective_num_sources(grid, config)
    claims = claims_of(grid, config, scores.device)
    return predictor.calibrate(raw_confidence(scores, eligible, k, predictor.temperature, claims))


def _verdict(sure: float, finite: bool, threshold: float, drift: float, limit: float | None) -> Fallback | None:
    if not finite:
        return Fallback(NOT_FINITE, "the predictor's scores are not finite")
    if limit is not None and drift > limit:
        reason = f"drift {drift:.2f} is over the limit {limit:.2f}: the features are unlike those of the fit"
        return Fallback(DRIFT, reason)
    if sure < threshold:
        return Fallback(LOW_CONFIDENCE, f"confidence {sure:.3f} is under the threshold {threshold:.3f}")
    return None


class _UnknownBatchDimension(Exception):  # noqa: N818 - a signal, not an error
    """An argument of a block whose batch dimension is not in the table."""


# Where the batch is in the arguments of a decoder block. M-RoPE puts the three axes of a position before the batch
# (position_ids [3, B, S], cos and sin [3, B, S, h]) where other models have [B, S] and [B, S, h]: counted from the
# end both are the same, and no shape has to be guessed when B happens to be 3.
_BATCH_DIMENSION = {
    "attention_mask": 0,
    "position_ids": -2,
    "position_embeddings": -3,
    "rotary_pos_emb": 0,
    "registered_causal_mask": 0,
}


def _select_rows(name: str, value: Any, index: Tensor, batch: int) -> Any:
    """Takes batch rows out of one argument of a block.

    Raises:
        _UnknownBatchDimension: If it can't be told where the rows are.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        items = [_select_rows(name, item, index, batch) for item in value]  # pyright: ignore[reportUnknownVariableType]
        return tuple(items) if isinstance(value, tuple) else items
    dimension = _BATCH_DIMENSION.get(name)
    if dimension is None or not isinstance(value, Tensor):
        raise _UnknownBatchDimension
    if value.ndim < -dimension or value.shape[dimension] == 1:
        return value  # the same for all rows
    if value.shape[dimension] != batch:
        raise _UnknownBatchDimension
    return value.index_select(dimension, index)
