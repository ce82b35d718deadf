"""One edited prefill, and the hooks on the decoder that exist only while one runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from scr_runtime.attention import AttentionRows
from scr_runtime.diagnostic import Decoder, residual_stream
from scr_runtime.errors import EditNotFiredError
from scr_runtime.generate import Frozen, GenerateCall
from scr_runtime.here import Running, Turns, here
from scr_runtime.layout import VisualLayout
from scr_runtime.prefix import Question
from scr_runtime.redistribute import EditPlan, apply_edit
from scr_runtime.sources import Choice

_TURNS = Turns()


@dataclass(eq=False, kw_only=True)
class Prefill(Running):
    """One prefill with images, from the base model's call to its end.

    Attributes:
        owner: The hooks that serve it.
        call: Keyword arguments of the base model's call.
        layout: Where its images are.
        decoder: The decoder that runs it.
        past: Positions of the filled cache that it continues.
        generate: The ``generate`` whose own prefill it is; ``None`` outside one.
        length: Tokens of its prompt; ``None`` for all.
        known: An earlier prefill of the same prompt in the same ``generate``, whose sources hold for it.
        question: The image session's question that it is.
        fresh: Whether its sources were chosen here, and not in an earlier step of the same ``generate``.
        entered: Whether its own pass has reached the decoder; what comes there later is another call.
        closed: Whether it is over.
        failed: Whether a check of it has failed, perhaps after it was over.
        fired: The blocks that have been edited.
        norms: Per group, [I, N] l2 norms of the patches' states behind the state layer.
        rows: In mode online, what is read of its attention; ``None`` before the state layer.
        choice: Its sources, per group; ``None`` before they are known.
        plan: The edit; ``None`` before.
    """

    owner: BlockHooks
    call: dict[str, Any]
    layout: VisualLayout
    decoder: Decoder
    past: int
    generate: GenerateCall | None = None
    length: int | None = None
    known: Frozen | None = None
    question: Question | None = None
    fresh: bool = True
    entered: bool = False
    closed: bool = False
    failed: bool = False
    fired: list[int] = field(default_factory=list[int])
    norms: list[Tensor] = field(default_factory=list[Tensor])
    rows: AttentionRows | None = None
    choice: list[Choice] | None = None
    plan: EditPlan | None = None

    def edit(self, layer: int, output: Any) -> None:
        """Edits a block's output in place."""
        if self.plan is None:
            return  # the state layer was never seen: ``check_fired`` raises
        apply_edit(residual_stream(output), self.plan)
        self.fired.append(layer)

    def check_fired(self, expected: list[int]) -> None:
        """Checks that each edit was made, and made once.

        Raises:
            EditNotFiredError: If not.
        """
        if self.fired != expected:
            raise EditNotFiredError(
                f"blocks {expected} should have been edited in this prefill, but {self.fired} were. A language model "
                "that is compiled as a whole ignores hooks where an earlier call was traced without them: compile "
                "its blocks one by one. A block that is called on its own during a prefill is edited once more."
            )

    def close(self) -> None:
        """Lets go of what only the running pass needs; reports need the rest."""
        self.closed, self.frame = True, None
        self.call, self.generate, self.known, self.question = {}, None, None, None
        self.norms, self.rows = [], None
        self.decoder.call.clear()

    def counted(self) -> list[Choice]:
        """Per group, the choice for the images of the prompt: beams' copies of them are left out."""
        assert self.choice is not None
        firsts = map(self.layout.firsts, self.layout.groups)
        return [choice.only(places) for choice, places in zip(self.choice, firsts, strict=True)]


Act = Callable[[Prefill, nn.Module, tuple[Any, ...], dict[str, Any], Any], None]
"""(prefill, module, arguments, keyword arguments, output) -> what a hook does in that prefill."""


class BlockHooks:
    """Forward hooks on the decoder, registered while a prefill of this SCR runs in any thread, and at no other time.

    All threads' passes meet them. A hook acts in the prefill whose decoder runs in its own thread, and only if that
    is a prefill of this SCR.

    Args:
        blocks: The decoder blocks.
        acts: Block -> what its hook does.
    """

    def __init__(self, blocks: nn.ModuleList, acts: dict[int, Act]) -> None:
        self._blocks = blocks
        self._hooks = {layer: self._hook(act) for layer, act in acts.items()}
        self._decoder: nn.Module | None = None
        self._keep = self._hook(_keep_call)
        self._running: set[Prefill] = set()
        self._registered = False  # whether there may be hooks
        self.active = False

    def keep_calls_of(self, decoder: nn.Module) -> None:
        """Keeps the keyword arguments of the decoder's own calls in ``Prefill.decoder.call``."""
        self._decoder = decoder

    @_TURNS
    def acquire(self, prefill: Prefill) -> bool:
        """Begins a prefill; ``False`` if the SCR has been detached meanwhile."""
        if self.active:
            self._running.add(prefill)
            self._match()
        return self.active

    @_TURNS
    def release(self, prefill: Prefill) -> None:
        """Ends a prefill, however often it is called; the last one takes the hooks with it."""
        self._running.discard(prefill)
        self._match()

    @_TURNS
    def stop(self) -> bool:
        """Ends it all, unless a prefill is running in any thread: ``False`` then."""
        if any(prefill.alive for prefill in self._running):
            return False
        self.active = False
        self._running.clear()
        self._match()
        return True

    def _match(self) -> None:
        """Makes the hooks on the modules those that are needed. Prefills that have died don't need any."""
        self._running = {prefill for prefill in self._running if prefill.alive}
        needed = bool(self._running)
        if not (needed or self._registered):
            return
        self._registered = True
        places: list[tuple[nn.Module, Any, bool]] = [
            (self._blocks[layer], hook, False) for layer, hook in self._hooks.items()
        ]
        if self._decoder is not None:
            places.append((self._decoder, self._keep, True))
        for module, hook, before in places:
            table: Any = module._forward_pre_hooks if before else module._forward_hooks
            keys = [key for key, other in list(table.items()) if other is hook]
            if needed and not keys:
                register = module.register_forward_pre_hook if before else module.register_forward_hook
                register(hook, with_kwargs=True)
            for key in () if needed else keys:
                _remove(module, key)
        self._registered = needed

    def _hook(self, act: Act) -> Any:
        @torch.compiler.disable(reason="SCR edits prefills between compiled blocks")  # pyright: ignore[reportUntypedFunctionDecorator]
        def hook(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
            prefill = here.prefill
            if prefill is not None and prefill.owner is self and not prefill.closed:
                kwargs = rest[0] if rest and isinstance(rest[0], dict) else {}
                act(prefill, module, args, kwargs, rest[-1] if rest else None)

        return hook


def _keep_call(
    prefill: Prefill, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    prefill.decoder.call.update(kwargs)


def _remove(module: nn.Module, key: int) -> None:
    """What a RemovableHandle does; the handle may be lost, in a call that was interrupted.

    The hook itself goes last: until then an interrupted removal is found, and finished, by the next.
    """
    for name in (
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_forward_hooks",
        "_forward_pre_hooks",
    ):
        getattr(module, name, {}).pop(key, None)
