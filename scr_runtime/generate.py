"""The shadowed ``generate``: while SCR is attached, a prefill knows which call it belongs to, and what that chose."""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor

from scr_runtime.errors import EditNotFiredError, PrefillError
from scr_runtime.families import Family
from scr_runtime.here import Running, here
from scr_runtime.layout import VisualLayout
from scr_runtime.payload import Payload, encoded_images, image_tensors
from scr_runtime.shadows import Inner, Shadows
from scr_runtime.sources import Choice

_MOST_FROZEN = 8


@dataclass(frozen=True)
class Frozen:
    """What one prefill of a ``generate`` chose. The call's later prefills of the same prompt choose it again.

    Attributes:
        payload: Its images.
        tokens: [B, P] int64, its prompt; drafts of assisted decoding are not part of it.
        grids: Grid and images of each group.
        choice: Per group.
    """

    payload: Payload
    tokens: Tensor
    grids: list[Any]
    choice: list[Choice]

    def is_of(self, call: Mapping[str, Any]) -> bool:
        """Whether a prefill is one of the same images, whose tokens begin with the same prompt."""
        ids: Tensor = call["input_ids"]
        length = self.tokens.shape[1]
        if len(ids) != len(self.tokens) or ids.shape[1] < length or not self.payload.is_of(call):
            return False
        return torch.equal(ids[:, :length].to(self.tokens), self.tokens)

    def fits(self, layout: VisualLayout) -> bool:
        """Whether the images of a prefill are as many, on the same grids, in the same order."""
        return self.grids == _grids(layout)


@dataclass(eq=False)
class GenerateCall(Running):
    """One ``generate`` call.

    Attributes:
        inputs: Its keyword arguments.
        prompt: [B, P] its prompt; ``None`` if it was not given as a tensor.
        brings_images: Whether it was called with images.
        edited: Whether a prefill of its images has been edited.
        frozen: What its prefills chose. Without a cache every step is one.
    """

    inputs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    prompt: Tensor | None = None
    brings_images: bool = False
    edited: bool = False
    frozen: list[Frozen] = field(default_factory=list[Frozen])

    @property
    def prompt_length(self) -> int | None:
        """Tokens of the prompt; ``None`` if it was not given as a tensor."""
        return None if self.prompt is None else self.prompt.shape[-1]

    @property
    def fresh_cache(self) -> bool:
        """Whether the call starts without a cache: what its own cache holds are steps of this very call."""
        return self.inputs.get("past_key_values") is None

    @property
    def choice(self) -> list[Choice] | None:
        """Per group, what the call's first prefill chose."""
        return self.frozen[0].choice if self.frozen else None

    def owns(self, call: Mapping[str, Any], foreign: bool) -> bool:
        """Whether a prefill is of the images that this ``generate`` was called with.

        Any other prefill inside the call (a logits processor that asks about another image, or about a distorted
        one) has nothing to do with it.

        Args:
            call: Keyword arguments of the prefill.
            foreign: Whether its features are known to be somebody else's: an image session's.
        """
        if not self.brings_images or foreign:
            return False
        if self.frozen:
            return any(frozen.payload.is_of(call) for frozen in self.frozen)
        given, found = encoded_images(self.inputs), encoded_images(call)
        if found is not None and (found is given or given is None):
            return found is given or self.inputs.get("pixel_values") is not None
        if (found is None) != (given is None):
            return False
        return _repeated(image_tensors(self.inputs), image_tensors(call))

    def copies(self, ids: Tensor) -> int:
        """How often each row of the prompt is in the tokens [B, S] of its prefill: as beams or returned sequences."""
        prompt = self.prompt
        if prompt is None or prompt.ndim != 2 or len(ids) <= len(prompt) or len(ids) % len(prompt):
            return 1
        copies = len(ids) // len(prompt)
        begin = ids[:, : prompt.shape[1]]
        return copies if torch.equal(begin[::copies].repeat_interleave(copies, 0), begin) else 1

    def known(self, call: Mapping[str, Any]) -> Frozen | None:
        """An earlier prefill of the same prompt and images."""
        return next((frozen for frozen in self.frozen if frozen.is_of(call)), None)

    def freeze(self, call: Mapping[str, Any], length: int | None, layout: VisualLayout, choice: list[Choice]) -> None:
        """Keeps a choice for the later prefills of the same prompt, which ends at ``length``."""
        if len(self.frozen) < _MOST_FROZEN:
            tokens = call["input_ids"][:, :length].clone()
            self.frozen.append(Frozen(Payload(call), tokens, _grids(layout), choice))


class GenerateShadow:
    """Stands in front of ``model.generate`` and keeps the running call.

    Args:
        model: A model of a supported family.
        family: Its family.
    """

    def __init__(self, model: Any, family: Family) -> None:
        self._model = model
        self._family = family
        self._calls: set[GenerateCall] = set()  # those that run, in any thread
        self._mine = weakref.WeakSet[GenerateCall]()

    @property
    def running(self) -> GenerateCall | None:
        """The innermost call of this model that runs in this thread; ``None`` outside ``generate``."""
        call = here.generate
        return call if call is not None and call in self._mine else None

    def uncached(self) -> bool:
        """Whether a call with images runs, in any thread, that makes a prefill at each step."""
        return any(call.brings_images and call.alive and self._is_uncached(call) for call in list(self._calls))

    def install(self) -> Callable[[], None]:
        """Shadows ``model.generate``; returns the undo."""
        shadows = Shadows()
        shadows.add(self._model, "generate", self.around)
        return shadows.remove

    def around(self, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls ``generate``.

        Raises:
            PrefillError: If the call asks for a chunked prefill of images.
            EditNotFiredError: If it brought images, and none of its prefills was edited.
        """
        call = self._call(args[0] if args else kwargs.get("input_ids", kwargs.get("inputs")), kwargs)
        given = args[1] if len(args) > 1 else kwargs.get("generation_config")
        self._check_not_chunked(call, self._model.generation_config if given is None else given)
        outer = here.generate
        try:
            call.begin(sys._getframe())
            self._calls.add(call)
            here.generate = call
            result = inner(*args, **kwargs)
        finally:
            here.generate = outer
            call.frame = None
            self._calls.discard(call)
        if call.brings_images and not call.edited:
            raise EditNotFiredError(
                "generate was called with images, and no prefill of them was edited: the model's forward was "
                "replaced, SCR was detached meanwhile, or a custom generate did not pass the images on"
            )
        return result

    def current(self) -> GenerateCall | None:
        """The call that the running prefill is in: transformers' own, where it was looked up before attaching."""
        mine, found = self.running, None
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and (mine is None or frame is not mine.frame):
            if frame.f_code is _generate_code() and self._shares_base(frame.f_locals.get("self")):
                if found is not None:
                    return self._adopt(found)
                found = frame
            frame = frame.f_back
        if frame is not None:
            return mine
        return None if found is None else self._adopt(found)

    def _call(self, prompt: Any, kwargs: Mapping[str, Any]) -> GenerateCall:
        prompt = prompt if isinstance(prompt, Tensor) else None
        brings = self._family.brings_images(self._model, {**kwargs, "input_ids": prompt})
        call = GenerateCall(inputs=kwargs, prompt=prompt, brings_images=brings)
        self._mine.add(call)
        return call

    def _check_not_chunked(self, call: GenerateCall, settings: Any) -> None:
        size = call.inputs.get("prefill_chunk_size", getattr(settings, "prefill_chunk_size", None))
        if size is not None and call.brings_images:
            raise PrefillError(
                f"a chunked prefill (of {size} tokens) would process the image and the question in separate passes: "
                "set prefill_chunk_size=None"
            )

    def _is_uncached(self, call: GenerateCall) -> bool:
        settings = call.inputs.get("generation_config") or self._model.generation_config
        return call.inputs.get("use_cache", getattr(settings, "use_cache", None)) is False

    def _shares_base(self, model: Any) -> bool:
        try:
            return self._family.base(model) is self._family.base(self._model)
        except AttributeError:
            return False

    def _adopt(self, frame: FrameType) -> GenerateCall | None:
        """The call of a ``generate`` that was not shadowed. It is known by its own copy of the settings."""
        values = frame.f_locals
        settings = values.get("generation_config")
        adopted: dict[int, tuple[weakref.ref[Any], GenerateCall]] = here.__dict__.setdefault("adopted", {})
        known = adopted.get(id(settings))
        if known is not None and known[0]() is settings:
            return known[1]
        kwargs: dict[str, Any] = values.get("kwargs") or {}
        prompt = values.get("inputs")
        call = self._call(kwargs.get("input_ids") if prompt is None else prompt, kwargs)
        self._check_not_chunked(call, settings)
        if settings is not None:
            forget = functools.partial(_forget, adopted, id(settings))
            adopted[id(settings)] = (weakref.ref(settings, forget), call)
        return call


def _forget(adopted: dict[int, Any], key: int, _: object) -> None:
    adopted.pop(key, None)


@functools.cache
def _generate_code() -> CodeType:
    from transformers import GenerationMixin

    return inspect.unwrap(vars(GenerationMixin)["generate"]).__code__


def _grids(layout: VisualLayout) -> list[Any]:
    return [(group.grid, group.tokens, group.images) for group in layout.groups]


def _repeated(given: list[Tensor], found: list[Tensor]) -> bool:
    """Whether tensors are those that ``generate`` was given, or their rows repeated for beams."""
    if len(given) != len(found):
        return False
    for one, other in zip(given, found, strict=True):
        if one is other:
            continue
        copies = len(other) // max(len(one), 1)
        if one.shape[1:] != other.shape[1:] or len(other) != copies * len(one):
            return False
        if not torch.equal(one.repeat_interleave(copies, 0).to(other), other):  # also one that was moved
            return False
    return True
