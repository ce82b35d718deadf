"""Whatever leaves a call, at whichever place: the exception arrives, and the model is as it was."""

from __future__ import annotations

import contextlib
import gc
import random
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scr_runtime import SCR, SCRConfig, errors
from tests.conftest import make_inputs, make_tiny_llava
from tests.scr_runtime.leftovers import ENDS, Bomb, CriterionBomb, ProcessorBomb, lines_of, snapshot
from tests.scr_runtime.questions import ask
from tests.scr_runtime.reference import kept, reference_logits
from tests.scr_runtime.test_families import GENERATING, every
from tests.scr_runtime.tiny_families import TINY, Tiny

CONFIG = SCRConfig(num_sources=5, strength=1.3, edit_layers=(0, 2), attention_layers=(2, 4))

Place = Callable[[Any, Bomb], Any]


def before(path: str) -> Place:
    return lambda model, bomb: model.get_submodule(path).register_forward_pre_hook(bomb)


def behind(path: str) -> Place:
    return lambda model, bomb: model.get_submodule(path).register_forward_hook(bomb)


BLOCK = "model.language_model.layers.{}"
ATTENTION = "model.language_model.layers.{}.self_attn"
PLACES: dict[str, Place] = {
    "vision tower": before("model.vision_tower"),
    "a layer of the vision tower": behind("model.vision_tower.encoder.layers.1"),
    "projector": behind("model.multi_modal_projector"),
    "embedding": behind("model.language_model.embed_tokens"),
    **{f"before block {layer}": before(BLOCK.format(layer)) for layer in range(6)},
    **{f"behind block {layer}": behind(BLOCK.format(layer)) for layer in range(6)},
    **{f"attention of block {layer}": before(ATTENTION.format(layer)) for layer in (0, 1, 4, 5)},
    "a projection in the nested run's last attention": before("model.language_model.layers.4.self_attn.k_proj"),
    "norm": before("model.language_model.norm"),
    "head": before("lm_head"),
    "behind the head": behind("lm_head"),
    "before the model": before(""),
    "behind the model": behind(""),
    "before the base model": before("model"),
    "behind the base model": behind("model"),
    "before the decoder": before("model.language_model"),
    "behind the decoder": behind("model.language_model"),
}


class Case:
    """A model, its inputs, what it gives with SCR and without, and its state before any SCR."""

    def __init__(self, mode: Any = "two-pass") -> None:
        self.model: Any = make_tiny_llava(16)
        self.inputs = make_inputs(self.model, [1, 1], seed=16)
        self.text = {"input_ids": torch.randint(3, 90, (1, 7))}
        self.scr = SCR(self.model, config=CONFIG, mode=mode, seed=1)
        with torch.no_grad():
            self.vanilla = self.model(**self.inputs).logits
            self.words = self.model(**self.text).logits
            self.before = snapshot(self.model)
            with SCR(self.model, config=CONFIG, mode="two-pass"):
                self.edited = self.model(**self.inputs).logits
            expected, _ = reference_logits(self.model, self.inputs, CONFIG)
        assert torch.allclose(kept(self.inputs, self.edited), kept(self.inputs, expected), atol=1e-4, rtol=0)

    def works(self) -> None:
        """The attached model edits images as the reference does, and text not at all."""
        with torch.no_grad():
            assert torch.equal(self.model(**self.text).logits, self.words)
            assert torch.equal(self.model(**self.inputs).logits, self.edited)

    def is_vanilla(self) -> None:
        assert snapshot(self.model) == self.before
        with torch.no_grad():
            assert torch.equal(self.model(**self.inputs).logits, self.vanilla)
        assert snapshot(self.model) == self.before


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


# -- forward passes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("place", PLACES)
def test_an_end_at_any_place_of_a_prefill(case: Case, place: str, end: type[BaseException]) -> None:
    model, error = case.model, end("here")
    with torch.no_grad():
        for calls in (1, 2):  # the second call of a nested block is the pass's own
            bomb = Bomb(error, calls)
            handle = PLACES[place](model, bomb)
            with pytest.raises(end) as caught, case.scr:
                for _ in range(2):
                    model(**case.inputs)
            handle.remove()
            assert caught.value is error
            assert not getattr(error, "__notes__", [])
            case.is_vanilla()
            with case.scr:  # a server, which stays attached
                handle = PLACES[place](model, Bomb(error, calls))
                with pytest.raises(end) as caught:
                    for _ in range(2):
                        model(**case.inputs)
                handle.remove()
                assert caught.value is error
                case.works()
            case.is_vanilla()


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize(
    "target",
    [
        "scr_runtime.passes.plan_edit",  # the state layer's hook
        "scr_runtime.passes.visual_layout",
        "scr_runtime.passes.merge_plans",
        "scr_runtime.attention.AttentionRows.read",  # in the nested run's attention
        "scr_runtime.diagnostic.block_arguments",
        "scr_runtime.prefill.apply_edit",
        "scr_runtime.stats.StatsCounter.add",
        "scr_runtime.prefill.Prefill.check_fired",
    ],
)
def test_an_end_in_scrs_own_code(
    case: Case, monkeypatch: pytest.MonkeyPatch, target: str, end: type[BaseException]
) -> None:
    error = end("here")
    with torch.no_grad(), case.scr:
        with monkeypatch.context() as patch:
            patch.setattr(target.replace("diagnostic.block", "passes.block"), Bomb(error))
            with pytest.raises(end) as caught:
                case.model(**case.inputs)
        assert caught.value is error
        case.works()
    case.is_vanilla()


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}], ids=["cache", "no-cache", "beams"])
def test_an_end_in_generate(case: Case, options: dict[str, Any], end: type[BaseException]) -> None:
    model, error = case.model, end("here")
    call: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False} | options
    with case.scr:
        expected = model.generate(**case.inputs, **call)
        for at in (1, 2):
            for bomb in ({"stopping_criteria": [CriterionBomb(error, at)]},
                         {"logits_processor": [ProcessorBomb(error, at)]},
                         {"streamer": Bomb(error, at)}):  # fmt: skip
                if "streamer" in bomb and "num_beams" in options:
                    continue
                given = {key: value[:1] for key, value in case.inputs.items()} if "streamer" in bomb else case.inputs
                with pytest.raises(end) as caught:
                    model.generate(**given, **call, **bomb)  # type: ignore[arg-type]
                assert caught.value is error
                assert case.scr._passes.generate.running is None
        assert torch.equal(model.generate(**case.inputs, **call), expected)
        case.works()
    case.is_vanilla()


@pytest.mark.parametrize("end", ENDS)
def test_an_end_in_a_sessions_question(end: type[BaseException]) -> None:
    model = make_tiny_llava(9)
    inputs = make_inputs(model, [1], seed=9)
    error = end("here")
    with torch.no_grad():
        vanilla = model(**inputs).logits
        state = snapshot(model)
        questions = [ask(inputs, [count], seed) for seed, count in enumerate((5, 9, 2))]
        with SCR(model, config=CONFIG, mode="two-pass"):
            expected = [model(**question).logits for question in questions]
        for place in ("before block 2", "attention of block 4", "behind block 5", "head"):
            for at in (1, 2, 3):
                scr = SCR(model, config=CONFIG, mode="two-pass")
                bomb = Bomb(error, at)
                handle = PLACES[place](model, bomb)
                with scr, scr.image(**inputs) as image:
                    for question, logits in zip(questions, expected, strict=True):
                        bomb.armed = True
                        with contextlib.suppress(end):
                            image(**question)
                        bomb.armed = False
                        assert torch.allclose(image(**question).logits, logits, atol=1e-5, rtol=0)
                handle.remove()
                assert snapshot(model) == state
        assert torch.equal(model(**inputs).logits, vanilla)


@every()
def test_an_interrupt_in_every_family(tiny: Tiny) -> None:
    model = tiny.model(10)
    prompt = tiny.prompt(model, [1], seed=10)
    with torch.no_grad():
        vanilla = model(**prompt.inputs).logits
        state = snapshot(model)
        scr = SCR(model, config=CONFIG, mode="two-pass")
        with scr:
            edited = model(**prompt.inputs).logits
        for layer in (0, 2, 3, 5):
            error = KeyboardInterrupt()
            bomb = scr._blocks[layer].register_forward_pre_hook(Bomb(error))
            with pytest.raises(KeyboardInterrupt) as caught, scr:
                model(**prompt.inputs)
            bomb.remove()
            assert caught.value is error
            assert snapshot(model) == state
            with scr:
                assert torch.equal(model(**prompt.inputs).logits, edited)
        assert torch.equal(model(**prompt.inputs).logits, vanilla)


# -- any line --------------------------------------------------------------------------------------------------------


def sample(count: int, wanted: int) -> list[int]:
    return sorted(random.Random(count).sample(range(1, count + 1), min(count, wanted)))


@pytest.fixture
def _no_coverage() -> Iterator[None]:
    trace = sys.gettrace()
    yield
    sys.settrace(trace)


@pytest.mark.usefixtures("_no_coverage")
def test_an_interrupt_before_any_line_of_attach_and_detach(case: Case) -> None:
    scr = case.scr
    count = lines_of(scr.attach)
    scr.detach()
    for line in sample(count, 120):
        error = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt) as caught:
            lines_of(scr.attach, line, error)
        assert caught.value is error
        assert snapshot(case.model) == case.before, line
        scr.detach()
    scr.attach()
    count = lines_of(scr.detach)
    for line in sample(count, 60):
        error = KeyboardInterrupt()
        scr.attach()
        try:
            assert lines_of(scr.detach, line, error) < line  # a thread that other tests left has ended: fewer frames
        except KeyboardInterrupt as caught:
            assert caught is error
        if snapshot(case.model) != case.before:  # then it is attached, as before
            case.works()
        scr.detach()
        assert snapshot(case.model) == case.before, line
    case.is_vanilla()


@pytest.mark.usefixtures("_no_coverage")
def test_an_interrupt_before_any_line_of_a_prefill(case: Case) -> None:
    interrupt_a_prefill_before_any_line(case)


def interrupt_a_prefill_before_any_line(case: Any) -> None:
    """``case`` has a model, inputs, an SCR and a snapshot of the model without it."""
    with torch.no_grad():
        with case.scr:
            count = lines_of(lambda: case.model(**case.inputs))
        for line in sample(count, 60):
            error = KeyboardInterrupt()
            with pytest.raises(KeyboardInterrupt) as caught, case.scr:
                lines_of(lambda: case.model(**case.inputs), line, error)
            assert caught.value is error
            assert snapshot(case.model) == case.before, line
            with case.scr, contextlib.suppress(KeyboardInterrupt):
                lines_of(lambda: case.model(**case.inputs), line, KeyboardInterrupt())
                raise AssertionError
            with case.scr:
                case.works()
        case.is_vanilla()


@pytest.mark.usefixtures("_no_coverage")
def test_interrupts_at_random_one_after_the_other(case: Case) -> None:
    """Never detached in between: a server goes through all of them."""
    greedy: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False}
    calls: dict[str, Callable[[], object]] = {
        "forward": lambda: case.model(**case.inputs),
        "generate": lambda: case.model.generate(**case.inputs, **greedy),
        "uncached": lambda: case.model.generate(**case.inputs, **greedy, use_cache=False),
        "text": lambda: case.model(**case.text),
    }

    @settings(deadline=None, max_examples=25)
    @given(st.lists(st.tuples(st.sampled_from(sorted(calls)), st.integers(1, 1500)), min_size=1, max_size=6))
    def serve(plan: list[tuple[str, int]]) -> None:
        with case.scr, torch.no_grad():
            for name, line in plan:
                with contextlib.suppress(KeyboardInterrupt):
                    lines_of(calls[name], line, KeyboardInterrupt())
            case.works()
        case.is_vanilla()

    serve()


# -- what else ends a call -------------------------------------------------------------------------------------------


def test_deferred_errors_do_not_take_an_exceptions_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scr_runtime.deferred.reading_is_free", lambda device: False)
    model = make_tiny_llava(20)
    inputs = make_inputs(model, [1], seed=20)
    end = 3 + 36  # no text behind the image: NaN
    inputs = {key: value[:, :end] if value.ndim == 2 else value for key, value in inputs.items()}
    error = KeyboardInterrupt()
    with torch.no_grad(), pytest.raises(KeyboardInterrupt) as caught, SCR(model, config=CONFIG, mode="uniform"):
        model(**make_inputs(model, [1], seed=20))
        raise error
    assert caught.value is error
    with torch.no_grad(), pytest.raises(KeyboardInterrupt) as caught, SCR(model, config=CONFIG, mode="two-pass"):
        model(**inputs)
        raise error
    assert caught.value is error


def test_a_call_that_died_leaves_no_check_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scr_runtime.deferred.reading_is_free", lambda device: False)
    model = make_tiny_llava(20)
    inputs = make_inputs(model, [1], seed=20)
    cut = {key: value[:, : 3 + 36] if value.ndim == 2 else value for key, value in inputs.items()}
    with torch.no_grad(), SCR(model, config=CONFIG, mode="two-pass") as scr:
        handle = model.model.language_model.layers[4].register_forward_hook(Bomb(KeyboardInterrupt(), 1))
        with pytest.raises(KeyboardInterrupt):
            model(**cut)  # its scores are NaN, but it gave no answer that they could spoil
        handle.remove()
        model(input_ids=torch.tensor([[5, 6]]))
        assert scr.reports == []
        model(**cut)
        with pytest.raises(errors.NonFiniteScoresError):
            model(input_ids=torch.tensor([[5, 6]]))
        assert scr.reports == []  # a prefill that failed is none, whenever that is found


def test_a_body_that_raises_while_another_thread_runs(case: Case) -> None:
    """The exception arrives; that SCR had to stay is in its notes."""
    model, inside, go_on = case.model, threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        inside.set()
        assert go_on.wait(20)

    handle = model.model.language_model.layers[3].register_forward_hook(wait)
    with torch.no_grad():
        thread = threading.Thread(target=lambda: model(**case.inputs))
        with pytest.raises(KeyError, match="mine") as caught, case.scr:
            thread.start()
            assert inside.wait(20)
            with pytest.raises(errors.AttachError, match="a forward pass is running"):
                case.scr.detach()
            raise KeyError("mine")
    assert "SCR stays attached" in str(caught.value.__notes__)
    go_on.set()
    thread.join()
    handle.remove()
    case.scr.detach()
    case.is_vanilla()


def test_an_end_in_a_thread_that_is_gone(case: Case) -> None:
    model, error = case.model, SystemExit()
    handle = model.model.language_model.layers[1].register_forward_pre_hook(Bomb(error))

    def run() -> None:
        with contextlib.suppress(SystemExit), torch.no_grad():
            model(**case.inputs)

    with case.scr:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        handle.remove()
        case.works()
    case.is_vanilla()


def test_nothing_keeps_a_model_that_is_dropped_while_attached() -> None:
    model = make_tiny_llava(3)
    inputs = make_inputs(model, [1], seed=3)
    scr = SCR(model, config=CONFIG, mode="two-pass").attach()
    with torch.no_grad():
        model(**inputs)
        with contextlib.suppress(KeyboardInterrupt):
            model.lm_head.register_forward_pre_hook(Bomb(KeyboardInterrupt()))
            model(**inputs)
    gone = weakref.ref(model)
    del model, scr
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("tiny", [*GENERATING[:1], TINY["qwen2-vl"]], ids=lambda tiny: tiny.name)
def test_a_generate_that_died_freezes_nothing_for_the_next(tiny: Tiny) -> None:
    model = tiny.model(6)
    first, second = (tiny.prompt(model, [1], seed=seed).inputs for seed in (6, 7))
    call: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "use_cache": False}
    with SCR(model, config=CONFIG, mode="two-pass"):
        expected = model.generate(**second, **call)
        with pytest.raises(GeneratorExit):
            model.generate(**first, **call, stopping_criteria=[CriterionBomb(GeneratorExit(), 2)])
        assert torch.equal(model.generate(**second, **call), expected)
