"""Shadows of methods: in front of each other, gone in any order, and never in copies."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from scr_runtime.shadows import Shadow, Shadows, shadow_of


class Model(nn.Module):
    """A module at the top of a file, so that it can be pickled."""

    def forward(self, x: int, *, y: int = 1) -> list[Any]:
        return [x, y]


def noting(name: str) -> Any:
    def around(inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return [name, *inner(*args, **kwargs)]

    return around


def test_a_shadow_stands_in_front_of_its_method() -> None:
    model = Model()
    before = dict(vars(model))
    shadows = Shadows()
    shadows.add(model, "forward", noting("a"))
    assert model(5, y=2) == ["a", 5, 2]
    assert Model.forward(model, 5) == [5, 1]
    assert inspect.signature(model.forward) == inspect.signature(Model().forward)
    assert list(model.state_dict()) == []
    shadows.remove()
    shadows.remove()
    assert vars(model) == before
    assert model(5) == [5, 1]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
@pytest.mark.parametrize("own", [False, True], ids=["method", "attribute"])
def test_shadows_go_in_any_order(order: tuple[int, ...], own: bool) -> None:
    model: Any = Model()
    if own:
        model.forward = lambda x: ["own", x]
    before = dict(vars(model))
    names = "abc"
    all_shadows = [Shadows() for _ in names]
    for name, shadows in zip(names, all_shadows, strict=True):
        shadows.add(model, "forward", noting(name))
    left = list(range(3))
    for place in order:
        end = ["own", 5] if own else [5, 1]
        assert model(5) == [names[kept] for kept in reversed(left)] + end
        all_shadows[place].remove()
        left.remove(place)
    assert vars(model) == before


def test_a_function_that_somebody_put_in_front_stays() -> None:
    """Their wrapper keeps the shadow, which lets all calls pass from then on."""
    model: Any = Model()
    shadows = Shadows()
    shadows.add(model, "forward", noting("a"))
    kept = model.forward
    model.forward = lambda x: ["theirs", *kept(x)]
    assert model(5) == ["theirs", "a", 5, 1]
    shadows.remove()
    assert model(5) == ["theirs", 5, 1]
    assert shadow_of(model.forward) is None
    assert shadow_of(kept) is not None


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
                         ids=["copy", "deepcopy", "pickle"])  # fmt: skip
@pytest.mark.parametrize("own", [False, True], ids=["method", "attribute"])
def test_copies_have_no_shadow(make: Callable[[Any], Any], own: bool) -> None:
    model: Any = Model()
    if own:
        model.forward = _own
    first, second = Shadows(), Shadows()
    first.add(model, "forward", noting("a"))
    second.add(model, "forward", noting("b"))
    for other in (make(model), make(nn.ModuleList([model]))[0] if make is not copy.copy else make(model)):
        assert other(5) == (["own", 5] if own else [5, 1])
        assert [name for name, value in vars(other).items() if shadow_of(value) is not None] == []
    assert model(5)[:2] == ["b", "a"]
    second.remove()
    first.remove()


def _own(x: int) -> list[Any]:
    return ["own", x]


def test_a_wrapper_of_a_shadow_is_no_shadow() -> None:
    """``functools.wraps`` copies attributes; whoever wraps a shadow is not taken for it."""
    import functools

    model: Any = Model()
    shadow = Shadow(model, "forward", noting("a"))
    shadow.install()
    wrapped = functools.wraps(shadow.function)(lambda *args: shadow.function(*args))
    assert shadow_of(shadow.function) is shadow
    assert shadow_of(wrapped) is None
    assert shadow_of(None) is shadow_of(torch.nn.Linear) is None
    shadow.remove()
