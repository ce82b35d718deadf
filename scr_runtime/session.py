"""Several questions about one image: what the image alone decides is worked out once and kept.

Attention is causal, so the prefix of a prompt, all that stands up to its last visual token, never sees the question
behind it. Two things of it stay the same from question to question:

    image features              the vision tower runs once, when the session opens
    keys and values, no edit    of the prefix, in the blocks that the diagnostic run enters: kept by the first
                                question that needs a diagnostic; later ones run their text tokens alone

The edited pass itself runs in full for every question, since its sources, and with them all edited states, differ.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scr_runtime.attention import AttentionRows, implementation
from scr_runtime.errors import SessionError, UnsupportedModelError
from scr_runtime.families import Family

logger = logging.getLogger("scr_runtime")

_PIXELS = "pixel_values"
_FEATURES = ("pooler_output", "deepstack_features")  # what models read from pre-encoded images
_ROPE = "position_embeddings"
_CACHES = ("past_key_values", "past_key_value")
_MASKED_BY_TENSOR = ("sdpa", "eager")  # implementations that take a mask [B, 1, Q, K]

_Name = tuple[str, int]


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
        self.rows: list[int] = []
        self.tensors: dict[_Name, Tensor] = {}

    @property
    def length(self) -> int:
        """P, tokens of the prefix."""
        return self.ids.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return _nbytes([self.ids, *self.tensors.values()])

    def add(self, rows: list[int], tensors: dict[_Name, Tensor]) -> None:
        """Keeps the prefix of further batch rows."""
        if self.rows:
            tensors = {name: torch.cat([self.tensors[name], tensor]) for name, tensor in tensors.items()}
        self.tensors = tensors
        self.rows = [*self.rows, *rows]

    def take(self, name: _Name, rows: list[int]) -> Tensor:
        """One kept tensor's batch rows; no copy where these are all rows in order."""
        slots = [self.rows.index(row) for row in rows]
        tensor = self.tensors[name]
        return tensor if slots == list(range(len(tensor))) else tensor[slots]


@dataclass
class NestedRun:
    """What the diagnostic run is to be called with.

    Attributes:
        hidden: [b, S, d] or, where the prefix is kept, [b, T, d]: the last T positions.
        kwargs: Keyword arguments of the blocks.
        captured: Where attention rows are summed.
        finish: ``captured.total`` -> [b, text rows, S], as if all positions had been run.
    """

    hidden: Tensor
    kwargs: dict[str, Any]
    captured: AttentionRows
    finish: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Question:
    """One prompt of a session.

    Attributes:
        kept: The session's prefix.
        starts: Per batch row of the prompt, the column where the prefix begins: behind left padding.
        readable: Whether the attention implementation takes the mask that a kept prefix needs.
    """

    kept: KeptPrefix
    starts: list[int]
    readable: bool

    def enter(
        self,
        hidden: Tensor,
        kwargs: Mapping[str, Any],
        captured: AttentionRows,
        rows: Sequence[int] | None,
        batch: int,
    ) -> NestedRun:
        """Prepares a diagnostic run: over the new text alone where the prefix of all its rows is kept.

        Args:
            hidden: [b, S, d] output of the state layer for the rows to run.
            kwargs: Keyword arguments of the blocks for the same rows, without a cache.
            captured: Where attention rows are summed.
            rows: The rows to run, out of ``batch``; ``None`` for all.
            batch: Batch rows of the pass: the session's, or a multiple of them under beams.

        Raises:
            SessionError: If the prefix lies at other positions than when it was kept.
        """
        beams = batch // len(self.starts)
        prompts = [row // beams for row in (range(batch) if rows is None else rows)]
        rope = kwargs.get(_ROPE)
        cache = next((key for key in _CACHES if key in kwargs), None)
        if not self.readable or cache is None or not isinstance(rope, tuple):
            logger.warning("the prefix can't be kept in this model: every diagnostic run is a full one")
            return NestedRun(hidden, dict(kwargs), captured, lambda total: total)
        run = self._read if set(prompts) <= set(self.kept.rows) else self._record
        return run(hidden, dict(kwargs), captured, prompts, cache)

    def _record(
        self, hidden: Tensor, kwargs: dict[str, Any], captured: AttentionRows, prompts: list[int], cache: str
    ) -> NestedRun:
        """A full run that keeps the prefix of the batch rows which are not kept yet."""
        kept, length = self.kept, hidden.shape[1]
        new = sorted(set(prompts) - set(kept.rows))
        places = [(prompts.index(prompt), self.starts[prompt]) for prompt in new]
        tensors = {("rope", i): _prefix_of(part, places, kept.length) for i, part in enumerate(kwargs[_ROPE])}
        kwargs[cache] = _Recorder(tensors, places, kept.length, captured.layers[1])

        def finish(total: Tensor) -> Tensor:
            early = kept.length - (length - captured.rows)  # the first captured row is at least one image in
            tensors["rows", 0] = torch.stack(
                [total[row, start : start + early, start : start + kept.length] for row, start in places]
            )
            kept.add(new, tensors)
            return total

        return NestedRun(hidden, kwargs, captured, finish)

    def _read(
        self, hidden: Tensor, kwargs: dict[str, Any], captured: AttentionRows, prompts: list[int], cache: str
    ) -> NestedRun:
        """A run over the text alone, which attends to the kept prefix.

        Rows of a padded batch that have less text than others bring their last visual tokens once more; those are
        hidden as keys, and their own attention rows are the kept ones.
        """
        kept, length = self.kept, hidden.shape[1]
        starts = [self.starts[prompt] for prompt in prompts]
        text = length - kept.length - min(starts)
        rope: tuple[Tensor, ...] = kwargs[_ROPE]
        places = list(enumerate(starts))
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
        kwargs[_ROPE] = tuple(part[..., length - text :, :] for part in rope)
        for key in ("position_ids", "cache_position"):
            if isinstance(kwargs.get(key), Tensor):
                kwargs[key] = kwargs[key][..., length - text :]
        kwargs["attention_mask"] = _text_mask(kwargs.get("attention_mask"), hidden, starts, kept.length, text)
        kwargs[cache] = _Reader(kept, prompts)

        def finish(total: Tensor) -> Tensor:
            full = total.new_zeros(len(prompts), captured.rows, length)
            early = kept.take(("rows", 0), prompts)
            for row, start in places:
                end = start + kept.length
                full[row, -text:, start:end] = total[row, :, : kept.length]
                full[row, start : start + early.shape[1], start:end] = early[row]  # over tokens run once more
            return full

        return NestedRun(hidden[:, length - text :], kwargs, AttentionRows(captured.layers, text), finish)


class _Recorder:
    """Stands in for a cache: keeps the prefix's part of what it is given, and holds nothing back."""

    def __init__(self, tensors: dict[_Name, Tensor], places: list[tuple[int, int]], length: int, last: int) -> None:
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
    """Stands in for a cache: puts the kept prefix before what it is given, and never grows."""

    def __init__(self, kept: KeptPrefix, rows: list[int]) -> None:
        self.kept = kept
        self.rows = rows

    def update(self, key: Tensor, value: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        keys = torch.cat([self.kept.take(("key", layer), self.rows), key], dim=2)
        if ("value", layer) not in self.kept.tensors:
            return keys, value
        return keys, torch.cat([self.kept.take(("value", layer), self.rows), value], dim=2)


class ImageSession:
    """An image, with its place in a prompt, about which several questions are asked. Made by ``SCR.image``.

    The answers are those of an SCR without a session, up to rounding: the vision tower is not run again, and the
    diagnostic run of later questions takes their text alone. Everything after the image may change from
    question to question, so the turns of a chat are questions too. The session holds memory until it is closed.

    Args:
        model: The model.
        family: Its family.
        inputs: The processor's output for any of the questions: ``input_ids``, ``pixel_values``, and
            ``attention_mask`` if there is padding. Only images and the tokens up to the last of them are used.
        asking: Question -> a context in which the model's prefill is that question's.

    Raises:
        SessionError: If there is no image, a batch row has none, or rows differ in the length of their prefix.
        UnsupportedModelError: If the model can't take image features that were encoded before.

    Example:
        >>> with scr.image(**first) as image:  # doctest: +SKIP
        ...     answers = [image.generate(**inputs, max_new_tokens=64) for inputs in (first, second, third)]
    """

    def __init__(
        self,
        model: Any,
        family: Family,
        inputs: Mapping[str, Any],
        asking: Callable[[Question], AbstractContextManager[None]],
    ) -> None:
        self._model = model
        self._family = family
        self._asking = asking
        self._kept: KeptPrefix | None = None
        self._features: Any = None
        self._image: dict[str, Any] = {}
        encode: Any = getattr(getattr(model, "base_model", model), "get_image_features", None)
        if encode is None or "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
            raise UnsupportedModelError(
                f"{type(model).__name__} can't take image features that were encoded before "
                "(no mm_encoder_outputs): ask each question by itself"
            )
        if inputs.get(_PIXELS) is None:
            raise SessionError("a session is about an image: pass the processor's pixel_values with input_ids")
        kept = KeptPrefix(_first_prefix(inputs, self._visual_tokens))
        names = set(inspect.signature(encode).parameters)
        image = {key: value for key, value in inputs.items() if key in names and value is not None}
        with torch.no_grad():
            encoded = encode(**image, return_dict=True)
        self._features = _copy_features(encoded)
        # Clones: a server may fill the same pixel buffer with the next image.
        self._image = {key: value.clone() if isinstance(value, Tensor) else value for key, value in image.items()}
        self._kept = kept

    def __call__(self, **inputs: Any) -> Any:
        """A forward pass of the model: a prefill with one question.

        Args:
            **inputs: Keyword arguments of the model's forward. The image may be left out; if it is given, it is
                compared with the session's.

        Returns:
            The model's output.

        Raises:
            SessionError: If the session is closed, or the image or the tokens up to it are not the session's.
            AttachError: If the SCR is not attached.
        """
        question, call = self._prepare(inputs)
        with self._asking(question):
            return self._model(**call)

    def generate(self, **inputs: Any) -> Any:
        """``model.generate`` with one question; arguments and errors as for a call of the session.

        Returns:
            What ``model.generate`` returns.
        """
        question, call = self._prepare(inputs)
        with self._asking(question):
            return self._model.generate(**call)

    def close(self) -> None:
        """Lets go of all that is kept. Closing twice does nothing."""
        self._kept, self._features, self._image = None, None, {}

    def __enter__(self) -> ImageSession:
        self._open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def nbytes(self) -> int:
        """Bytes that the session holds: pixels, features, and the prefix's keys and values once they are kept."""
        if self._kept is None:
            return 0
        features = [part for name in _FEATURES for part in _tensors(getattr(self._features, name, None))]
        return self._kept.nbytes + _nbytes(features) + _nbytes(_tensors(list(self._image.values())))

    def _open(self) -> KeptPrefix:
        if self._kept is None:
            raise SessionError("this image session is closed; open another with scr.image(**inputs)")
        return self._kept

    def _visual_tokens(self, ids: Tensor) -> Tensor:
        return self._family.visual_tokens(self._model, ids)

    def _prepare(self, inputs: Mapping[str, Any]) -> tuple[Question, dict[str, Any]]:
        kept = self._open()
        for key in ("mm_encoder_outputs", "inputs_embeds"):
            if inputs.get(key) is not None:
                raise SessionError(f"leave {key} out: the session brings the image's features, beside input_ids")
        cache = inputs.get("past_key_values")
        if cache is not None and int(cache.get_seq_length()) > 0:
            raise SessionError(
                "a question starts from an empty cache. Decode steps after it are calls of the model itself, and "
                "the next question of a chat is a prompt with the earlier turns in its text"
            )
        self._check_image(inputs)
        starts = self._find_prefix(inputs, kept)
        call = {key: value for key, value in self._image.items() if key != _PIXELS}
        call |= {key: value for key, value in inputs.items() if key != _PIXELS}
        call["mm_encoder_outputs"] = {"image": _copy_features(self._features)}
        readable = implementation(self._family.text_config(self._model)) in _MASKED_BY_TENSOR
        return Question(kept, starts, readable), call

    def _check_image(self, inputs: Mapping[str, Any]) -> None:
        for key, mine in self._image.items():
            given = inputs.get(key)
            if given is None:
                continue
            if isinstance(mine, Tensor):
                same = given.shape == mine.shape and torch.equal(given.to(mine.device, mine.dtype), mine)
            else:
                same = bool(given == mine)
            if not same:
                raise SessionError(
                    f"{key} is not the session's: this question is about another image. Open a session for it, or "
                    "leave the image's arguments out"
                )

    def _find_prefix(self, inputs: Mapping[str, Any], kept: KeptPrefix) -> list[int]:
        """The column where each row's prefix starts. One host sync, before anything else is queued."""
        ids, mask = _on_host(inputs)
        if len(ids) != len(kept.ids):
            raise SessionError(f"the session has {len(kept.ids)} batch rows, this question has {len(ids)}")
        visual = self._visual_tokens(ids)
        starts: list[int] = []
        for row in range(len(ids)):
            end = _after_last(visual[row])
            start = end - kept.length
            if start < 0 or not torch.equal(ids[row, start:end], kept.ids[row]):
                raise SessionError(
                    f"the tokens of row {row} up to its last visual token are not the session's. Only what comes "
                    "after the image may change (not the system prompt, nor the number of images): open another "
                    "session"
                )
            if bool(mask[row, :start].any()) or not bool(mask[row, start:end].all()):
                raise SessionError(
                    f"row {row} has {start} tokens before the session's prefix that are not masked as padding, or "
                    "masked tokens within it: pass the processor's attention_mask"
                )
            if not bool(mask[row, end:].any()):
                raise SessionError(f"row {row} has no text after its image, so it asks nothing")
            starts.append(start)
        return starts


def _first_prefix(inputs: Mapping[str, Any], visual_tokens: Callable[[Tensor], Tensor]) -> Tensor:
    """[B, P] tokens from the first one that is no padding to the last visual one, on the host."""
    ids, mask = _on_host(inputs)
    visual = visual_tokens(ids)
    rows: list[Tensor] = []
    for row in range(len(ids)):
        start, end = int(mask[row].byte().argmax()), _after_last(visual[row])
        if end <= start or not bool(mask[row, start:end].all()):
            raise SessionError(
                f"row {row} of the batch has no image placeholder, or masked tokens before its last one; a session "
                "needs an image in every row"
            )
        rows.append(ids[row, start:end])
    if len({len(row) for row in rows}) > 1:
        raise SessionError(
            f"the rows' prefixes have {[len(row) for row in rows]} tokens up to their last visual token; a session "
            "needs rows of equal prefix length: open one session per row"
        )
    return torch.stack(rows)


def _on_host(inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """[B, S] tokens and [B, S] bool of kept positions, in one transfer."""
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise SessionError("pass input_ids [batch, tokens] by name: the image is found by its placeholder tokens")
    if mask is None:
        host = ids.cpu()
        return host, torch.ones_like(host, dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        raise SessionError("a session takes the processor's attention_mask, [batch, tokens] like input_ids")
    host = torch.stack([ids, mask.to(ids)]).cpu()
    return host[0], host[1].bool()


def _after_last(flags: Tensor) -> int:
    """Index behind the last true element of [S]; 0 if there is none."""
    places = flags.nonzero()
    return int(places[-1]) + 1 if len(places) else 0


def _prefix_of(rope: Tensor, places: list[tuple[int, int]], length: int) -> Tensor:
    """[R, ..., P, h] of a rotation [..., B or 1, S, h], one of (row, start) after the other."""
    shared = rope.shape[-3] == 1
    return torch.stack([rope[..., 0 if shared else row, start : start + length, :] for row, start in places])


def _text_mask(mask: Any, hidden: Tensor, starts: list[int], prefix: int, text: int) -> Tensor:
    """[b or 1, 1, T, P + T]: what the last T positions see of the kept prefix and of one another.

    Args:
        mask: The pass's own mask, [b, 1, S, S] bool or additive; ``None`` for causal without padding.
        hidden: [b, S, d], for shape, device and dtype.
        starts: Per row, the column where the prefix begins.
        prefix: P.
        text: T.
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


def _copy_features(encoded: Any) -> Any:
    """A shallow copy without the vision tower's hidden states: ``generate`` writes into what it is given."""
    found = {name: getattr(encoded, name, None) for name in _FEATURES}
    return type(encoded)(**{name: value for name, value in found.items() if value is not None})


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        items: Sequence[Any] = value
        return [tensor for item in items for tensor in _tensors(item)]
    return []


def _nbytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
