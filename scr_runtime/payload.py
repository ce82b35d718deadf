"""The images of a call, as the very tensors that they come in: which prefills are of the same images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in a value: itself, or those of its lists and tuples."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        items: Sequence[Any] = value
        return [tensor for item in items for tensor in tensors_in(item)]
    return []


def encoded_images(call: Mapping[str, Any]) -> Any:
    """What the vision tower made of a call's images before the call; ``None`` if that is still to be done."""
    return (call.get("mm_encoder_outputs") or {}).get("image")


def image_tensors(call: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that a call's images come in: features if there are any, else pixels."""
    encoded = encoded_images(call)
    if encoded is not None:
        return tensors_in(getattr(encoded, "pooler_output", None))
    return tensors_in(call.get("pixel_values"))


class Payload:
    """The images of one call, to compare later calls with.

    Args:
        call: Keyword arguments of a forward call.
    """

    def __init__(self, call: Mapping[str, Any]) -> None:
        self._parts = [(tensor, _mark(tensor)) for tensor in image_tensors(call)]
        self._encoded = encoded_images(call) is not None

    def is_of(self, call: Mapping[str, Any]) -> bool:
        """Whether another call brings the same images: the same tensors, not written to since, or equal ones."""
        others = image_tensors(call)
        if len(others) != len(self._parts) or (encoded_images(call) is not None) != self._encoded:
            return False
        return all(
            _unchanged(*part) and _equal(part[0], other) for part, other in zip(self._parts, others, strict=True)
        )


def _mark(tensor: Tensor) -> int | Tensor:
    """What tells whether a tensor has been written to: its version; a copy of one that has none."""
    return tensor.clone() if tensor.is_inference() else tensor._version


def _unchanged(tensor: Tensor, mark: int | Tensor) -> bool:
    return torch.equal(tensor, mark) if isinstance(mark, Tensor) else tensor._version == mark


def _equal(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    same = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
    return same and torch.equal(one, other)
