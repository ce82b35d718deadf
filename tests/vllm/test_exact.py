"""vLLM's answers against those of the transformers runtime: the same tokens, log-probabilities to 1e-4."""

# pyright: reportMissingImports=false

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.engines import ALONE, CONFIG, MIXED, Answer, Question, Reference, answer_of, ask, parameters, prompts

WEAK = replace(CONFIG, strength=1.1)
ASKING = {"enable_prefix_caching": False, "enable_chunked_prefill": False}


def assert_same(mine: list[Answer], theirs: list[Answer]) -> None:
    distances = [a.distance(b) for a, b in zip(mine, theirs, strict=True)]
    assert max(distances) <= 1e-4, distances


@pytest.fixture(scope="module")
def asking(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A predictor that reads the question."""
    return reference.predictor(tmp_path_factory.mktemp("asking"), question="bilinear")


@pytest.fixture(scope="module")
def silent(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A predictor that does not."""
    return reference.predictor(tmp_path_factory.mktemp("silent"), question="none")


@pytest.fixture(scope="module")
def expected(reference: Reference, asking: Path, silent: Path) -> dict[str, list[Answer]]:
    """The transformers runtime's answers to all prompts."""
    made = {"asking": asking, "silent": silent, "off": None}
    return {name: [reference.answer(question, folder) for question in MIXED] for name, folder in made.items()}


def test_the_edit_shows_in_the_answers(expected: dict[str, list[Answer]]) -> None:
    for name in ("asking", "silent"):
        moved = [a.distance(b) > 0.01 for a, b in zip(expected[name], expected["off"], strict=True)]
        assert moved == [bool(question.scenes) for question in MIXED]


# -- a predictor that reads the question -----------------------------------------------------------------------------


def stats(llm: Any) -> dict[str, Any]:
    return llm.collective_rpc("scr_stats")[0]


@pytest.fixture
def llm(engines: Any, asking: Path) -> Any:
    return engines(asking, **ASKING)


def test_single_requests(llm: Any, reference: Reference, expected: dict[str, list[Answer]]) -> None:
    before = stats(llm)
    assert_same(ask(llm, reference, MIXED, one_by_one=True), expected["asking"])
    after = stats(llm)
    assert after["images"] - before["images"] == 10 and after["steps"] - before["steps"] == 8
    assert after["edits"] - before["edits"] == 8 * 6 and after["left_out"] == {}


def test_one_batch_of_unequal_lengths(llm: Any, reference: Reference, expected: dict[str, list[Answer]]) -> None:
    assert_same(ask(llm, reference, MIXED), expected["asking"])


def test_requests_that_join_while_others_decode(
    llm: Any, reference: Reference, expected: dict[str, list[Answer]]
) -> None:
    engine, made, waiting = llm.llm_engine, dict[int, Answer](), list(enumerate(MIXED))
    steps = 0
    while waiting or engine.has_unfinished_requests():
        if waiting and steps % 3 == 0:
            index, question = waiting.pop(0)
            (prompt,) = prompts(reference, [question])
            engine.add_request(str(index), prompt, parameters())
        for output in engine.step():
            if output.finished:
                made[int(output.request_id)] = answer_of(output)
        steps += 1
    assert_same([made[index] for index in range(len(MIXED))], expected["asking"])


def test_each_request_decides_for_itself(llm: Any, reference: Reference, expected: dict[str, list[Answer]]) -> None:
    before = stats(llm)["switched_off"]
    extras = [{"scr": "off"} if index % 2 else {"scr": "one-pass"} for index in range(len(MIXED))]
    wanted = [expected["off" if index % 2 else "asking"][index] for index in range(len(MIXED))]
    assert_same(ask(llm, reference, MIXED, extra=extras), wanted)
    assert stats(llm)["switched_off"] - before == sum(len(question.scenes) for question in MIXED[1::2])


def test_a_request_may_set_the_strength(llm: Any, reference: Reference, asking: Path) -> None:
    wanted = [reference.answer(question, asking, config=WEAK) for question in ALONE[:2]]
    assert_same(ask(llm, reference, ALONE[:2], extra={"scr_strength": 1.1}), wanted)


@pytest.mark.parametrize("extra", [{"scr": "of"}, {"scr_strength": 3.0}, {"scr_mode": "off"}])
def test_a_mistake_in_a_request_is_an_error(llm: Any, reference: Reference, extra: dict[str, Any]) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=r"vllm_xargs|strength"):
        ask(llm, reference, ALONE[:1], extra=extra)
    assert ask(llm, reference, ALONE[:1])


def test_an_image_without_a_question_is_left_out_and_counted(llm: Any, reference: Reference) -> None:
    before = stats(llm)["left_out"].get("no question", 0)
    prompt = {**prompts(reference, ALONE[:1])[0], "prompt": "USER: <image>"}
    answer = answer_of(llm.generate([prompt], parameters(), use_tqdm=False)[0])
    off = answer_of(llm.generate([prompt], parameters({"scr": "off"}), use_tqdm=False)[0])
    assert answer.distance(off) == 0
    assert stats(llm)["left_out"]["no question"] - before == 1


def test_preempted_requests_are_edited_as_they_were(
    engines: Any, reference: Reference, asking: Path, expected: dict[str, list[Answer]]
) -> None:
    llm = engines(asking, **ASKING, num_gpu_blocks_override=27)
    assert_same(ask(llm, reference, MIXED), expected["asking"])
    assert stats(llm)["images"] > 10  # some of them twice


# -- a predictor that does not: chunks, the prefix cache, compilation ------------------------------------------------

FREE = {"enable_prefix_caching": True, "enable_chunked_prefill": True}


def test_chunks_hold_whole_images(
    engines: Any, reference: Reference, silent: Path, expected: dict[str, list[Answer]]
) -> None:
    llm = engines(silent, **FREE, max_num_batched_tokens=200)
    assert_same(ask(llm, reference, MIXED, one_by_one=True, salt="alone"), expected["silent"])
    assert_same(ask(llm, reference, MIXED, salt="batch"), expected["silent"])
    assert stats(llm)["left_out"] == {}


LONG = [
    Question((4,), "Is there a dog in the image? Describe the image. " * 3),
    Question((5, 6), "Is there a dog in the image? Describe the image. " * 3),
]


def test_cached_prefixes_hold_whole_images(engines: Any, reference: Reference, silent: Path) -> None:
    llm = engines(silent, **FREE, max_num_batched_tokens=200)
    first = [*ALONE[:2], *LONG]
    longer = [Question(question.scenes, question.text + " Is there a cup?") for question in first]
    for questions, edited in (
        (first, (5,)),
        (longer, range(3)),
        (longer, range(3)),
    ):  # short prompts fill no block more
        before = stats(llm)["images"]
        answers = ask(llm, reference, questions, one_by_one=True)
        assert_same(answers, [reference.answer(question, silent) for question in questions])
        assert stats(llm)["images"] - before in edited
    assert stats(llm)["left_out"] == {}


def test_requests_with_settings_of_their_own_share_no_cache(
    engines: Any, reference: Reference, silent: Path, expected: dict[str, list[Answer]]
) -> None:
    llm = engines(silent, **FREE, max_num_batched_tokens=200)
    long = LONG[:1]
    off, edited = reference.answer(long[0], None), reference.answer(long[0], silent)
    weak = reference.answer(long[0], silent, config=WEAK)
    for _ in range(2):  # the second time from the cache
        assert_same(ask(llm, reference, long), [edited])
        assert_same(ask(llm, reference, long, extra={"scr": "off"}), [off])
        assert_same(ask(llm, reference, long, extra={"scr_strength": 1.1}), [weak])


@pytest.mark.slow
def test_a_compiled_model_is_edited(
    engines: Any, reference: Reference, silent: Path, expected: dict[str, list[Answer]]
) -> None:
    llm = engines(silent, **FREE, enforce_eager=False)
    before = stats(llm)["images"]
    assert_same(ask(llm, reference, MIXED), expected["silent"])
    assert stats(llm)["images"] - before == 10


def test_two_workers_with_half_of_the_weights_each(
    engines: Any, reference: Reference, asking: Path, expected: dict[str, list[Answer]]
) -> None:
    llm = engines(asking, **ASKING, tensor_parallel_size=2, distributed_executor_backend="mp")
    assert_same(ask(llm, reference, MIXED), expected["asking"])
    assert_same(ask(llm, reference, MIXED, one_by_one=True), expected["asking"])
    first, second = llm.collective_rpc("scr_stats")
    assert first == second and first["images"] == 2 * 10


# -- without a predictor ---------------------------------------------------------------------------------------------


def test_without_the_variable_nothing_changes(
    engines: Any, reference: Reference, expected: dict[str, list[Answer]]
) -> None:
    llm = engines(None)
    assert_same(ask(llm, reference, MIXED), expected["off"])
    config = llm.llm_engine.vllm_config
    assert config.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"
    assert config.scheduler_config.scheduler_cls is None and not config.additional_config
