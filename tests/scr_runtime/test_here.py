"""The state of a thread, and what is running."""

from __future__ import annotations

import sys
import threading

import pytest

from scr_runtime.here import Running, Turns, here


def test_each_thread_has_its_own_state() -> None:
    found: list[object] = []
    here.captures = True
    try:
        thread = threading.Thread(target=lambda: found.append((here.captures, here.prefill, here.question)))
        thread.start()
        thread.join()
    finally:
        here.captures = False
    assert found == [(False, None, None)]


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
