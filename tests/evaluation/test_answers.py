"""Answers survive an interruption, and belong to one set of prompts, model and method."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.ranks import Rank
from evaluation.answers import Answer, AnswerStore, ImageFacts
from scr_runtime import ImageReport

WHO = {"model": "m", "method": "two-pass"}
FACTS = ImageFacts("one-pass", [5, 3], (4, 6), 11, 0.1 + 0.2, 2.0)


def answer(item: int, seed: int | None = None) -> Answer:
    return Answer(item, seed, [7, 9], "yes\n\u2028", -1 / 3, [FACTS], 1e-17)


def filled(folder: Path) -> AnswerStore:
    store = AnswerStore(folder, WHO)
    store.add([answer(0), answer(1)])
    store.add([answer(2, seed=4)])
    return store


def test_answers_come_back_exactly(tmp_path: Path) -> None:
    filled(tmp_path)
    again = AnswerStore(tmp_path, WHO)
    assert [again[0, None], again[1, None], again[2, 4]] == [answer(0), answer(1), answer(2, 4)]
    assert (2, None) not in again and (3, None) not in again


def test_other_questions_have_another_folder(tmp_path: Path) -> None:
    filled(tmp_path)
    assert (0, None) not in AnswerStore(tmp_path, {**WHO, "model": "other"})
    assert len(list(tmp_path.iterdir())) == 1  # nothing is written before there is an answer


def test_a_cut_line_is_dropped_and_asked_again(tmp_path: Path) -> None:
    filled(tmp_path)
    (file,) = tmp_path.rglob("*.jsonl")
    content = file.read_bytes()
    for cut in range(len(content)):
        file.write_bytes(content[:cut])
        store = AnswerStore(tmp_path, WHO)
        whole = content[:cut].count(b"\n") - 1
        assert [key in store for key in ((0, None), (1, None), (2, 4))] == [whole > 0, whole > 1, whole > 2]
        store.add([answer(9)])
        assert AnswerStore(tmp_path, WHO)[9, None] == answer(9)
        assert file.read_bytes().count(b"\n") == max(whole, 0) + 2


@pytest.mark.parametrize("damage", [b"", b"nonsense\n", b"null\n[]\n", b'{"answers": 2}\n{"item": 0}\n', b"\xff\n"])
def test_a_damaged_file_counts_for_nothing(tmp_path: Path, damage: bytes) -> None:
    filled(tmp_path)
    (file,) = tmp_path.rglob("*.jsonl")
    file.write_bytes(damage)
    store = AnswerStore(tmp_path, WHO)
    assert (0, None) not in store
    store.add([answer(0)])
    assert AnswerStore(tmp_path, WHO)[0, None] == answer(0)


def test_a_damaged_line_is_asked_again_and_the_others_stay(tmp_path: Path) -> None:
    filled(tmp_path)
    (file,) = tmp_path.rglob("*.jsonl")
    lines = file.read_bytes().splitlines()
    file.write_bytes(b"\n".join([lines[0], b'{"item": 0}', *lines[2:], b""]))
    store = AnswerStore(tmp_path, WHO)
    assert (0, None) not in store and (1, None) in store and (2, 4) in store


def test_ranks_write_their_own_files_and_read_all(tmp_path: Path) -> None:
    first, second = (AnswerStore(tmp_path, WHO, Rank(number, 2)) for number in range(2))
    first.add([answer(0)])
    second.add([answer(1)])
    assert (1, None) not in first
    first.refresh()
    assert (1, None) in first
    assert len(list(tmp_path.rglob("rank-*-of-2.jsonl"))) == 2
    assert (1, None) in AnswerStore(tmp_path, WHO)  # started again with another number of ranks


def test_without_a_folder_nothing_is_written(tmp_path: Path) -> None:
    store = AnswerStore(None, WHO)
    store.add([answer(0)])
    assert store[0, None] == answer(0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("drift", "confidence"), [(None, 0.8), (1.0, 0.8), (3.0, 0.0)])
def test_a_drifted_image_has_no_confidence(drift: float | None, confidence: float) -> None:
    report = ImageReport(
        provider="one-pass", fallback_reason=None, sources=[5], confidence=0.8, entropy=2.0,
        entropy_normalised=0.5, grid=(4, 6), layers_edited=(0, 1), drift=drift,
    )  # fmt: skip
    assert ImageFacts.of_report(report, 8, 2.0).confidence == confidence
