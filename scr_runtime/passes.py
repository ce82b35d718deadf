"""A forward pass of a model with an SCR: where it begins and ends, and what happens in between.

Three methods are shadowed on their instances, so that no way into the model leads around SCR and no way out of a pass
(an interrupt, a cancelled task) leaves anything behind:

    the base model's forward    the boundary: a prefill with images is edited between its call and its return
    the decoder's forward       tells the prefill's own pass from other calls of the decoder
    the whole model's forward   sees whether a call with images went by without reaching the base
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scr_runtime.attention import AttentionRows
from scr_runtime.config import Mode, SCRConfig
from scr_runtime.deferred import DeferredChecks
from scr_runtime.diagnostic import Decoder, StateLayerOutput, block_arguments, residual_stream
from scr_runtime.errors import EditNotFiredError, NonFiniteScoresError, PrefillError, UnsupportedModelError
from scr_runtime.families import Family, uncompiled
from scr_runtime.generate import GenerateCall, GenerateShadow
from scr_runtime.here import Running, here
from scr_runtime.layout import count_mismatch, visual_layout
from scr_runtime.prefill import Act, BlockHooks, Prefill
from scr_runtime.prefix import Question
from scr_runtime.redistribute import merge_plans, plan_edit, state_norms
from scr_runtime.shadows import Inner, Shadows
from scr_runtime.sources import Choice, Provider

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


@dataclass(eq=False, kw_only=True)
class OuterCall(Running):
    """One call of the whole model.

    Attributes:
        passes: Whose.
        reached: Whether it has reached the base model.
        finished: Its prefills that are over; they count when the call returns.
    """

    passes: Passes
    reached: bool = False
    finished: list[Prefill] = field(default_factory=list[Prefill])


class Asked(NamedTuple):
    """Who chooses the sources of a prefill. Replaced as one, between the choices of two prefills.

    Attributes:
        provide: State layer output -> scores.
        wide: Whether a predictor reads the question's states too.
    """

    provide: Provider
    wide: bool


class Passes:
    """The forward passes of one model under one SCR.

    Args:
        model: The model.
        family: Its family.
        config: The settings in force.
        mode: The SCR's.
        asked: Chooses the sources.
        finished: What to do with a prefill that is over.
    """

    def __init__(
        self,
        model: Any,
        family: Family,
        config: SCRConfig,
        mode: Mode,
        asked: Asked,
        finished: Callable[[Prefill], None],
    ) -> None:
        self.checks = DeferredChecks()
        self.generate = GenerateShadow(model, family)
        self._model = model
        self._family = family
        self._config = config
        self.asked = asked
        self._diagnoses = mode in ("two-pass", "auto")
        self._online = mode == "online"
        self._modules = frozenset(module for block in family.blocks(model) for module in block.modules())
        self._finished = finished
        self._blocks = family.blocks(model)
        self.base = uncompiled(family.base(model))
        self._decoder = uncompiled(family.decoder(model))
        self._names = tuple(inspect.signature(self.base.forward).parameters)
        self._decoder_names = tuple(inspect.signature(self._decoder.forward).parameters)
        self._outer_names = tuple(inspect.signature(model.forward).parameters)
        self._eager_base: Any = torch.compiler.disable(self._around_base, reason="SCR edits prefills with images")
        (first, last), state = config.edit_layers, config.state_layer
        edits = {layer: functools.partial(_edit, layer) for layer in range(max(first, state + 1), last + 1)}
        acts: dict[int, Act] = {state: self._after_state_layer, **edits}
        if self._online:
            acts[config.attention_layers[1]] = self._after_map
        self.hooks = BlockHooks(self._blocks, acts)
        if family.between_blocks is not None:
            self.hooks.keep_calls_of(self._decoder)

    def shadow(self, shadows: Shadows) -> None:
        """Installs the shadows; nothing happens in them before ``hooks.active``."""
        shadows.add(self.base, "forward", self.around_base)
        if self._decoder is not self.base:
            shadows.add(self._decoder, "forward", self.around_decoder)
        shadows.add(self._model, "forward", self.around_model)
        shadows.add(self._model, "generate", self.generate.around)
        if self._family.tap is not None:
            for layer, block in enumerate(self._blocks):
                shadows.add(*self._family.tap(block, layer))

    # -- shadows -------------------------------------------------------------------------------------------------

    def around_model(self, inner: Inner, args: Args, kwargs: Kwargs) -> Any:
        """The whole model's forward: an image that went around the base model is an error."""
        if torch.compiler.is_compiling() or not self.hooks.active:
            return inner(*args, **kwargs)
        call, outer = OuterCall(passes=self), here.outer
        try:
            call.begin(sys._getframe())
            here.outer = call
            output = inner(*args, **kwargs)
        finally:
            here.outer = outer
        if not call.reached and self._family.brings_images(self._model, _named(self._outer_names, args, kwargs)):
            raise EditNotFiredError(
                f"a call with images did not reach {type(self.base).__name__}.forward, where SCR is attached: that "
                "forward, or the module, was replaced meanwhile. Detach, and attach again."
            )
        for prefill in call.finished:
            self._finished(prefill)
        return output

    def around_decoder(self, inner: Inner, args: Args, kwargs: Kwargs) -> Any:
        """The decoder's forward: hooks act in the prefill's own pass, and not in other calls that come between."""
        if torch.compiler.is_compiling() or not self.hooks.active:
            return inner(*args, **kwargs)
        prefill, rows = here.prefill, here.rows
        if prefill is not None and (prefill.owner is not self.hooks or not prefill.entered):
            prefill.entered |= prefill.owner is self.hooks  # of another SCR's prefill, its own shadow takes care
            return inner(*args, **kwargs)
        if here.base is None or not here.base.alive:
            self._refuse_embeddings(_named(self._decoder_names, args, kwargs), direct=True)
        try:
            here.prefill, here.rows = None, None
            return inner(*args, **kwargs)
        finally:
            here.prefill, here.rows = prefill, rows

    def around_base(self, inner: Inner, args: Args, kwargs: Kwargs) -> Any:
        """The base model's forward. Under compilation text passes through, and images come back to plain Python."""
        if torch.compiler.is_compiling() and not (self.hooks.active and self._concerns(args, kwargs)):
            return inner(*args, **kwargs)
        return self._eager_base(inner, args, kwargs)

    def _concerns(self, args: Args, kwargs: Kwargs) -> bool:
        call = _named(self._names, args, kwargs)
        embeddings = call.get("inputs_embeds")
        several = embeddings is not None and embeddings.shape[1] > 1
        return several or self._family.brings_images(self._model, call)

    def _around_base(self, inner: Inner, args: Args, kwargs: Kwargs) -> Any:
        if not self.hooks.active:
            return inner(*args, **kwargs)
        saved, capture = (here.prefill, here.rows, here.outer, here.base), here.captures
        outer = here.outer if here.outer is not None and here.outer.passes is self and here.outer.alive else None
        captures = capture is not None and capture.alive
        prefill: Prefill | None = None
        try:
            here.prefill, here.rows, here.outer, here.captures = None, None, None, None
            here.base = Running.of(sys._getframe())
            if outer is not None:
                outer.reached = True
            if captures:
                return inner(*args, **kwargs)
            self.checks.raise_failed(wait=False)
            call = _named(self._names, args, kwargs)
            if self._family.brings_images(self._model, call):
                prefill = self._start(call)
            else:
                self._refuse_embeddings(call)
            output = inner(*args, **kwargs) if prefill is None else self._edited(prefill, inner, args, kwargs)
        except BaseException:
            if prefill is not None:
                self.checks.drop(prefill)
            raise
        finally:
            (here.prefill, here.rows, here.outer, here.base), here.captures = saved, capture
        if prefill is not None and prefill.fired and outer is not None:
            outer.finished.append(prefill)
        elif prefill is not None and prefill.fired:
            self._finished(prefill)
        return output

    def _edited(self, prefill: Prefill, inner: Inner, args: Args, kwargs: Kwargs) -> Any:
        """Runs a prefill between the registration of its hooks and their removal."""
        generate = prefill.generate
        try:
            prefill.begin(sys._getframe())
            if not self.hooks.acquire(prefill):
                return inner(*args, **kwargs)  # detached by another thread
            here.prefill = prefill
            output = inner(*args, **kwargs)
            first, last = self._config.edit_layers
            prefill.check_fired(list(range(first, last + 1)))
        finally:
            here.prefill, here.rows = None, None
            prefill.closed = True
            try:
                self.hooks.release(prefill)
            finally:  # once more: the first try may have been interrupted
                self.hooks.release(prefill)
                prefill.close()
        if generate is not None:
            generate.edited = True
        return output

    # -- the prefill ---------------------------------------------------------------------------------------------

    def _start(self, call: Kwargs) -> Prefill:
        """Finds the images of a prefill, and what it belongs to."""
        if self._model.training or self.base.training:
            raise UnsupportedModelError("the model is in training mode; call model.eval() before using SCR")
        input_ids: Tensor | None = call.get("input_ids")
        if input_ids is None:
            raise PrefillError(
                "a prefill with images but without input_ids: the visual tokens can't be found in "
                "inputs_embeds. Pass input_ids with pixel_values, or with mm_encoder_outputs."
            )
        asked = here.question if here.question is not None and here.question.brings(call) else None
        generate = self.generate.current()
        if generate is not None and not generate.owns(call, foreign=_is_foreign(asked, generate)):
            generate = None
        first = generate is not None and not generate.frozen
        known = None if generate is None or first else generate.known(call)
        own = generate if first or known is not None else None
        length = own.prompt_length if own is not None else None
        past = self._past(call, own if first else None)

        given = {key: value for key, value in call.items() if value is not None}
        images = self._family.image_grids(self._model, {**(generate.inputs if generate is not None else {}), **given})
        visual = self._family.visual_tokens(self._model, input_ids)
        mask = _tensor_mask(call.get("attention_mask"), own)
        layout = visual_layout(visual, mask, images, length, past)
        if known is not None and not known.fits(layout):
            known = None
        decoder = Decoder(self._family, self._blocks)
        prefill = Prefill(
            owner=self.hooks, call=call, layout=layout, decoder=decoder, past=past,
            generate=generate, length=length, known=known,
            question=asked if asked is not None and asked.is_asked_in(call, first) else None,
        )  # fmt: skip
        self.checks.require(layout.edge, layout.fits, lambda: _failed(prefill, count_mismatch(layout)), prefill)
        if own is not None:
            prefill.layout = layout.with_copies(own.copies(input_ids))
        return prefill

    def _past(self, call: Mapping[str, Any], first_of: GenerateCall | None) -> int:
        """Positions in the cache that the call continues. Reads a static cache's from the device."""
        cache = call.get("past_key_values")
        if cache is None or (first_of is not None and first_of.fresh_cache):
            return 0
        return int(cache.get_seq_length())

    def _after_state_layer(self, prefill: Prefill, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> None:
        hidden, layout, config = residual_stream(output), prefill.layout, self._config
        with torch.no_grad():
            if prefill.known is not None:
                prefill.choice, prefill.fresh = prefill.known.choice, False
                self._plan(prefill, hidden)
            else:
                asked, call, question = self.asked, block_arguments(module, args, kwargs), prefill.question
                state = StateLayerOutput(hidden, layout, config, prefill.decoder, call, question, asked.wide)
                prefill.norms = [state_norms(state.states(group)) for group in layout.groups]
                if self._online:  # from here on the pass reads its own attention
                    rows = AttentionRows(config.attention_layers, layout.text_rows, prefill.past, self._modules)
                    prefill.rows = here.rows = rows
                else:
                    self._choose(state, prefill, asked.provide)
        if config.edit_layers[0] == config.state_layer:
            prefill.edit(config.state_layer, output)

    def _after_map(self, prefill: Prefill, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> None:
        """Mode online: the last block of the map has run."""
        if prefill.rows is None:
            return  # an earlier prefill's sources hold, or the state layer was never seen: ``check_fired`` raises
        rows, hidden = prefill.rows, residual_stream(output)
        prefill.rows = here.rows = None
        with torch.no_grad():
            state = StateLayerOutput(hidden, prefill.layout, self._config, prefill.decoder, {}, read=rows)
            self._choose(state, prefill, self.asked.provide)

    def _choose(self, state: StateLayerOutput, prefill: Prefill, provide: Provider) -> None:
        """Chooses the sources of a prefill, and plans its edit."""
        prefill.choice = self._choices(state, prefill, provide)
        if prefill.generate is not None:
            prefill.generate.freeze(prefill.call, prefill.length, prefill.layout, prefill.choice)
        self._plan(prefill, state.hidden)

    def _plan(self, prefill: Prefill, hidden: Tensor) -> None:
        assert prefill.choice is not None
        plans = [
            plan_edit(choice.sources, group.grid, self._config, group.positions, hidden.dtype)
            for group, choice in zip(prefill.layout.groups, prefill.choice, strict=True)
        ]
        prefill.plan = merge_plans(plans)

    def _choices(self, state: StateLayerOutput, prefill: Prefill, provide: Provider) -> list[Choice]:
        if prefill.past and self._diagnoses:
            raise PrefillError(
                "an image in a prompt that continues a filled cache: the diagnostic run would not see the "
                "earlier turns. Start from an empty cache, or use mode='one-pass'."
            )
        chosen: list[Choice] = []
        for scores, norm in zip(provide(state), prefill.norms, strict=True):
            k = scores.rule.k
            values, patches = scores.rule.rank(scores.scores)
            top = values[:, :k]  # NaN ranks first, so the best K show it
            self.checks.require(top, _all_finite, lambda: _failed(prefill, _not_finite()), prefill)
            chosen.append(Choice(scores, patches[:, :k], norm))
        return chosen

    def _refuse_embeddings(self, call: Mapping[str, Any], *, direct: bool = False) -> None:
        """Refuses prompts whose tokens were embedded by the caller: image features may be among them."""
        embeddings: Any = call.get("inputs_embeds")
        if not isinstance(embeddings, Tensor) or embeddings.ndim < 3 or embeddings.shape[1] < 2:
            return
        if direct and _called_by_parent(self._decoder):
            return  # the decoder's share of another model's call
        ids: Tensor | None = call.get("input_ids")
        if ids is not None and not bool(self._family.visual_tokens(self._model, ids).any()):
            return  # text; the model itself refuses both together
        raise PrefillError(
            f"inputs_embeds of {embeddings.shape[1]} positions: image features may be among them, and where they are "
            "can't be seen. Pass input_ids with pixel_values, or with mm_encoder_outputs; detach SCR for text that "
            "you embed yourself."
        )


def _edit(layer: int, prefill: Prefill, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> None:
    prefill.edit(layer, output)


def _named(names: tuple[str, ...], args: Args, kwargs: Kwargs) -> Kwargs:
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _is_foreign(asked: Question | None, generate: GenerateCall) -> bool:
    """Whether a prefill's features are a session's that ``generate`` was not called with."""
    return asked is not None and not asked.brings(generate.inputs)


def _tensor_mask(mask: Any, own: GenerateCall | None) -> Any:
    """A call's mask; where it is none that can be read, that of the ``generate`` it is in."""
    if mask is None or isinstance(mask, Tensor | Mapping):
        return mask
    given = None if own is None else own.inputs.get("attention_mask")
    if own is None or (given is not None and not isinstance(given, Tensor)):
        raise PrefillError(
            f"an attention mask of type {type(mask).__name__}: padding can't be read from it. Pass attention_mask as "
            "a tensor [batch, tokens]."
        )
    return given


def _called_by_parent(module: nn.Module) -> bool:
    """Whether a method of a module that holds this one is on the stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and any(child is module for child in owner.children()):
            return True
        frame = frame.f_back
    return False


def _failed(prefill: Prefill, error: Any) -> Any:
    prefill.failed = True
    return error


def _all_finite(values: list[list[float]]) -> bool:
    return all(math.isfinite(value) for row in values for value in row)


def _not_finite() -> NonFiniteScoresError:
    return NonFiniteScoresError(
        "the source scores of a prefill hold NaN or infinity, so its output is not usable. Causes seen: no text "
        "after the image in the prompt, activations that overflow float16, a damaged predictor. mode='auto' runs "
        "two-pass instead of a failing predictor."
    )
