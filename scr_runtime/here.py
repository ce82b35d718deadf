"""What runs in this thread: the state of a call, kept where the call is and not where the model is.

Forward passes are synchronous and nest within a thread, so that what runs in a thread is a stack: whoever enters
writes down what was there, and puts it back when it leaves. An interrupt in that very line leaves it behind; so what
stands here is bound to a frame, and counts while that is on the stack. Other threads see nothing of it. No lock is
held while a model runs: a call that starts another one, in this thread or in one that it waits for, can't block
itself.
"""

from __future__ import annotations

import _thread
import threading
from contextlib import ContextDecorator
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scr_runtime.attention import AttentionRows
    from scr_runtime.generate import GenerateCall
    from scr_runtime.passes import OuterCall
    from scr_runtime.prefill import Prefill
    from scr_runtime.prefix import Question


class Here(threading.local):
    """The state of the calls that run in this thread.

    Attributes:
        prefill: The edited prefill whose decoder runs; ``None`` in any other pass, the nested diagnostic run included.
        rows: Where attention of this thread is read to: that of the diagnostic run, or in mode online of the prefill.
        outer: The call of the whole model around the pass.
        base: The pass of a base model that runs.
        captures: The capture whose pass comes next, and so is never edited.
        generate: The innermost ``generate`` of a model with an SCR.
        question: The innermost question of an image session.
    """

    prefill: Prefill | None = None
    rows: AttentionRows | None = None
    outer: OuterCall | None = None
    base: Running | None = None
    captures: Running | None = None
    generate: GenerateCall | None = None
    question: Question | None = None


here = Here()


@dataclass(eq=False)
class Running:
    """Something that runs as long as a frame is on its thread's stack, however it ends.

    Attributes:
        frame: Of a function, not of a generator. ``None`` before it has begun and after it has ended.
    """

    frame: FrameType | None = field(default=None, repr=False)

    def begin(self, frame: FrameType) -> None:
        """Binds it to a running frame."""
        self.frame = frame

    @classmethod
    def of(cls, frame: FrameType) -> Running:
        """What runs in a frame."""
        running = cls()
        running.begin(frame)
        return running

    @property
    def alive(self) -> bool:
        """Whether the frame is still on its thread's stack. One that has ended loses its local variables.

        No other thread's frames are walked: before Python 3.12 a garbage collection within ``f_back`` may let that
        thread go on, and what ``f_back`` then gives is freed memory.
        """
        if self.frame is None:
            return False
        try:
            self.frame.clear()
        except RuntimeError:  # it is executing
            return True
        return False


class Turns(ContextDecorator, _thread.RLock):  # pyright: ignore[reportGeneralTypeIssues]
    """A lock, as a decorator: one thread at a time is in the functions that it decorates. No user's code runs there.

    Signals and tracers may raise at any line of ours; none of these lines is between the lock's acquisition and its
    release, but for the function's own, whose exceptions release it.
    """
