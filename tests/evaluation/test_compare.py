"""A whole comparison on a few scenes: every part, the report and its files, and what is said of few questions."""

from __future__ import annotations

import html.parser
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation import report
from evaluation.compare import Comparison, compare, measure_reference
from evaluation.errors import EvaluationError
from evaluation.fit_report import FitTable
from evaluation.page import page
from evaluation.questions import Item
from evaluation.reference import prepare_reference, unlabelled_reference
from evaluation.scores import Changed
from evaluation.settings import DEFAULT_METHODS, EvaluationSettings
from evaluation.tables import table
from evaluation.verdict import essentials, verdict
from predictor.metrics import Interval
from scr_runtime import SCRConfig
from tests.evaluation.conftest import make_predictor

CONFIG = SCRConfig(num_sources=8, edit_layers=(0, 2), attention_layers=(2, 4))
SETTINGS = EvaluationSettings(
    benchmarks=["pope", "chair", "fidelity", "latency"], images=4, questions_per_image=2, chair_images=3,
    chair_tokens=[4, 12], fidelity_images=3, latency_repeats=1, bootstrap=20, prompts=["plain", "one-word"],
    thresholds=[0.5], decoding="greedy", max_new_tokens=3,
    methods=[*DEFAULT_METHODS, "online"],
)  # fmt: skip
NAMES = ["vanilla", "two-pass", "one-pass", "one-pass:b", "auto", "auto@0.50", "auto:b", "auto@0.50:b", "uniform",
         "swapped", "shift", "position", "online"]  # fmt: skip


@pytest.fixture(scope="module")
def comparison(scene: Any, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    cache = tmp_path_factory.mktemp("cache")
    reference = measure_reference(scene[0], scene[1], CONFIG, scene[2], SETTINGS, cache)
    return compare(reference, {"": make_predictor(), "b": make_predictor("concat")}, SETTINGS)


def test_everything_is_measured(comparison: Comparison) -> None:
    assert comparison.names == NAMES
    assert [prompt.name for prompt in comparison.prompts] == ["plain", "one-word"]
    assert set(comparison.captions) == {(name, limit) for name in NAMES if name != "shift" for limit in (4, 12)}
    assert set(comparison.fidelity) == set(NAMES) - {"two-pass"}
    assert set(comparison.costs) == set(NAMES) - {"swapped", "shift", "position"}
    assert [one.strength for one in comparison.sensitivity] == [1.1, 2.0]
    assert set(comparison.fallback) == {"auto", "auto@0.50", "auto:b", "auto@0.50:b"}
    kept = comparison.fidelity["one-pass"].edit_kept
    assert kept is not None and kept.low <= kept.mean <= kept.high < 1
    assert comparison.analysis is not None and 0.9 < comparison.analysis.entropy_normalised <= 1
    assert len(comparison.analysis.norms["two-pass", "sources"]) == 8
    parts = {part.name: part.questions for part in comparison.analysis.objects}
    by_size, by_relevance = (
        sum(count for name, count in parts.items() if any(word in name for word in words))
        for words in (("2 %", "10 %"), ("none of two-pass", "quarter"))
    )
    assert by_size == by_relevance > 3


def test_the_shift_is_constant(comparison: Comparison) -> None:
    margins = comparison.prompts[0].answered.margins
    shift = margins["shift"] - margins["vanilla"]
    assert np.ptp(shift) < 1e-9
    assert shift.mean() == pytest.approx((margins["two-pass"] - margins["vanilla"]).mean())


def test_online_is_a_rival_and_no_control(comparison: Comparison) -> None:
    differences = comparison.prompts[0].differences
    assert {(a, b) for a, b, _ in differences if "online" in (a, b)} == {
        *((name, "online") for name in NAMES if name.split(":")[0].split("@")[0] in ("two-pass", "one-pass", "auto")),
        *(("online", name) for name in ("uniform", "swapped", "shift", "position")),
    }
    lines = report.reading(comparison, embedded=False)
    told = [line for line in lines if "online, which needs no predictor" in line]
    assert [line.split("'")[0] for line in told] == ["one-pass", "one-pass:b"]
    assert "online" not in next(line for line in lines if line.startswith("Two-pass's HR minus each control's"))
    behind = comparison.fidelity["online"]  # behind its own last block two-pass's edit has gone through others
    assert behind.edit_kept is not None and behind.edit_kept.mean < 0.9
    winning = {key: value._replace(mean=-0.2, low=-0.3, high=-0.1) for key, value in differences.items()}
    better = replace(comparison, prompts=[replace(comparison.prompts[0], differences=winning)])
    assert sum("the predictor is worth its fit" in line for line in report.reading(better, embedded=False)) == 2


def test_the_tables_have_a_row_per_method(comparison: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # in one part
    rows = report.answer_rows(comparison)
    assert [row[0] for row in rows[1:]] == NAMES and len({len(row) for row in rows}) == 1
    assert len(table(rows).splitlines()) == len(rows) + 1
    captions = report.caption_rows(comparison)
    assert captions[0].index("recall") < captions[0].index("length") and len(captions) == 1 + 2 * (len(NAMES) - 1)


def test_metrics_are_finite_and_named_stably(comparison: Comparison) -> None:
    values = report.metrics(comparison)
    assert {
        "eval/two-pass/adversarial/hr", "eval/two-pass/adversarial/hr_low", "eval/two-pass/adversarial/hr_change",
        "eval/one-pass/edit_kept", "eval/one-pass/effect_kept", "eval/auto/fallback", "eval/auto_30/error",
        "eval/two-pass/prefill_ratio", "eval/two-pass/prefill_ms", "eval/sensitivity/shift", "eval/entropy_normalised",
        "eval/prompt-one-word/vanilla/popular/accuracy", "eval/vanilla/chair_12/chair_s", "eval/one-pass-b/edit_kept",
        "eval/two-pass/adversarial/hr_minus_swapped", "eval/one-pass/shift_correlation",
    } <= set(values)  # fmt: skip
    assert all(np.isfinite(value) for value in values.values())
    assert all(re.fullmatch(r"[\w./ -]+", name) for name in values)  # what MLflow takes


def test_files_are_written_and_the_same_seed_gives_the_same_bytes(
    scene: Any, comparison: Comparison, tmp_path: Path
) -> None:
    paths = report.write(tmp_path / "one", comparison, embedded=True, command="python -m evaluation seed=1")
    content = json.loads(paths["json"].read_text())
    assert content["metrics"] == pytest.approx(report.metrics(comparison)) == report.read_metrics(paths["json"])
    assert content["facts"]["prompts"]["one-word"].endswith("single word or phrase.")
    assert len(content["facts"]["caption_ids"]) == 3 and len(content["facts"]["caption_ids_sha256"]) == 64
    lines = [json.loads(line) for line in paths["answers"].read_text().splitlines()]
    asked = [line for line in lines if line["benchmark"] == "pope"]
    quiz = comparison.quiz
    assert quiz is not None and len(asked) == 2 * (len(NAMES) - 1) * len(quiz.items)
    assert asked[0]["text"].startswith("Is there") and asked[0]["label"] in ("yes", "no")
    assert {split for line in asked for split in line["question_ids"]} == set(quiz.splits)
    assert "milliseconds" not in paths["answers"].read_text()
    few = SETTINGS.model_copy(
        update={"methods": ["vanilla", "two-pass"], "benchmarks": ["pope"], "prompts": ["plain"]}
    )
    again = compare(measure_reference(scene[0], scene[1], CONFIG, scene[2], few), {}, few)
    assert set(report.answer_lines(again)) < set(paths["answers"].read_text().splitlines())
    text = paths["md"].read_text()
    assert text.index(content["verdict"]["sentence"]) < text.index("| vanilla |") and "seed=1" in text


class Strict(html.parser.HTMLParser):
    """Notes unclosed tags and whatever is loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.external: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.external += [
            value for key, value in attrs if key in ("src", "href") and value[:5] != "data:" and value[0] != "#"
        ]
        if tag not in ("meta", "br", "circle", "path", "rect", "image", "polygon"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()


def test_the_page_is_self_contained_and_well_formed(comparison: Comparison) -> None:
    text = page(comparison, embedded=True, command="python -m evaluation 'a<b'")
    strict = Strict()
    strict.feed(text)
    assert strict.open == [] and strict.external == []
    assert not re.search(r"https?://|@import|url\(|<script", text)
    assert "prefers-color-scheme: dark" in text or "prefers-color-scheme:dark" in text
    assert text.index('class="verdict') < text.index("<table")
    assert "':near': their neighbours; ':elsewhere': the other patches" in text
    assert "a&lt;b" in text and text.count("<svg") >= 7 and "data:image/jpeg;base64," in text


def test_the_report_of_a_run_has_the_table_of_its_fit(comparison: Comparison) -> None:
    rows = [["scores from", "recall@8"], ["position", "0.401 [0.390, 0.410]"], ["predictor", "0.842 [0.830, 0.850]"]]
    fitted = FitTable("The predictor on 400 <test> images, K = 8.", ["95 % intervals."], rows, "Confidence: good.")
    text = page(comparison, embedded=True, fitted=fitted)
    links = re.findall('<a href="#(part-[0-9]+)">', text)
    assert len(links) > 3 and all(f'<h2 id="{link}">' in text for link in links)
    assert ">The fit</h2>" in text and "400 &lt;test&gt; images, K = 8. 95 % intervals." in text
    assert "<tr class=marked><td>predictor</td><td>0.842 [0.830, 0.850]</td>" in text and "Confidence: good." in text
    assert "<tr class=marked><td>one-pass</td>" in text and "<tr class=marked><td>two-pass</td>" not in text
    strict = Strict()
    strict.feed(text)
    assert strict.open == []
    text = report.markdown_text(comparison, embedded=True, fitted=fitted)
    assert "| predictor | 0.842 [0.830, 0.850] |" in text and "Confidence: good." in text
    assert "The fit" not in page(comparison, embedded=True)


def test_a_question_that_both_methods_change_has_its_cards_side_by_side(comparison: Comparison) -> None:
    headline, quiz = comparison.headline, comparison.quiz
    assert headline is not None and quiz is not None
    first, second, third = quiz.splits[quiz.headline].rows.tolist()[:3]
    changed = {
        method: [Changed(item, method, corrected=True, label="no", before="yes", after="no") for item in items]
        for method, items in {"two-pass": (first, second), "one-pass": (third, first)}.items()
    }
    prompts = [replace(headline, changed=changed), *comparison.prompts[1:]]
    text = page(replace(comparison, prompts=prompts), embedded=True)
    cards = re.findall(r"<div>([^<]*)<br><b class=\"good\">corrected</b> by ([a-z-]+):", text)
    words = {item: quiz.items[item].text for item in (first, second, third)}
    assert cards == [(words[first], "two-pass"), (words[first], "one-pass"), (words[second], "two-pass"),
                     (words[third], "one-pass")]  # fmt: skip


@pytest.mark.skipif(shutil.which("chromium") is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_the_page_without_scrolling_sideways(
    comparison: Comparison, tmp_path: Path, width: int
) -> None:
    file = tmp_path / "page.html"
    measure = "<script>document.title=`wide ${document.documentElement.scrollWidth}`</script></body>"
    file.write_text(page(comparison, embedded=True).replace("</body>", measure))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
               "--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}",
               f"--window-size={width},900", "--dump-dom", file.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = re.search(r"<title>wide (\d+)</title>", done.stdout)
    assert found is not None, done.stderr[-500:]
    assert int(found[1]) <= max(width, 500)  # headless Chromium's own least width


def test_facts_name_the_model_and_its_predictors(comparison: Comparison) -> None:
    named = replace(comparison, facts={**comparison.facts, "model_name": "scene-llava"})
    rows = {row[0]: row[1] for row in report.fact_rows(named)}
    assert rows["model"] == "scene-llava (folder checkpoint), float32" and {"predictor", "predictor b"} <= set(rows)
    hub = {**comparison.facts["model"], "hub_id": "owner/name", "revision": "abc", "weights_sha256": None}
    rows = {row[0]: row[1] for row in report.fact_rows(replace(comparison, facts={**comparison.facts, "model": hub}))}
    assert rows["model"] == "owner/name, revision abc, float32"


def test_one_answer_is_singular(comparison: Comparison) -> None:
    headline = comparison.prompts[0]
    score = headline.scores["two-pass", "adversarial"]
    assert score.mcnemar is not None
    scores = {
        **headline.scores,
        ("two-pass", "adversarial"): replace(score, mcnemar=replace(score.mcnemar, corrected=1, broken=0)),
    }
    changed = replace(comparison, prompts=[replace(headline, scores=scores)],
                      settings=comparison.settings.model_copy(update={"decoding": "margin"}),
                      facts={**comparison.facts, "parser": "no parser: the sign of the margin"})  # fmt: skip
    text = " ".join(report.reading(changed, embedded=True))
    assert "two-pass corrects 1 answer and breaks 0" in text and "; no parser: the sign of the margin." in text


def test_the_reading_says_what_is_not_shown(comparison: Comparison) -> None:
    text = " ".join(report.reading(comparison, embedded=True))
    assert "questions are few" in text and "does not show that SCR lowers hallucination in real models" in text
    assert "real models" not in " ".join(report.reading(comparison, embedded=False))
    assert not re.search(r"100 ?% (kept|of its)", text)


def test_a_terminal_gets_the_most_telling_sentences(comparison: Comparison) -> None:
    reason, *short = essentials(comparison, embedded=True)
    whole = report.reading(comparison, embedded=True)
    assert reason == report.verdict(comparison).reason
    assert set(short) < set(whole) and 2 * len(short) < len(whole)
    text = " ".join(short)
    assert "Two-pass changes the adversarial HR" in text and "of two-pass's edit" in text and "real models" in text


def test_the_columns_are_explained(comparison: Comparison) -> None:
    for text in (report.markdown_text(comparison, embedded=True), page(comparison, embedded=True)):
        assert text.count("HR: hallucination rate, the share of questions about absent objects") == 1


def judged(
    comparison: Comparison,
    change: Interval,
    difference: Interval,
    accuracy: Interval,
    asked: int = 2000,
    absent: int | None = None,
) -> Any:
    """The verdict if one-pass had these figures; half of the questions are about absent objects, or so many."""
    headline = comparison.prompts[0]
    score = headline.scores["one-pass", "adversarial"]
    scores = {
        **headline.scores,
        ("one-pass", "adversarial"): replace(score, hr_change=change, accuracy_change=accuracy),
    }
    differences = {key: difference if key[0] == "one-pass" else value for key, value in headline.differences.items()}
    changed = replace(headline, scores=scores, differences=differences)
    felt = [replace(one, changed=one.questions) for one in comparison.sensitivity]
    quiz = comparison.quiz
    assert quiz is not None
    split = quiz.splits[quiz.headline]
    split = replace(
        split,
        ids=(list(split.ids) * asked)[:asked],
        truth=np.arange(asked) >= (asked // 2 if absent is None else absent),
    )
    many = replace(quiz, splits={**quiz.splits, quiz.headline: split})
    return verdict(replace(comparison, prompts=[changed], sensitivity=felt, quiz=many))


LOWER, SAME, HIGHER = Interval(-0.05, -0.08, -0.02), Interval(0.0, -0.002, 0.002), Interval(0.05, 0.02, 0.08)


@pytest.mark.parametrize(
    ("change", "difference", "accuracy", "kind", "words"),
    [
        (LOWER, LOWER, HIGHER, "gain", r"HR -5.0 \[-8.0, -2.0\] points with one-pass, beyond all 4 controls, at"),
        (LOWER, SAME, SAME, "none", "No effect beyond controls: don't deploy."),
        (LOWER, LOWER, LOWER, "harm", "makes answers worse"),
        (HIGHER, HIGHER, SAME, "harm", "makes answers worse"),
        (SAME, SAME, SAME, "none", "No effect shown: don't deploy."),
        (Interval(0.0, 0.0, 0.0), SAME, SAME, "none", "No effect shown: don't deploy."),
        (Interval(0.0, -0.1, 0.1), SAME, SAME, "unclear", "Too few questions to say"),
    ],
)
def test_the_verdict_follows_from_intervals(
    comparison: Comparison, change: Interval, difference: Interval, accuracy: Interval, kind: str, words: str
) -> None:
    found = judged(comparison, change, difference, accuracy)
    assert found.kind == kind and re.search(words, found.sentence)


def test_few_questions_say_nothing_where_no_answer_changed(comparison: Comparison) -> None:
    none = Interval(0.0, 0.0, 0.0)
    found = judged(comparison, none, SAME, SAME, asked=50)
    assert found.kind == "unclear"
    assert "under about 12.0 points can't be seen with 25 questions about absent objects" in found.reason
    assert judged(comparison, none, SAME, SAME, asked=598).kind == "unclear"
    assert judged(comparison, none, SAME, SAME, asked=600).kind == "none"


def test_without_a_question_about_an_absent_object_there_is_no_verdict(comparison: Comparison) -> None:
    nothing = Interval(math.nan, math.nan, math.nan)
    found = judged(comparison, nothing, nothing, SAME, absent=0)
    assert found.kind == "open" and "no question is about an absent object" in found.sentence


def test_a_model_that_does_not_feel_the_edit_is_said_to(comparison: Comparison) -> None:
    headline = comparison.prompts[0]
    score = headline.scores["one-pass", "adversarial"]
    flat = replace(score, hr_change=SAME, accuracy_change=SAME)
    scores = {**headline.scores, ("one-pass", "adversarial"): flat}
    dull = [replace(one, changed=0, questions=500) for one in comparison.sensitivity]
    found = verdict(replace(comparison, prompts=[replace(headline, scores=scores)], sensitivity=dull))
    assert found.kind == "insensitive" and "no choice of sources can show an effect" in found.sentence


def test_without_a_predictor_or_questions(scene: Any) -> None:
    settings = SETTINGS.model_copy(
        update={"benchmarks": ["chair"], "methods": ["vanilla", "two-pass"], "chair_drop_unfinished": True}
    )
    found = compare(prepare_reference(scene[0], scene[1], CONFIG, scene[2], settings), {}, settings)
    assert found.names == ["vanilla", "two-pass"] and found.prompts == [] and verdict(found).kind == "open"
    assert ">Captions" in page(found, embedded=False) and report.answer_rows(found) == []


def test_pictures_without_annotations_get_the_same_report_without_a_rate(scene: Any, tmp_path: Path) -> None:
    model, processor, images = scene
    settings = SETTINGS.model_copy(
        update={"benchmarks": ["pope", "fidelity", "latency"], "methods": list(DEFAULT_METHODS), "thresholds": []}
    )
    names = [images.path(number).name for number in images.ids[:3]]
    items = [Item(name, "Describe the image.") for name in names]
    reference = unlabelled_reference(model, processor, CONFIG, images.images_dir, items, settings)
    found = compare(reference, make_predictor(), settings)
    assert found.prompts == [] and found.stores == {} and found.images == 3 and "shift" not in found.names
    assert set(found.fidelity) == {"one-pass", "uniform", "swapped", "position"}
    assert set(found.costs) == {"vanilla", "two-pass", "one-pass", "auto", "uniform"}
    judged = verdict(found)
    assert judged.kind == "open" and "no annotations, so there is no hallucination rate" in judged.sentence
    assert "evaluation.pope_files=FILE" in judged.reason
    kept, costs = report.headline_tables(found)
    assert [row[0] for row in kept[1:]] == list(found.fidelity)
    assert kept[0] == [
        "method",
        "edit kept [95 %]",
        "cosine",
        "effect kept [95 %]",
        "cosine",
        "KL",
    ]  # no empty columns
    assert [row[0] for row in costs[1:]] == list(found.costs) and costs[1][2] == "1.00x"
    paths = report.write(tmp_path, found, embedded=False, command="python train.py data=pictures")
    assert set(paths) == {"html", "md", "json"}
    text = paths["html"].read_text()
    strict = Strict()
    strict.feed(text)
    assert strict.open == [] and ">Fidelity to two-pass" in text and ">Cost of a prefill" in text
    assert "3 pictures that the predictor was not fitted to" in text and "Describe the image." in text
    assert ">Yes/no questions" not in text and "<th>parser" not in text and "nan" not in text
    values = report.read_metrics(paths["json"])
    assert {"eval/one-pass/edit_kept", "eval/one-pass/prefill_ratio"} <= set(values)
    assert report.headlines(found).keys() == {"edit_kept", "prefill_x"}
    with pytest.raises(EvaluationError, match="1 of 1 images that the questions name are not in"):
        unlabelled_reference(model, processor, CONFIG, images.images_dir, [Item("gone.png", "What?")], settings)


def test_bad_inputs_are_named_before_any_forward(scene: Any, tmp_path: Path, monkeypatch: Any) -> None:
    model, processor, images = scene

    def prepare(**changes: Any) -> None:
        prepare_reference(model, processor, CONFIG, images, SETTINGS.model_copy(update=changes))

    monkeypatch.setattr(type(model), "forward", None)
    with pytest.raises(EvaluationError, match=r"evaluation\.images=11, but there are 10 in .*val: lower it"):
        prepare(images=11)
    with pytest.raises(EvaluationError, match=r"at least 2 images, and there are 1: raise"):
        prepare(images=1)
    file = tmp_path / "coco_pope_random.json"
    lines = [{"question_id": n, "image": f"gone{n}.png", "text": "Is there a cat?", "label": "no"} for n in range(3)]
    file.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(EvaluationError, match=r"3 of 3 images that the questions name are not in"):
        prepare(pope_files=[str(file)])
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps({"annotations": [{"image_id": -1, "caption": "x"}]}))
    with pytest.raises(EvaluationError, match=r"3 of 3 images have no reference caption.*about other images"):
        prepare(captions=str(captions))
    captions.write_text("{}")
    with pytest.raises(EvaluationError, match="has no list of annotations"):
        prepare(captions=str(captions))
    with pytest.raises(EvaluationError, match="chair needs annotations"):
        prepare_reference(model, processor, CONFIG, None, SETTINGS.model_copy(
            update={"benchmarks": ["chair"], "images_dir": str(images.images_dir)}))  # fmt: skip
