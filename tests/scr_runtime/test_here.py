"""The state of a thread, and what is running."""

from __future__ import annotations

import gc
import sys
import threading
from typing import Any

import pytest
import torch

from scr_runtime import SCR, SCRConfig
from scr_runtime.errors import PrefillError
from scr_runtime.here import Running, Turns, frames_of_threads, here


def test_each_thread_has_its_own_state() -> None:
    found: list[object] = []
    here.captures = Running()
    try:
        thread = threading.Thread(target=lambda: found.append((here.captures, here.prefill, here.question)))
        thread.start()
        thread.join()
    finally:
        here.captures = None
    assert found == [(None, None, None)]


def test_what_an_interrupt_left_behind_does_not_count(tiny_llava: Any, llava_inputs: Any) -> None:
    """As if an exception had come in the very lines that put the state back."""

    def ended() -> Running:
        return Running.of(sys._getframe())

    model = tiny_llava()
    inputs = llava_inputs(model, [1])
    config = SCRConfig(num_sources=4, edit_layers=(0, 2), attention_layers=(2, 4))
    with torch.no_grad(), SCR(model, config=config, mode="two-pass") as scr:
        expected = model(**inputs).logits
        try:
            here.base, here.captures = ended(), ended()
            assert torch.equal(model(**inputs).logits, expected) and scr.stats.prefills == 2
            with pytest.raises(PrefillError):
                model.model.language_model(inputs_embeds=torch.randn(1, 5, 32))
        finally:
            here.base, here.captures = None, None


def test_something_runs_as_long_as_its_frame_is_on_the_stack() -> None:
    running = Running()
    assert not running.alive
    inside, leave = threading.Event(), threading.Event()

    def run() -> None:
        def deeper() -> None:
            assert running.alive
            inside.set()
            leave.wait(10)

        running.begin(sys._getframe())
        deeper()

    thread = threading.Thread(target=run)
    thread.start()
    assert inside.wait(10)
    assert running.alive  # seen from another thread
    leave.set()
    thread.join()
    assert not running.alive

    def die() -> None:
        running.begin(sys._getframe())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        die()
    assert caught.tb is not None
    assert not running.alive  # although the traceback keeps the frame


def test_turns_nest_and_end_with_an_exception() -> None:
    turns = Turns()

    @turns
    def fail(depth: int) -> None:
        if depth:
            fail(depth - 1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail(3)
    taken: list[bool] = []
    thread = threading.Thread(target=lambda: taken.append(turns.acquire(timeout=5)))
    thread.start()
    thread.join()
    assert taken == [True]


def test_no_collection_while_the_frames_of_threads_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPython stops for good if one comes in there: it once did, in the middle of a prefill."""
    read, collecting = sys._current_frames, []

    def current_frames() -> Any:
        collecting.append(gc.isenabled())
        return read()

    monkeypatch.setattr(sys, "_current_frames", current_frames)
    running = Running.of(sys._getframe())
    assert running.alive and not collecting  # its own thread's frames are at hand
    assert threading.get_ident() in frames_of_threads()
    running.thread += 1
    assert not running.alive
    assert collecting and not any(collecting) and gc.isenabled()
    gc.disable()
    try:
        frames_of_threads()
        assert not gc.isenabled()
    finally:
        gc.enable()
