"""Every method answers as the runtime does one question at a time; what is answered is not asked again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from data.chat import chat_inputs
from data.ranks import Rank
from evaluation.answers import ALONE
from evaluation.asking import Asker, Task
from evaluation.decoding import Decoding
from evaluation.errors import UnfinishedError
from evaluation.methods import METHODS, Method, expand
from evaluation.pictures import Pictures
from evaluation.questions import Item, quiz_from_annotations
from evaluation.settings import EvaluationSettings
from scr_runtime import SCR, SCRConfig
from tests.evaluation.conftest import make_predictor

CONFIG = SCRConfig(num_sources=8, edit_layers=(0, 2), attention_layers=(2, 4))
SETTINGS = EvaluationSettings(images=4, questions_per_image=2, methods=["all"])
MARGIN = Decoding("margin", 4)


def asker(scene: Any, cache: Path | None = None, batch_size: int = 5, rank: Rank = ALONE) -> Asker:
    model, processor, images = scene
    return Asker(model, processor, CONFIG, Pictures(images.images_dir), batch_size, 0, cache, rank)


@pytest.fixture(scope="module")
def task(scene: Any) -> Task:
    images = scene[2]
    return Task("t", quiz_from_annotations(images, images.ids[:4], SETTINGS).items, "{question}", MARGIN)


def margin(scene: Any, item: Item, context: Any) -> float:
    model, processor, images = scene
    inputs = chat_inputs(processor, [Pictures(images.images_dir).open(item.image)], [item.text])
    yes, no = processor.tokenizer.convert_tokens_to_ids(["yes", "no"])
    with torch.no_grad(), context:
        logits = model(**inputs).logits[0, -1]
    return float(logits[yes] - logits[no])


@pytest.mark.parametrize("question", ["none", "concat"])
def test_every_mode_is_the_runtimes_one_question_at_a_time(scene: Any, task: Task, question: Any) -> None:
    predictor = make_predictor(question)
    stores = asker(scene).ask(task, expand(SETTINGS, {"": predictor}), {"": predictor})
    assert set(stores) == set(METHODS) - {"shift"}
    model = scene[0]
    for name, scr in (
        ("vanilla", SCR(model, mode="off")),
        ("two-pass", SCR(model, config=CONFIG, mode="two-pass")),
        ("one-pass", SCR(model, config=CONFIG, mode="one-pass", predictor=predictor)),
        ("auto", SCR(model, config=CONFIG, mode="auto", predictor=predictor)),
        ("online", SCR(model, config=CONFIG.behind_map(8), mode="online")),
    ):
        for place in (0, len(task.items) - 1):
            answer = stores[name][place, None]
            assert answer.margin == pytest.approx(margin(scene, task.items[place], scr), abs=1e-3)
            if name != "vanilla":
                assert answer.images[0].sources == scr.reports[0].sources
    doses = [(stores["two-pass"][n, None].images[0].dose, stores["dose-matched"][n, None].images[0].dose)
             for n in range(len(task.items))]  # fmt: skip
    assert all(a == b for a, b in doses)
    margins = {name: stores[name][0, None].margin for name in stores if name != "vanilla-sampled"}
    edits = set(margins) - {"auto", "one-pass"}
    assert len({margins[name] for name in edits}) == len(edits)  # each does something of its own


def test_a_batch_of_one_row_never_swaps_with_itself(scene: Any, task: Task) -> None:
    methods = [Method(name, name) for name in ("vanilla", "two-pass", "swapped")]
    alone, together = (asker(scene, batch_size=size).ask(task, methods, {}) for size in (1, 32))
    for n in range(len(task.items)):
        own = alone["swapped"][n, None].images[0].sources
        assert own == together["swapped"][n, None].images[0].sources
        assert own != alone["two-pass"][n, None].images[0].sources
        assert alone["swapped"][n, None].margin == pytest.approx(together["swapped"][n, None].margin, abs=1e-3)


def test_auto_follows_its_threshold(scene: Any, task: Task) -> None:
    predictor = make_predictor()
    raw = torch.tensor([0.5, 1.0])
    predictor.set_calibration(raw, raw, 0.0)
    settings = EvaluationSettings(methods=["vanilla", "auto"], thresholds=[0.0, 1.0])
    stores = asker(scene).ask(task, expand(settings, {"": predictor}), {"": predictor})
    for n in range(len(task.items)):
        assert stores["auto@0.00"][n, None].margin == stores["one-pass"][n, None].margin
        assert stores["auto@1.00"][n, None].margin == stores["two-pass"][n, None].margin
        assert stores["auto@1.00"][n, None].images[0].provider == "two-pass"
        assert stores["auto@1.00"][n, None].images[0].confidence == stores["one-pass"][n, None].images[0].confidence


def test_greedy_text_agrees_with_generate(scene: Any, task: Task) -> None:
    model, processor, images = scene
    greedy = Task("t", task.items[:3], "{question}", Decoding("greedy", 6))
    stores = asker(scene).ask(greedy, [Method("vanilla", "vanilla"), Method("two-pass", "two-pass")], {})
    for n, item in enumerate(greedy.items):
        inputs = chat_inputs(processor, [Pictures(images.images_dir).open(item.image)], [item.text])
        for name, scr in (
            ("vanilla", SCR(model, mode="off")),
            ("two-pass", SCR(model, config=CONFIG, mode="two-pass")),
        ):
            with scr:
                tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            assert stores[name][n, None].text == processor.decode(tokens, skip_special_tokens=True).strip()
        assert stores["vanilla"][n, None].margin == pytest.approx(margin(scene, item, torch.no_grad()), abs=1e-3)


def test_sampled_answers_follow_their_seed(scene: Any, task: Task) -> None:
    drawn = Task("t", task.items[:4], "{question}", Decoding("sampled", 3, (0, 1), 3.0))
    first, again = (asker(scene).ask(drawn, [Method("vanilla", "vanilla")], {})["vanilla"] for _ in range(2))
    for n in range(4):
        assert [first[n, seed].tokens for seed in (0, 1)] == [again[n, seed].tokens for seed in (0, 1)]
    assert any(first[n, 0].tokens != first[n, 1].tokens for n in range(4))


def test_what_is_answered_is_not_asked_again(scene: Any, task: Task, tmp_path: Path, monkeypatch: Any) -> None:
    methods = [Method("vanilla", "vanilla"), Method("two-pass", "two-pass")]
    first = asker(scene, tmp_path).ask(task, methods, {})
    files = sorted(tmp_path.rglob("*.jsonl"))
    whole = [file.read_bytes() for file in files]
    for file, content in zip(files, whole, strict=True):  # killed while it wrote
        file.write_bytes(content[: len(content) // 2])
    second = asker(scene, tmp_path).ask(task, methods, {})
    for name in ("vanilla", "two-pass"):
        for n in range(len(task.items)):
            assert second[name][n, None].margin == first[name][n, None].margin

    def nothing(*_: Any) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr("evaluation.asking.make_batch", nothing)
    third = asker(scene, tmp_path).ask(task, methods, {})
    assert third["two-pass"][0, None].margin == first["two-pass"][0, None].margin
    with pytest.raises(AssertionError, match="asked again"):
        asker(scene, tmp_path, batch_size=3).ask(task, methods, {})


def test_another_predictor_asks_the_reference_nothing_again(scene: Any, task: Task, tmp_path: Path) -> None:
    settings = EvaluationSettings(methods=["vanilla", "two-pass", "one-pass"])
    for seed in range(2):
        predictor = make_predictor(seed=seed)
        asker(scene, tmp_path).ask(task, expand(settings, {"": predictor}), {"": predictor})
    methods = [json.loads(file.read_text().splitlines()[0])["method"] for file in tmp_path.rglob("*.jsonl")]
    assert sorted(methods) == ["one-pass", "one-pass", "two-pass", "vanilla"]


def test_ranks_share_the_questions(scene: Any, tmp_path: Path, monkeypatch: Any) -> None:
    images = scene[2]
    items = quiz_from_annotations(images, images.ids[:8], SETTINGS).items
    task, methods = (
        Task("t", items, "{question}", MARGIN),
        [Method("vanilla", "vanilla"), Method("swapped", "swapped")],
    )
    monkeypatch.setattr("evaluation.asking.make_blocks", lambda items, text: _blocks(items, text))
    alone = asker(scene).ask(task, methods, {})
    with pytest.raises(UnfinishedError, match=r"rank 0 of 2.*its share is answered"):
        asker(scene, tmp_path, rank=Rank(0, 2)).ask(task, methods, {})
    both = asker(scene, tmp_path, rank=Rank(1, 2)).ask(task, methods, {})
    for n in range(len(items)):
        assert both["swapped"][n, None].margin == alone["swapped"][n, None].margin


def _blocks(items: Any, template: str) -> Any:
    from evaluation.batches import make_blocks

    return make_blocks(items, template, images=4)
