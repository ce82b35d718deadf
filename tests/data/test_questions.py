from __future__ import annotations

import pytest

from data.errors import SettingsError
from data.images import CocoImages
from data.questions import (
    DEFAULT_MIX,
    PROMPT_KINDS,
    STRATEGIES,
    Question,
    check_prompts,
    count_objects,
    image_prompts,
    pope_questions,
)
from data.wording import question_text
from tests.data import tiny


def prompts_of_all(coco: CocoImages, prompts: int) -> dict[int, list[Question]]:
    counts = count_objects(coco)
    return {image_id: image_prompts(coco, counts, image_id, prompts) for image_id in coco.ids}


def test_strategies_are_kinds_of_prompts():
    assert set(STRATEGIES) < set(PROMPT_KINDS) and set(DEFAULT_MIX) < set(PROMPT_KINDS)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_labels_are_true(coco: CocoImages, strategy: str):
    questions = pope_questions(coco, coco.ids, strategy, per_image=4, seed=1)
    assert len(questions) == 4 * len(coco)
    for question in questions:
        assert question.label == ("yes" if question.category in coco.present(question.image_id) else "no")
        assert question.text == question_text(question.category or "")
    assert sum(question.label == "yes" for question in questions) == len(questions) // 2
    assert len({(q.image_id, q.category) for q in questions}) == len(questions)


def test_questions_depend_on_seed_and_image_alone(coco: CocoImages):
    all_of_them = pope_questions(coco, coco.ids, "random", seed=1)
    assert pope_questions(coco, coco.ids, "random", seed=1) == all_of_them
    assert pope_questions(coco, coco.ids, "random", seed=2) != all_of_them
    assert [q for q in all_of_them if q.image_id == 70] == pope_questions(coco, [70], "random", seed=1)


def test_strategies_share_the_present_objects_and_differ_in_the_absent_ones(coco: CocoImages):
    lists = {strategy: pope_questions(coco, coco.ids, strategy, per_image=2) for strategy in STRATEGIES}
    present = [[q.category for q in questions if q.label == "yes"] for questions in lists.values()]
    assert present[0] == present[1] == present[2]
    absent = [tuple(q.category for q in questions if q.label == "no") for questions in lists.values()]
    assert len(set(absent)) == 3


def test_adversarial_asks_for_what_stands_beside_and_popular_for_what_is_frequent(coco: CocoImages):
    counts = count_objects(coco)
    assert counts.frequency["zebra"] == 0 and counts.frequency["person"] == 26
    assert counts.together["car", "bus"] == counts.together["bus", "car"] == 5
    beside = pope_questions(coco, coco.ids, "adversarial", per_image=4)
    for question in beside:  # people are everywhere; otherwise it stays in the kitchen, or in the street
        scene = tiny.KITCHEN if coco.present(question.image_id) & set(tiny.KITCHEN) else tiny.STREET
        assert question.category in (*scene, "person")
    first = {q.image_id: q.category for q in reversed(pope_questions(coco, coco.ids, "popular")) if q.label == "no"}
    assert all(first[i] == "person" for i in coco.ids if "person" not in coco.present(i))


def test_an_image_with_few_objects_stays_balanced(coco: CocoImages):
    labels = [q.label for q in pope_questions(coco, [10], "random", per_image=6)]
    assert labels == ["yes", "no", "yes", "no"]  # a car and a bus, nothing else


def test_two_prompts_are_one_yes_and_one_no(coco: CocoImages):
    prompts = prompts_of_all(coco, 2)
    assert all(sorted(q.label or "" for q in questions) == ["no", "yes"] for questions in prompts.values())
    kinds = {question.strategy for questions in prompts.values() for question in questions}
    assert kinds == set(DEFAULT_MIX)


def test_prompts_never_repeat_a_category(coco: CocoImages):
    for image_id, questions in prompts_of_all(coco, len(tiny.CATEGORIES)).items():
        assert sorted(q.category or "" for q in questions) == sorted(tiny.CATEGORIES)
        assert all((q.label == "yes") == (q.category in coco.present(image_id)) for q in questions)


def test_caption_prompt(coco: CocoImages):
    questions = image_prompts(coco, count_objects(coco), 10, 2, mix=("caption", "present"))
    assert {question.strategy for question in questions} == {"caption", "present"}
    caption = next(question for question in questions if question.strategy == "caption")
    assert caption.text == "Describe the image." and caption.label is None


def test_a_caption_is_asked_for_once(coco: CocoImages):
    counts = count_objects(coco)
    mixed = image_prompts(coco, counts, 10, 5, mix=("caption", "random"))
    assert sorted(q.strategy for q in mixed) == ["caption", *["random"] * 4]
    everything = image_prompts(coco, counts, 10, 11, mix=("present", "caption"))
    assert sorted(q.category or "" for q in everything) == sorted(["", *tiny.CATEGORIES])
    assert [q.strategy for q in image_prompts(coco, counts, 10, 1, mix=("caption",))] == ["caption"]
    with pytest.raises(ValueError, match="prompts_per_image=2: use 1 to 1"):
        image_prompts(coco, counts, 10, 2, mix=("caption",))


def test_texts_are_asked_as_they_are_each_once(coco: CocoImages):
    counts = count_objects(coco)
    mix = ["What is on the left?", "caption", "present"]
    asked = image_prompts(coco, counts, 10, 4, mix)
    assert {(one.text, one.strategy) for one in asked if one.label is None} == {
        ("What is on the left?", "text"), ("Describe the image.", "caption"),
    }  # fmt: skip
    assert len({one.text for one in asked}) == 4


def test_without_annotations_captions_and_texts_alone_are_asked(coco: CocoImages):
    pictures = CocoImages(coco.images_dir, None)
    mix = ["caption", "Is there a person in the image?"]
    asked = image_prompts(pictures, count_objects(pictures), 0, 2, mix)
    assert {one.text for one in asked} == {"Describe the image.", "Is there a person in the image?"}
    with pytest.raises(SettingsError, match=r"present, which ask about .* has no annotations"):
        check_prompts(pictures, 1, ["present", "caption"])
    with pytest.raises(SettingsError, match="use 1 to 2"):
        check_prompts(pictures, 3, mix)


def test_bad_values_name_the_legal_ones(coco: CocoImages):
    with pytest.raises(ValueError, match="random, popular, adversarial"):
        pope_questions(coco, [10], "hard")
    with pytest.raises(ValueError, match="even number"):
        pope_questions(coco, [10], "random", per_image=3)
    counts = count_objects(coco)
    with pytest.raises(SettingsError, match=r"prompts_per_image=11: use 1 to 10"):
        image_prompts(coco, counts, 10, 11)
    with pytest.raises(SettingsError, match=r"\['presnt'\].*adversarial"):
        image_prompts(coco, counts, 10, 1, mix=("presnt",))
