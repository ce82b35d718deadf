"""What a source provider may look at once the state layer has run: states, question, and the diagnostic run.

The diagnostic run enters the next blocks on the same output and reads their text-to-image attention, the map that
the paper's first pass makes.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Mapping
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from scr_runtime.attention import AttentionRows, MapComplete, Selected
from scr_runtime.checks import attention_of
from scr_runtime.config import SCRConfig
from scr_runtime.errors import UnsupportedModelError
from scr_runtime.families import BATCH_DIMENSION, Family, uncompiled
from scr_runtime.here import here
from scr_runtime.layout import ImageGroup, VisualLayout
from scr_runtime.prefix import NestedRun, Question


@dataclass(frozen=True)
class Decoder:
    """A model's decoder during one forward call.

    Attributes:
        family: Whose blocks these are.
        blocks: The decoder blocks.
        call: Keyword arguments of the decoder's own call, kept while it runs where the family needs them.
    """

    family: Family
    blocks: nn.ModuleList
    call: dict[str, Any] = field(default_factory=dict[str, Any])

    def keep_call(self, model: nn.Module) -> Callable[[], None]:
        """Keeps the decoder's calls from now on; returns the undo."""
        if self.family.between_blocks is None:
            return lambda: None
        thread = threading.get_ident()

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if threading.get_ident() == thread:
                self.call.update(kwargs)

        return self.family.decoder(model).register_forward_pre_hook(keep, with_kwargs=True).remove


def residual_stream(output: Any) -> Tensor:
    """[B, S, d] residual stream of a block's output, which is a tensor in some families and a tuple in others."""
    return output[0] if isinstance(output, tuple) else output


def block_arguments(block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a block's call by name, without the hidden states, which come first."""
    if len(args) < 2:
        return dict(kwargs)
    names = list(inspect.signature(block.forward).parameters)[1:]
    return dict(kwargs) | dict(zip(names, args[1:], strict=False))


@dataclass(frozen=True)
class StateLayerOutput:
    """What providers may look at, at the moment the block ``config.state_layer`` has run.

    Attributes:
        hidden: [B, S, d] output of that block, not edited yet.
        layout: Where the images are.
        config: The method's settings.
        decoder: The decoder that is running.
        call: That block's arguments by name, without the hidden states.
        asked: The image session's question that this prompt is; ``None`` outside a session.
        wide: Whether a predictor will read patches and text: ``hidden`` is then converted to float32 once for both.
        read: In mode online, what the running pass has read of its own attention; ``hidden`` is then the output of
            the last block of ``config.attention_layers``.
    """

    hidden: Tensor
    layout: VisualLayout
    config: SCRConfig
    decoder: Decoder
    call: Mapping[str, Any]
    asked: Question | None = None
    wide: bool = False
    read: AttentionRows | None = None
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
        cost nothing. The blocks' own hooks, a user's among them, run as in the pass: the map is that of the model
        that answers. SCR's hooks do nothing there.

        Args:
            rows: Batch rows to run; ``None`` for all.

        Returns:
            Per group, [I, N] float32: attention from text to patches, averaged over text rows, heads and
            ``attention_layers`` (arXiv 2602.22469). Images in other rows get meaningless values.

        Raises:
            UnsupportedModelError: If the blocks' masks differ, or their attention was changed after attaching.
        """
        call, index = self._diagnostic_call(rows)
        rows = None if index is None else rows
        hidden = self.hidden if index is None else self.hidden[index]
        captured = AttentionRows(self.config.attention_layers, self.layout.text_rows)
        run = NestedRun(hidden, call, captured, _cache_name(self.call))
        if self.asked is not None and self.decoder.family.tap is None:
            run = self.asked.enter(run, rows, len(self.hidden))
        self._run_blocks(run, index)
        return self._maps(run.finish(self._total(run.captured)), rows)

    def running_maps(self) -> list[Tensor]:
        """The maps of ``diagnose``, of the attention of the running pass.

        Raises:
            UnsupportedModelError: If it was not seen.
        """
        assert self.read is not None
        return self._maps(self._total(self.read), None)

    def _total(self, captured: AttentionRows) -> Tensor:
        if captured.total is None or not captured.complete:
            raise self._nothing_captured()
        return captured.total

    def _diagnostic_call(self, rows: list[int] | None) -> tuple[dict[str, Any], Tensor | None]:
        """The block's arguments for some batch rows, without its cache; and [b] which, ``None`` for all.

        All rows are taken where an argument's batch dimension is unknown: slower, and as exact.
        """
        call = dict(self.call)
        call |= {key: None for key, value in call.items() if key in CACHE_NAMES or is_cache(value)}
        call |= {key: False for key in ("use_cache", "output_attentions") if key in call}
        mask = call.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 4:
            # A static cache brings columns for later tokens.
            call["attention_mask"] = mask[..., : self.hidden.shape[1]]
        if rows is None:
            return call, None
        index = torch.tensor(rows).to(self.hidden.device, non_blocking=True)
        try:
            return {key: select_rows(key, value, index, len(self.hidden)) for key, value in call.items()}, index
        except UnknownBatchDimension:
            return call, None

    def _run_blocks(self, run: NestedRun, index: Tensor | None) -> None:
        """Enters the blocks with ``run`` for the batch rows ``index``; fills ``run.captured``."""
        start, family = self.config.state_layer, self.decoder.family
        add = None
        if family.between_blocks is not None:
            if not self.decoder.call:
                raise UnsupportedModelError(
                    "the decoder's own call was not seen, so what it adds between its blocks is unknown: is it "
                    "compiled as a whole? Compile its blocks one by one."
                )
            add = family.between_blocks(self.decoder.call)

        def enter() -> None:
            hidden = run.hidden
            for layer, block in enumerate(list(self.decoder.blocks)[start:], start):
                if layer > start:  # not through __call__, which may be compiled as a whole
                    hidden = residual_stream(nn.Module._call_impl(block, hidden, **run.kwargs))
                if add is not None:
                    hidden = add(layer, hidden, index)

        blocks = list(self.decoder.blocks)
        if family.tap is None and all(map(_takes_any_keyword, blocks[start + 1 :])):
            run.kwargs["scr_rows"] = run.captured  # for compiled blocks, whose attention can't read ``here``
        outer = here.prefill, here.rows
        try:
            here.prefill, here.rows = None, run.captured
            # An empty context: transformers collects output_attentions through a context variable, and the
            # diagnostic's own must not be among them.
            Context().run(enter)
        except MapComplete:
            pass
        finally:
            here.prefill, here.rows = outer

    def _nothing_captured(self) -> UnsupportedModelError:
        """``check_depth`` has seen that the layers exist, so their attention was not the one that is read."""
        if self.decoder.family.tap is not None:
            return UnsupportedModelError(
                "the blocks' attention did not pass where its q and k are read (a fused kernel?); load the model "
                "with its plain attention, or use mode='one-pass' or 'uniform'"
            )
        attention: Any = attention_of(self.decoder.blocks[self.config.attention_layers[0]])
        implementation = getattr(getattr(attention, "config", None), "_attn_implementation", None)
        if isinstance(implementation, Selected):
            return UnsupportedModelError(
                f"the attention of {type(self.decoder.blocks[0]).__name__} was not seen by its implementation "
                f"{implementation.before!r}: its blocks work otherwise, or are compiled, which mode='online' can't "
                "read. Use mode='one-pass' or 'uniform'."
            )
        return UnsupportedModelError(
            f"the attention implementation was changed to {implementation!r} while SCR was attached; detach, change "
            "it, and attach again"
        )

    def _maps(self, total: Tensor, rows: list[int] | None) -> list[Tensor]:
        """Per group [I, N]: the patches' share of [b, T, S] attention that was summed over layers."""
        batch, length, _ = self.hidden.shape
        first, last = self.config.attention_layers
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


CACHE_NAMES = ("past_key_values", "past_key_value", "layer_past")


def is_cache(value: Any) -> bool:
    """Whether an argument of a block is a cache, whatever its name."""
    return callable(getattr(value, "get_seq_length", None))


def _cache_name(call: Mapping[str, Any]) -> str | None:
    named = [key for key, value in call.items() if is_cache(value)]
    return next(iter(named), next((key for key in CACHE_NAMES if key in call), None))


def _takes_any_keyword(block: nn.Module) -> bool:
    parameters = inspect.signature(uncompiled(block).forward).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


class UnknownBatchDimension(Exception):  # noqa: N818 - a signal, not an error
    """An argument of a block whose batch dimension is not in the table."""


def select_rows(name: str, value: Any, index: Tensor, batch: int) -> Any:
    """Takes batch rows out of one argument of a block.

    Args:
        name: The argument's name.
        value: Its value: tensors, and lists and tuples of them, may hold rows.
        index: [b] int64, the rows.
        batch: Batch rows of the pass.

    Raises:
        UnknownBatchDimension: If the argument's batch dimension is unknown.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        items = [select_rows(name, item, index, batch) for item in value]  # pyright: ignore[reportUnknownVariableType]
        return tuple(items) if isinstance(value, tuple) else items
    dimension = BATCH_DIMENSION.get(name)
    if dimension is None or not isinstance(value, Tensor):
        raise UnknownBatchDimension
    if value.ndim < -dimension or value.shape[dimension] == 1:
        return value  # the same for all rows
    if value.shape[dimension] != batch:
        raise UnknownBatchDimension
    return value.index_select(dimension, index)
