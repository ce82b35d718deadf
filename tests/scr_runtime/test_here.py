"""The state of a thread, and what is running."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import pytest
import torch

from scr_runtime import SCR, SCRConfig
from scr_runtime.errors import PrefillError
from scr_runtime.here import Running, Turns, here


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


WALKED = """
import gc, sys, threading, time
from scr_runtime.here import Running

class Slow:
    def __init__(self):
        self.itself = self  # only a garbage collection ends it

    def __del__(self):
        time.sleep(.0003)  # the other thread goes on

def deeper(levels):
    return deeper(levels - 1) if levels else sorted([3, 1, 2], key=lambda value: -value)

def other(levels=50):
    first = second = third = fourth = fifth = (levels,)
    return other(levels - 1) if levels else [str(value) for value in (first, second, third)]

def run():
    running.begin(sys._getframe())
    begun.set()
    for turn in range(10**9):
        deeper(turn % 200)
        other()
        if stop.is_set():
            return

running, begun, stop = Running(), threading.Event(), threading.Event()
sys.setswitchinterval(1e-6)
gc.set_threshold(20)
thread = threading.Thread(target=run, daemon=True)
thread.start()
assert begun.wait(10)
for _ in range(1000):
    Slow()
    assert running.alive
stop.set()
thread.join()
assert not running.alive
"""


def test_a_collection_while_another_threads_call_is_asked_for() -> None:
    """Walking that thread's frames gave freed memory with Python 3.11: a segmentation fault, an error, or no end."""
    subprocess.run([sys.executable, "-c", WALKED], check=True, timeout=60)
