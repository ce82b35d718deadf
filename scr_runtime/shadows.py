"""Shadows: attributes of one instance that stand in front of its methods, and leave no trace when they go.

A forward hook does not see every call (``PeftModel`` calls ``model.forward``), nor every end of one (torch runs its
``always_call`` hooks on ``Exception`` only). A shadowed method sees both. Copies and pickles of a module are without
its shadows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

Inner = Callable[..., Any]
Around = Callable[[Inner, tuple[Any, ...], dict[str, Any]], Any]
"""(the method that is shadowed, arguments, keyword arguments) -> result."""

_REDUCE = "__reduce_ex__"


class Shadow:
    """One shadowed method. Several may stand in front of each other, and go in any order.

    Args:
        module: The instance.
        name: The method.
        around: What to do instead of calling it.

    Attributes:
        inner: What stood under that name before.
    """

    def __init__(self, module: nn.Module, name: str, around: Around) -> None:
        self.module = module
        self.name = name
        self.inner: Inner = getattr(module, name)
        self.own = module.__dict__.get(name)  # an attribute of the instance already, or None
        self.around: Around | None = around
        shadow = self

        @functools.wraps(self.inner, updated=())  # transformers inspects signatures; dynamo's marks stay below
        def shadowed(*args: Any, **kwargs: Any) -> Any:
            around = shadow.around
            return shadow.inner(*args, **kwargs) if around is None else around(shadow.inner, args, kwargs)

        shadowed.__dict__["scr_shadow"] = self
        self.function = shadowed

    def install(self) -> None:
        """Puts the shadow in its place."""
        self.module.__dict__[self.name] = self.function

    def remove(self) -> None:
        """Puts back what was there. Where somebody else has wrapped the shadow meanwhile, it lets all calls pass."""
        top = self.module.__dict__.get(self.name)
        if top is self.function:
            if self.own is None:
                del self.module.__dict__[self.name]
            else:
                self.module.__dict__[self.name] = self.own
        upper = shadow_of(top)
        while upper is not None:
            if upper.inner is self.function:
                upper.inner, upper.own = self.inner, self.own
            upper = shadow_of(upper.inner)
        self.around = None


def shadow_of(function: Any) -> Shadow | None:
    """The shadow that a function is; ``None`` for all other functions, wrappers of shadows included."""
    shadow = getattr(function, "__dict__", {}).get("scr_shadow")
    return shadow if isinstance(shadow, Shadow) and shadow.function is function else None


class Shadows:
    """All shadows of one SCR, or of one capture."""

    def __init__(self) -> None:
        self._shadows: list[Shadow] = []

    def add(self, module: nn.Module, name: str, around: Around) -> None:
        """Shadows a method; the module's copies and pickles from now on are without any shadow."""
        self._install(module, name, around)
        if not any(shadow.module is module and shadow.name == _REDUCE for shadow in self._shadows):
            self._install(module, _REDUCE, _reduce_unshadowed)

    def remove(self) -> None:
        """Removes all of them; it may be called again if it was interrupted."""
        for shadow in reversed(self._shadows):
            shadow.remove()
        self._shadows.clear()

    def _install(self, module: nn.Module, name: str, around: Around) -> None:
        shadow = Shadow(module, name, around)
        self._shadows.append(shadow)
        shadow.install()


def _reduce_unshadowed(inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What ``copy`` and ``pickle`` make another module from."""
    reduced = inner(*args, **kwargs)
    if isinstance(reduced, tuple) and len(reduced) > 2 and isinstance(reduced[2], dict):  # pyright: ignore[reportUnknownArgumentType]
        state: Mapping[str, Any] = reduced[2]
        return (*reduced[:2], _unshadowed(state), *reduced[3:])  # pyright: ignore[reportUnknownVariableType]
    return reduced  # pyright: ignore[reportUnknownVariableType]


def _unshadowed(state: Mapping[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, value in state.items():
        shadow = shadow_of(value)
        while shadow is not None:
            value = shadow.own
            shadow = shadow_of(value)
        if value is not None or shadow_of(state[name]) is None:
            kept[name] = value
    return kept
