"""Answers survive an interruption, and belong to one set of questions, model and predictor."""

from pathlib import Path

import pytest

from evaluation.answers import AnswerLog
from scr_runtime import ImageReport

REPORT = ImageReport(
    provider="one-pass", fallback_reason=None, sources=[5, 3], confidence=0.1 + 0.2, entropy=2.0,
    entropy_normalised=0.5, grid=(4, 6), layers_edited=(0, 1), drift=None,
)  # fmt: skip
WHO = {"model": "m", "methods": ("two-pass", "vanilla")}


def filled(folder: Path) -> AnswerLog:
    log = AnswerLog(folder, WHO)
    log.add(0, "vanilla", [0.1, -1 / 3], [])
    log.add(0, "two-pass", [0.2, 1e-17], [REPORT, REPORT])
    log.add(2, "vanilla", [0.3], [])
    return log


def test_answers_come_back_exactly(tmp_path: Path) -> None:
    filled(tmp_path)
    again = AnswerLog(tmp_path, WHO)
    assert again.get(0, ("vanilla", "two-pass")) == {
        "vanilla": ([0.1, -1 / 3], []),
        "two-pass": ([0.2, 1e-17], [REPORT, REPORT]),
    }
    assert again.get(2, ("vanilla", "two-pass")) is None  # one method is missing
    assert again.get(4, ("vanilla",)) is None


def test_other_questions_have_another_file(tmp_path: Path) -> None:
    filled(tmp_path)
    assert AnswerLog(tmp_path, {**WHO, "model": "other"}).get(0, ("vanilla",)) is None
    assert len(list(tmp_path.iterdir())) == 2


def test_a_cut_line_is_dropped_and_asked_again(tmp_path: Path) -> None:
    filled(tmp_path)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    for cut in range(len(content.splitlines()[0]) + 2, len(content)):
        file.write_bytes(content[:cut])
        log = AnswerLog(tmp_path, WHO)
        whole = content[:cut].count(b"\n") - 1
        found = [log.get(0, ("vanilla",)), log.get(0, ("two-pass",)), log.get(2, ("vanilla",))]
        assert [answer is not None for answer in found] == [whole > 0, whole > 1, whole > 2]
        log.add(4, "vanilla", [0.4], [])
        assert AnswerLog(tmp_path, WHO).get(4, ("vanilla",)) == {"vanilla": ([0.4], [])}


@pytest.mark.parametrize("damage", [b"", b"nonsense\n", b"null\n[]\n", b'{"answers": 1}\n{"start": 0}\n', b"\xff\n"])
def test_a_damaged_file_counts_for_nothing(tmp_path: Path, damage: bytes) -> None:
    filled(tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage)
    log = AnswerLog(tmp_path, WHO)
    assert log.get(0, ("vanilla",)) is None
    log.add(0, "vanilla", [1.0], [])
    assert AnswerLog(tmp_path, WHO).get(0, ("vanilla",)) == {"vanilla": ([1.0], [])}


def test_without_a_folder_nothing_is_written(tmp_path: Path) -> None:
    log = AnswerLog(None, WHO)
    log.add(0, "vanilla", [1.0], [])
    assert log.get(0, ("vanilla",)) == {"vanilla": ([1.0], [])}
    assert list(tmp_path.iterdir()) == []
