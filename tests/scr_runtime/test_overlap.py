"""Calls that overlap on one model, in threads and within one another: each answer is that of the call alone."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scr_runtime import SCR, capture, errors
from tests.scr_runtime.calls import CONFIG, GREEDY, Calls, same
from tests.scr_runtime.leftovers import snapshot
from tests.scr_runtime.questions import ask
from tests.scr_runtime.reference import kept, make_predictor, reference_greedy, reference_logits
from tests.scr_runtime.test_families import GENERATING, every
from tests.scr_runtime.tiny_families import Tiny


@pytest.fixture
def _switching() -> Iterator[None]:
    """Threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def in_thread(call: Callable[[], Any]) -> Any:
    """Runs a call in a thread of its own, and waits for it."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result(60)


@pytest.fixture(scope="module")
def calls() -> Iterator[Calls]:
    found = Calls()
    yield found
    found.close()


def test_what_each_gives_alone_is_right(calls: Calls) -> None:
    for number, prompt in enumerate(calls.prompts):
        expected, _ = reference_logits(calls.model, prompt, CONFIG)
        assert torch.allclose(kept(prompt, calls.alone[f"image-{number}"]), kept(prompt, expected), atol=1e-4, rtol=0)
        greedy = reference_greedy(calls.model, prompt, CONFIG, 4)
        for kind in ("generate", "uncached"):
            assert torch.equal(calls.alone[f"{kind}-{number}"], greedy)


NAMES = [
    "text", "text-generate", "image-0", "image-1", "image-2", "generate-0", "uncached-1", "beams-2", "question-1",
    "session-generate-2", "base-1",
]  # fmt: skip
PLACES = {
    "vision tower": "model.vision_tower",
    "block 0": "model.language_model.layers.0",
    "block 1": "model.language_model.layers.1",
    "block 3": "model.language_model.layers.3",
    "norm": "model.language_model.norm",
    "head": "lm_head",
}


class Within:
    """A hook that makes one call when it is first reached, and keeps out of that call itself."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call
        self.done = False

    def __call__(self, *_: Any) -> None:
        if not self.done:
            self.done = True
            self.call()


@pytest.mark.parametrize("thread", [False, True], ids=["re-entrant", "in-a-thread"])
@pytest.mark.parametrize("place", PLACES)
def test_a_call_within_a_call(calls: Calls, place: str, thread: bool) -> None:
    """Started, and waited for, in a hook of the other: a lock would stop both for good."""
    module = calls.model.get_submodule(PLACES[place])
    for outer in ("image-1", "generate-0", "uncached-1", "question-2"):
        for inner in ("text", "image-0", "image-2", "generate-2", "session-generate-1", "uncached-2"):
            inside = (lambda inner=inner: in_thread(lambda: calls.check(inner))) if thread else (
                lambda inner=inner: calls.check(inner)
            )  # fmt: skip
            within = Within(inside)
            handle = module.register_forward_hook(within)
            try:
                calls.check(outer)
            finally:
                handle.remove()
            assert within.done or place == "vision tower"  # which a session's question does not enter


@pytest.mark.usefixtures("_switching")
def test_threads_that_take_turns_often(calls: Calls) -> None:
    @settings(deadline=None, max_examples=20)
    @given(st.lists(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4), min_size=2, max_size=4))
    def overlap(plans: list[list[str]]) -> None:
        start = threading.Barrier(len(plans))

        def run(names: list[str]) -> None:
            start.wait(60)
            for name in names:
                calls.check(name)

        with ThreadPoolExecutor(len(plans)) as pool:
            for future in [pool.submit(run, names) for names in plans]:
                future.result(120)
        blocks = calls.model.model.language_model.layers
        assert not any(block._forward_hooks for block in blocks)

    overlap()


def test_two_prefills_side_by_side_at_every_block(calls: Calls) -> None:
    """Both threads wait for each other at each block: the hooks of both are on it the whole time."""
    meet = threading.Barrier(2)
    mine = threading.local()

    def wait(*_: Any) -> None:
        if getattr(mine, "waits", False):
            meet.wait(60)

    def run(name: str) -> None:
        mine.waits = True
        calls.check(name)

    handles = [layer.register_forward_pre_hook(wait) for layer in calls.model.model.language_model.layers]
    # two-pass enters blocks 1 to 4 twice; so do both calls
    for pair in (("image-0", "image-1"), ("image-2", "question-0"), ("generate-0", "generate-1")):
        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(run, name) for name in pair]
            for future in futures:
                future.result(120)
    for handle in handles:
        handle.remove()


def test_a_first_question_in_two_threads_at_once(tiny_llava: Any, llava_inputs: Any) -> None:
    """Both make the session's first diagnostic run; its prefix is kept once."""
    model = tiny_llava(5)
    inputs = llava_inputs(model, [1], seed=5)
    questions = [ask(inputs, [count], seed) for seed, count in enumerate((5, 9))]
    with torch.no_grad(), SCR(model, config=CONFIG, mode="two-pass") as scr:
        expected = [model(**question).logits for question in questions]
        meet = threading.Barrier(2)
        with scr.image(**inputs) as image:
            handle = model.model.language_model.layers[2].register_forward_pre_hook(
                lambda *_: (meet.wait(60), None)[1]
            )
            with ThreadPoolExecutor(2) as pool:
                found = list(pool.map(lambda question: image(**question).logits, questions))
            handle.remove()
            assert all(same(one, other) for one, other in zip(found, expected, strict=True))
            assert image._kept is not None and image._kept.rows == [0]
            assert same(image(**questions[1]).logits, expected[1])


def test_asyncio_tasks(calls: Calls) -> None:
    """Tasks that share a thread, and tasks that leave theirs."""

    async def serve(name: str, leave: bool) -> None:
        for _ in range(3):
            await asyncio.sleep(0)
            if leave:
                await asyncio.to_thread(calls.check, name)
            else:
                calls.check(name)

    async def main() -> None:
        await asyncio.gather(*(serve(name, leave) for name in NAMES[:8] for leave in (False, True)))

    asyncio.run(main())


def test_reports_are_those_of_the_calling_thread(calls: Calls) -> None:
    scr, model = calls.scr, calls.model
    with torch.no_grad():
        model(**calls.prompts[0])
        mine = scr.reports
        inside: list[Any] = []

        def other() -> None:
            inside.append(scr.reports)  # none of this thread's own yet: the last that was finished
            model(**calls.prompts[1])
            inside.append(scr.reports)

        in_thread(other)
    assert inside[0] == mine
    assert len(inside[1]) == 2
    assert scr.reports == mine


def test_statistics_of_several_threads_add_up(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(5)
    predictor = make_predictor(model)
    prompts = [llava_inputs(model, [1 + seed % 2], seed=seed) for seed in range(4)]
    with SCR(model, config=CONFIG, mode="one-pass", predictor=predictor) as scr:

        def run(prompt: Any) -> None:
            with torch.no_grad():
                for _ in range(10):
                    model(**prompt)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(run, prompts))
        assert (scr.stats.prefills, scr.stats.images, scr.stats.edits) == (40, 60, 120)


def test_detaching_while_another_thread_runs_a_prefill(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(5)
    inputs = llava_inputs(model, [1], seed=5)
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        inside.set()
        assert go_on.wait(60)

    with torch.no_grad():
        expected, _ = reference_logits(model, inputs, CONFIG)
        model(**inputs)  # transformers installs its output recorders at the first call
        before = snapshot(model)
        scr = SCR(model, config=CONFIG, mode="two-pass").attach()
        handle = model.model.language_model.layers[5].register_forward_hook(wait)
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(lambda: model(**inputs).logits)
            assert inside.wait(60)
            for _ in range(2):
                with pytest.raises(errors.AttachError, match="a forward pass is running"):
                    scr.detach()
            go_on.set()
            assert torch.allclose(future.result(60), expected, atol=1e-4, rtol=0)
        handle.remove()
        scr.detach()
        assert snapshot(model) == before
        scr.attach()
        handle = model.lm_head.register_forward_hook(lambda *_: scr.detach())  # the prefill is over
        model(**inputs)
        handle.remove()
        assert snapshot(model) == before


def test_detaching_within_a_generate_without_a_cache(tiny_llava: Any, llava_inputs: Any) -> None:
    """Its later steps would not be edited. With a cache they read what was edited."""
    model = tiny_llava(5)
    inputs = llava_inputs(model, [1], seed=5)
    expected = reference_greedy(model, inputs, CONFIG, 4)
    scr = SCR(model, config=CONFIG, mode="two-pass").attach()

    def leave(ids: Tensor, scores: Tensor) -> Tensor:
        with pytest.raises(errors.AttachError):
            scr.detach()
        return scores

    tokens = model.generate(**inputs, **GREEDY, use_cache=False, logits_processor=[leave])
    assert torch.equal(tokens, expected)
    tokens = model.generate(**inputs, **GREEDY, logits_processor=[lambda ids, scores: (scr.detach(), scores)[1]])
    assert torch.equal(tokens, expected)


def test_of_two_threads_that_attach_one_wins(tiny_llava: Any) -> None:
    model = tiny_llava(5)
    before = snapshot(model)
    for _ in range(20):
        scrs = [SCR(model, config=CONFIG, mode="two-pass") for _ in range(4)]
        start = threading.Barrier(4)

        def attach(scr: SCR, start: threading.Barrier = start) -> bool:
            start.wait(60)
            try:
                scr.attach()
            except errors.AttachError:
                return False
            return True

        with ThreadPoolExecutor(4) as pool:
            won = list(pool.map(attach, scrs))
        assert sum(won) == 1
        for scr, mine in zip(scrs, won, strict=True):
            scr.detach()
            assert (snapshot(model) == before) == any(won[: scrs.index(scr) + 1])
            assert mine or not won[0] or snapshot(model) == before


def test_a_capture_beside_other_calls(calls: Calls) -> None:
    """The harvest's run leaves the model by an exception of its own, in its own thread alone."""
    expected = capture(calls.model, CONFIG, calls.prompts[0])
    block = calls.model.model.language_model.layers[0]
    found: list[Any] = []
    within = Within(lambda: found.append(in_thread(lambda: capture(calls.model, CONFIG, calls.prompts[0]))))
    handle = block.register_forward_pre_hook(within)
    calls.check("image-1")
    handle.remove()
    assert torch.equal(found[0][0].attention, expected[0].attention)
    within = Within(lambda: in_thread(lambda: calls.check("image-1")))
    handle = block.register_forward_pre_hook(within)
    assert torch.equal(capture(calls.model, CONFIG, calls.prompts[0])[0].attention, expected[0].attention)
    handle.remove()
    assert within.done


@every([tiny for tiny in GENERATING if tiny.name not in ("llava-full", "chameleon-swin")])
def test_two_threads_in_every_family(tiny: Tiny) -> None:
    model = tiny.model(7)
    prompts = [tiny.prompt(model, images, seed=seed).inputs for seed, images in ((7, [1]), (8, [1, 2]))]
    with SCR(model, config=CONFIG, mode="two-pass"):
        alone = [model.generate(**prompt, **GREEDY) for prompt in prompts]

        def run(number: int) -> list[Tensor]:
            return [model.generate(**prompts[number], **GREEDY, use_cache=cached) for cached in (True, False, True)]

        with ThreadPoolExecutor(2) as pool:
            for expected, found in zip(alone, pool.map(run, range(2)), strict=True):
                assert all(torch.equal(tokens, expected) for tokens in found)
