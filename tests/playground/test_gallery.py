from __future__ import annotations

from pathlib import Path

import pytest

from playground.gallery import ordered, read_gallery
from tests.playground.conftest import answer_line


def test_entries_are_sorted_by_what_is_worth_a_look(tmp_path: Path):
    file = tmp_path / "answers.jsonl"
    lines = [answer_line("vanilla", image, []) for image in (1, 2, 3, 4)]
    lines += [answer_line("one-pass", image, [5, 7 if image == 2 else 6]) for image in (1, 2, 3)]
    lines += [
        answer_line("two-pass", 1, [5, 6], margin=1.5), answer_line("two-pass", 2, [5, 6]),
        answer_line("two-pass", 3, [5, 6], "no", 0.9),
    ]  # fmt: skip
    file.write_text("\n".join(lines))
    entries = read_gallery(file)
    assert [entry.image_id for entry in entries] == [1, 2, 3]  # 4 was asked under one method alone
    assert [entry.overlap for entry in entries] == [1.0, 0.5, 1.0] and entries[0].shift == pytest.approx(0.5)
    assert [entry.image_id for entry in ordered(entries, "disagreement")] == [2, 1, 3]
    assert [entry.image_id for entry in ordered(entries, "entropy")] == [3, 2, 1]
    assert [entry.image_id for entry in ordered(entries, "changed")] == [3, 1, 2]
    assert len(ordered([*entries, *entries], "entropy")) == 3


@pytest.mark.parametrize("content", ["", "{", "[]", '{"benchmark": "pope"}'])
def test_a_file_of_another_form_gives_an_empty_gallery(tmp_path: Path, content: str):
    assert read_gallery(tmp_path / "nowhere.jsonl") == []
    (tmp_path / "answers.jsonl").write_text(content)
    assert read_gallery(tmp_path / "answers.jsonl") == []
