"""POPE's files: the official form is read, written and checked line by line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data.questions import STRATEGIES
from evaluation.errors import EvaluationError
from evaluation.pictures import Pictures, image_id
from evaluation.questions import (
    PopeLine,
    make_quiz,
    parse_questions,
    quiz_from_annotations,
    quiz_from_files,
    read_questions,
    relabel,
    to_text,
)
from evaluation.settings import EvaluationSettings

IMAGE = "COCO_val2014_000000310196.jpg"
OFFICIAL = f"""\
{{"question_id": 1, "image": "{IMAGE}", "text": "Is there a snowboard in the image?", "label": "yes"}}
{{"question_id": 2, "image": "{IMAGE}", "text": "Is there a dining table in the image?", "label": "no"}}
"""


def line(**changes: Any) -> str:
    record = {"question_id": 1, "image": "a.jpg", "text": "Is there a cat?", "label": "yes", **changes}
    return json.dumps({key: value for key, value in record.items() if value is not ...})


def test_the_official_form_is_read_and_written_to_the_byte(tmp_path: Path) -> None:
    file = tmp_path / "coco_pope_adversarial.json"
    file.write_text(OFFICIAL)
    read = read_questions(file)
    assert read[1] == PopeLine(2, "COCO_val2014_000000310196.jpg", "Is there a dining table in the image?", False)
    assert to_text(read) == OFFICIAL
    assert image_id(read[0].image) == 310196
    assert list(quiz_from_files([file]).splits) == ["adversarial"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "has no questions: it is empty"),
        (line()[:-4], "line 1 is no whole JSON object .cut short"),
        (f"{line()}\n{line(text='Is there a dog?')}", "line 2: question_id 1 is that of line 1 too"),
        (line(label="maybe"), "label is 'maybe', expected yes or no"),
        (line(label=1), "label is 1, expected yes or no"),
        (line(label=...), "has no label: expected question_id, image, text and label"),
        (line(question_id="1"), "question_id is '1', expected a whole number"),
        (line(image="../a.jpg"), "expected a file name below the images folder"),
        (line(image="/etc/passwd"), "expected a file name below the images folder"),
        (line(text=" "), "expected a question"),
        (f"{line()}\n{line(question_id=2, label='no')}", "line 2: line 1 asks the same with the other label"),
        ("[1, 2]", "expected an object with question_id"),
        ("[" * 100_000, "no whole JSON object"),
    ],
)
def test_what_is_wrong_with_a_line_is_named(text: str, problem: str) -> None:
    with pytest.raises(EvaluationError, match=f"^q.json.*{problem}"):
        parse_questions(text, "q.json")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b'{"text": "\xff"}')
    for place, problem in (("none", "No such file"), ("", "is no file"), ("latin", "not UTF-8")):
        with pytest.raises(EvaluationError, match=problem):
            read_questions(tmp_path / place)


def test_labels_of_labels_and_case_are_taken() -> None:
    assert [one.label for one in parse_questions(f"\ufeff{line(label='Yes')}\r\n".lstrip("\ufeff"), "q")] == [True]


def test_other_labels_replace_change_and_leave_out() -> None:
    lines = [PopeLine(n, "a.jpg", f"q{n}", n < 2) for n in range(4)]
    new, changed, left_out = relabel(lines, {("a.jpg", "q0"): True, ("a.jpg", "q1"): False, ("a.jpg", "q2"): False})
    assert [(one.question_id, one.label) for one in new] == [(0, True), (1, False), (2, False)]
    assert (changed, left_out) == (1, 1)


def test_repopes_labels_by_file(tmp_path: Path) -> None:
    (tmp_path / "coco_pope_popular.json").write_text(OFFICIAL)
    (tmp_path / "labels.json").write_text(OFFICIAL.splitlines()[0].replace('"yes"', '"no"'))
    quiz = quiz_from_files([tmp_path / "coco_pope_popular.json"], [tmp_path / "labels.json"])
    assert quiz.splits["popular"].truth.tolist() == [False]
    assert "1 of 2 changed, 1 left out" in quiz.notes[0]
    (tmp_path / "labels.json").write_text(line())
    with pytest.raises(EvaluationError, match="has none of the questions"):
        quiz_from_files([tmp_path / "coco_pope_popular.json"], [tmp_path / "labels.json"])


def test_a_question_of_several_splits_is_asked_once() -> None:
    first = [PopeLine(7, "a.jpg", "cat?", True), PopeLine(8, "b.jpg", "dog?", False)]
    second = [PopeLine(1, "b.jpg", "cow?", False), PopeLine(2, "a.jpg", "cat?", True)]
    quiz = make_quiz({"random": (first, "x"), "adversarial": (second, "y")})
    assert [(item.image, item.text) for item in quiz.items] == [
        ("a.jpg", "cat?"),
        ("b.jpg", "dog?"),
        ("b.jpg", "cow?"),
    ]
    assert quiz.splits["random"].rows.tolist() == [0, 1] and quiz.splits["random"].ids == [7, 8]
    assert quiz.splits["adversarial"].rows.tolist() == [2, 0]
    assert quiz.headline == "adversarial" and quiz.images == ["a.jpg", "b.jpg"]


def test_the_worlds_questions_are_written_in_the_same_form(scene: Any, tmp_path: Path) -> None:
    images = scene[2]
    settings = EvaluationSettings(images=4, questions_per_image=4)
    made = quiz_from_annotations(images, images.ids[:4], settings, tmp_path)
    files = [tmp_path / f"pope_{strategy}.json" for strategy in STRATEGIES]
    read = quiz_from_files(files)
    assert read.items == made.items
    for strategy in STRATEGIES:
        one, other = read.splits[f"pope_{strategy}"], made.splits[strategy]
        assert (one.rows.tolist(), one.truth.tolist(), one.sha256) == (
            other.rows.tolist(),
            other.truth.tolist(),
            other.sha256,
        )
    assert list(json.loads(files[0].read_text().splitlines()[0])) == ["question_id", "image", "text", "label"]


def test_missing_images_are_counted_at_once(tmp_path: Path) -> None:
    (tmp_path / "here.jpg").touch()
    names = ["here.jpg", *(f"gone{n}.jpg" for n in range(9))]
    with pytest.raises(EvaluationError, match=r"9 of 10 images.*gone0.jpg, .*\(9 in all\)"):
        Pictures(tmp_path).check(names)
    with pytest.raises(EvaluationError, match="does not exist"):
        Pictures(tmp_path / "none").check(names)
