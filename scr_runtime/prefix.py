"""The kept prefix of an image session: keys and values of the tokens up to the image's end, without any edit.

Attention is causal, so the prefix of a prompt never sees the question behind it: the first question that needs a
diagnostic run records the prefix's keys and values in the blocks of that run, and the diagnostic runs of later
questions take their text tokens alone and attend to what was kept.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scr_runtime.attention import AttentionRows
from scr_runtime.errors import SessionError
from scr_runtime.here import Turns
from scr_runtime.payload import encoded_images

logger = logging.getLogger("scr_runtime")

_ROPE = "position_embeddings"
_TURNS = Turns()

_Name = tuple[str, int]
_Places = list[tuple[int, int]]  # (row of the run, column where its prefix begins)


class KeptPrefix:
    """What the diagnostic run of later questions needs of the prefix.

    Args:
        ids: [B, P] int64 on the host, the tokens of each batch row's prefix, padding left out.

    Attributes:
        rows: The batch rows that have been diagnosed, in the order of the kept tensors' first dimension, R.
        tensors: ``("key", layer)`` and ``("value", layer)``: [R, H_kv, P, h] after RoPE, without edit;
            ``("rope", i)``: [R, ..., P, h], the rotation that is in them; ``("rows", 0)``: [R, Q, P] float32,
            attention from the prefix's own last Q positions, summed over layers (text between two images).
    """

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids
        self._kept: tuple[list[int], dict[_Name, Tensor]] = ([], {})  # replaced as one: other threads read it

    @property
    def rows(self) -> list[int]:
        """The batch rows that have been diagnosed."""
        return self._kept[0]

    @property
    def tensors(self) -> dict[_Name, Tensor]:
        """What is kept of them, by kind and layer."""
        return self._kept[1]

    @property
    def length(self) -> int:
        """P, tokens of the prefix."""
        return self.ids.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in (self.ids, *self.tensors.values()))

    @_TURNS
    def add(self, rows: list[int], tensors: dict[_Name, Tensor]) -> None:
        """Keeps the prefix of further batch rows; of those that another thread has kept meanwhile, nothing."""
        kept, before = self._kept
        new = [place for place, row in enumerate(rows) if row not in kept]
        if len(new) < len(rows):
            tensors = {name: tensor[new] for name, tensor in tensors.items()}
        if kept and new:
            tensors = {name: torch.cat([before[name], tensor]) for name, tensor in tensors.items()}
        if new:
            self._kept = ([*kept, *(rows[place] for place in new)], tensors)

    def take(self, name: _Name, rows: list[int]) -> Tensor:
        """One kept tensor's batch rows; no copy where these are all rows in order."""
        kept, tensors = self._kept
        slots = [kept.index(row) for row in rows]
        tensor = tensors[name]
        return tensor if slots == list(range(len(tensor))) else tensor[slots]


@dataclass
class NestedRun:
    """What the diagnostic run calls the blocks with.

    Attributes:
        hidden: [b, S, d] or, where the prefix is kept, [b, T, d]: the last T positions.
        kwargs: Keyword arguments of the blocks.
        captured: Where attention rows are summed.
        cache: The name of the cache among the arguments; ``None`` if they have none.
        finish: ``captured.total`` -> [b, text rows, S], as if all positions had been run.
    """

    hidden: Tensor
    kwargs: dict[str, Any]
    captured: AttentionRows
    cache: str | None = None
    finish: Callable[[Tensor], Tensor] = lambda total: total


@dataclass(frozen=True)
class Question:
    """One prompt of a session.

    Attributes:
        kept: The session's prefix.
        starts: Per batch row of the prompt, the column where the prefix begins: behind left padding.
        readable: Whether the attention implementation takes the mask that a kept prefix needs.
        prompt: [B, S] its tokens.
        encoded: What its prefill brings as image features: an object that no other call has.
    """

    kept: KeptPrefix
    starts: list[int]
    readable: bool
    prompt: Tensor | None = None
    encoded: Any = None

    def brings(self, call: Mapping[str, Any]) -> bool:
        """Whether a prefill brings the features that this question's prefill brings."""
        return self.encoded is not None and encoded_images(call) is self.encoded

    def is_asked_in(self, call: Mapping[str, Any], first: bool) -> bool:
        """Whether a prefill with the question's features is the question itself, and not another prompt with them.

        Args:
            call: Keyword arguments of the prefill.
            first: Whether it is the first prefill of the session's own ``generate``: if it is as long as the question,
                nothing has to be compared.
        """
        ids: Tensor = call["input_ids"]
        if self.prompt is None or ids is self.prompt:
            return True
        length = self.prompt.shape[1]
        if ids.shape[1] < length or len(ids) % len(self.prompt):
            return False
        beams = len(ids) // len(self.prompt)
        return first or torch.equal(ids[:, :length], self.prompt.to(ids).repeat_interleave(beams, 0))

    def enter(self, run: NestedRun, rows: Sequence[int] | None, batch: int) -> NestedRun:
        """Prepares a diagnostic run: over the new text alone where the prefix of all its rows is kept.

        Args:
            run: A run over all positions of the rows, without a cache. Its keyword arguments are written to.
            rows: The rows to run, out of ``batch``; ``None`` for all.
            batch: Batch rows of the pass: the session's, or a multiple of them under beams.

        Raises:
            SessionError: If the prefix lies at other positions than when it was kept.
        """
        beams = batch // len(self.starts)
        prompts = [row // beams for row in (range(batch) if rows is None else rows)]
        cache = run.cache
        if not self.readable or cache is None or not isinstance(run.kwargs.get(_ROPE), tuple):
            logger.warning("the prefix can't be kept in this model: every diagnostic run is a full one")
            return run
        prepare = self._read if set(prompts) <= set(self.kept.rows) else self._record
        return prepare(run, prompts, cache)

    def _record(self, run: NestedRun, prompts: list[int], cache: str) -> NestedRun:
        """A full run that keeps the prefix of the batch rows which are not kept yet."""
        kept, captured, length = self.kept, run.captured, run.hidden.shape[1]
        new = sorted(set(prompts) - set(kept.rows))
        places = [(prompts.index(prompt), self.starts[prompt]) for prompt in new]
        tensors = {("rope", i): _prefix_of(part, places, kept.length) for i, part in enumerate(run.kwargs[_ROPE])}
        run.kwargs[cache] = _Recorder(tensors, places, kept.length, captured.layers[1])

        def finish(total: Tensor) -> Tensor:
            early = kept.length - (length - captured.rows)  # the first captured row is at least one image in
            tensors["rows", 0] = torch.stack(
                [total[row, start : start + early, start : start + kept.length] for row, start in places]
            )
            kept.add(new, tensors)
            return total

        return NestedRun(run.hidden, run.kwargs, captured, cache, finish)

    def _read(self, run: NestedRun, prompts: list[int], cache: str) -> NestedRun:
        """A run over the text alone, which attends to the kept prefix.

        Rows of a padded batch that have less text than others bring their last visual tokens once more; those are
        hidden as keys, and their own attention rows are the kept ones.
        """
        kept, hidden, kwargs, captured = self.kept, run.hidden, run.kwargs, run.captured
        length = hidden.shape[1]
        starts = [self.starts[prompt] for prompt in prompts]
        text = length - kept.length - min(starts)
        places = list(enumerate(starts))
        self._check_positions(kwargs[_ROPE], prompts, places)
        kwargs[_ROPE] = tuple(part[..., length - text :, :] for part in kwargs[_ROPE])
        for key in ("position_ids", "cache_position"):
            if isinstance(kwargs.get(key), Tensor):
                kwargs[key] = kwargs[key][..., length - text :]
        kwargs["attention_mask"] = text_mask(kwargs.get("attention_mask"), hidden, starts, kept.length, text)
        kwargs[cache] = _Reader(kept, prompts)

        def finish(total: Tensor) -> Tensor:
            full = total.new_zeros(len(prompts), captured.rows, length)
            early = kept.take(("rows", 0), prompts)
            for row, start in places:
                end = start + kept.length
                full[row, -text:, start:end] = total[row, :, : kept.length]
                full[row, start : start + early.shape[1], start:end] = early[row]  # over tokens run once more
            return full

        return NestedRun(hidden[:, length - text :], kwargs, AttentionRows(captured.layers, text), cache, finish)

    def _check_positions(self, rope: tuple[Tensor, ...], prompts: list[int], places: _Places) -> None:
        kept = self.kept
        same = [
            (_prefix_of(part, places, kept.length) == kept.take(("rope", i), prompts)).all()
            for i, part in enumerate(rope)
        ]
        if not bool(torch.stack(same).all()):  # the diagnostic run's one host sync
            raise SessionError(
                "the prefix lies at other positions than in the question that it was kept from. Leave padding out, "
                "or pass position_ids that count from the first token behind it, as generate() does: "
                "(attention_mask.cumsum(-1) - 1).clamp(min=0)"
            )


class _Recorder:
    """Stands in for a cache: keeps the prefix's part of the keys and values, and returns them as they came."""

    def __init__(self, tensors: dict[_Name, Tensor], places: _Places, length: int, last: int) -> None:
        self.tensors = tensors
        self.places = places
        self.length = length
        self.last = last

    def update(self, key: Tensor, value: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        self.tensors["key", layer] = self._cut(key)
        if layer != self.last:  # the run is left before the last attention uses its values
            self.tensors["value", layer] = self._cut(value)
        return key, value

    def _cut(self, states: Tensor) -> Tensor:
        return torch.stack([states[row, :, start : start + self.length] for row, start in self.places])


class _Reader:
    """Stands in for a cache: puts the kept prefix before the new keys and values, and never grows."""

    def __init__(self, kept: KeptPrefix, rows: list[int]) -> None:
        self.kept = kept
        self.rows = rows

    def update(self, key: Tensor, value: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        keys = torch.cat([self.kept.take(("key", layer), self.rows), key], dim=2)
        if ("value", layer) not in self.kept.tensors:
            return keys, value
        return keys, torch.cat([self.kept.take(("value", layer), self.rows), value], dim=2)


def text_mask(mask: Any, hidden: Tensor, starts: list[int], prefix: int, text: int) -> Tensor:
    """Makes the mask of a run over the text alone.

    Args:
        mask: The pass's own mask, [b, 1, S, S] bool or additive; ``None`` for causal without padding.
        hidden: [b, S, d], for shape, device and dtype.
        starts: Per row, the column where the prefix begins.
        prefix: P.
        text: T.

    Returns:
        [b or 1, 1, T, P + T]: which of the kept prefix and of one another the last T positions see. Bool or additive,
        as ``mask`` is; additive without one.
    """
    batch, length, _ = hidden.shape
    if mask is None:
        seen = torch.ones(text, prefix + text, dtype=torch.bool, device=hidden.device).tril(prefix)
        additive = torch.zeros(seen.shape, dtype=hidden.dtype, device=hidden.device)
        return additive.masked_fill_(~seen, torch.finfo(hidden.dtype).min)[None, None]
    begin = torch.tensor(starts)[:, None].to(hidden.device, non_blocking=True)  # [b, 1]
    before = begin + torch.arange(prefix, device=hidden.device)  # [b, P]
    after = torch.arange(length - text, length, device=hidden.device).expand(batch, text)
    again = after < begin + prefix  # [b, T] positions that are in the kept prefix already
    columns = torch.cat([before, after], dim=1)[:, None, None]  # [b, 1, 1, P + T]
    rows: Tensor = mask[:, :, length - text : length].expand(batch, -1, -1, -1)  # [b, 1, T, S]
    picked = rows.gather(-1, columns.expand(-1, rows.shape[1], text, -1))
    hide = torch.cat([torch.zeros_like(before, dtype=torch.bool), again], dim=1)[:, None, None]
    if picked.dtype == torch.bool:
        return picked & ~hide
    return picked.masked_fill(hide, torch.finfo(picked.dtype).min)


def _prefix_of(rope: Tensor, places: _Places, length: int) -> Tensor:
    """[R, ..., P, h] of a rotation [..., B or 1, S, h], one of (row, start) after the other."""
    shared = rope.shape[-3] == 1
    return torch.stack([rope[..., 0 if shared else row, start : start + length, :] for row, start in places])
