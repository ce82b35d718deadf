"""Several questions about one image: what depends on the image alone is computed once and kept.

Two things stay the same from question to question:

    image features              the vision tower runs once, when the session opens
    keys and values, no edit    of the prompt up to its last visual token, in the blocks that the diagnostic run
                                enters (``scr_runtime.prefix``)

The edited pass itself runs in full for every question, since its sources, and with them all edited states, differ.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from scr_runtime.attention import takes_mask_tensor
from scr_runtime.errors import SessionError, UnsupportedModelError
from scr_runtime.families import Family
from scr_runtime.payload import encoded_images, tensors_in
from scr_runtime.prefix import KeptPrefix, Question

_PIXELS = "pixel_values"
_FEATURES = ("pooler_output", "deepstack_features")  # what models read from pre-encoded images


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
        features = [part for name in _FEATURES for part in tensors_in(getattr(self._features, name, None))]
        held = [*features, *tensors_in(list(self._image.values()))]
        return self._kept.nbytes + sum(tensor.nbytes for tensor in held)

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
        readable = takes_mask_tensor(self._family.text_config(self._model))
        return Question(kept, starts, readable, inputs["input_ids"], encoded_images(call)), call

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


def _copy_features(encoded: Any) -> Any:
    """A shallow copy without the vision tower's hidden states: ``generate`` writes into what it is given."""
    found = {name: getattr(encoded, name, None) for name in _FEATURES}
    return type(encoded)(**{name: value for name, value in found.items() if value is not None})
