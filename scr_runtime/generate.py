"""The shadowed ``generate``: while SCR is attached, it knows which call is running, and how long its prompt is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from scr_runtime.errors import PrefillError
from scr_runtime.families import Family
from scr_runtime.sources import Scores


@dataclass(frozen=True)
class Choice:
    """The sources of one group of images in a prefill.

    Attributes:
        scores: What the provider said.
        sources: [I, K] int64, best first.
        norms: [I, N] float32 l2 norms of the patches' states before the edit.
    """

    scores: Scores
    sources: Tensor
    norms: Tensor


@dataclass
class GenerateCall:
    """One running ``generate`` call.

    Attributes:
        prompt_length: Tokens of the prompt; ``None`` if it was not given as a tensor.
        fresh_cache: Whether the call starts without a cache: what its own cache holds are steps of this very call.
        inputs: The call's keyword arguments.
        choice: Per group, what the call's first prefill chose; without a cache every further step uses it again.
    """

    prompt_length: int | None
    fresh_cache: bool
    inputs: Mapping[str, Any]
    choice: list[Choice] | None = None


class GenerateShadow:
    """Stands in front of ``model.generate`` and keeps the running call.

    Args:
        model: A model of a supported family.
        family: Its family.

    Attributes:
        running: The innermost running call; ``None`` outside ``generate``.
    """

    def __init__(self, model: Any, family: Family) -> None:
        self._model = model
        self._family = family
        self.running: GenerateCall | None = None

    def install(self) -> Callable[[], None]:
        """Shadows ``model.generate`` with an attribute of the instance; returns the undo.

        The shadow raises a PrefillError where the call asks for a chunked prefill of images.
        """
        inner = self._model.generate
        shadowed = self._model.__dict__.get("generate")

        def generate(*args: Any, **kwargs: Any) -> Any:
            self._check_not_chunked(args, kwargs)
            prompt = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
            outer = self.running
            self.running = GenerateCall(
                prompt_length=prompt.shape[-1] if isinstance(prompt, Tensor) else None,
                fresh_cache=kwargs.get("past_key_values") is None,
                inputs=kwargs,
            )
            try:
                return inner(*args, **kwargs)
            finally:
                self.running = outer

        def restore() -> None:
            self._model.__dict__.pop("generate", None)
            if shadowed is not None:
                self._model.__dict__["generate"] = shadowed

        self._model.__dict__["generate"] = generate
        return restore

    def _check_not_chunked(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = args[1] if len(args) > 1 else kwargs.get("generation_config")
        settings: Any = self._model.generation_config if given is None else given
        size = kwargs.get("prefill_chunk_size", getattr(settings, "prefill_chunk_size", None))
        if size is not None and self._family.brings_images(self._model, kwargs):
            raise PrefillError(
                f"a chunked prefill (of {size} tokens) would process the image and the question in separate passes: "
                "set prefill_chunk_size=None"
            )
