"""Reports a comparison: tables, metrics under stable names, and files: HTML, Markdown, JSON and the answers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.answers import Answer
from evaluation.compare import Comparison, Prompted
from evaluation.decoding import parse_margin
from evaluation.fit_report import FitTable
from evaluation.methods import AUTO, ONE_PASS, TWO_PASS, VANILLA
from evaluation.parsers import PARSERS
from evaluation.pictures import image_id
from evaluation.tables import markdown
from evaluation.verdict import deployed, points, reading, share, verdict
from predictor.metrics import Interval
from scr_runtime.files import write_file

LEGEND = (
    "HR: hallucination rate, the share of questions about absent objects that get a yes. TPR: the share of questions "
    "about present objects that do. yes: the share of all. Fixed/broken: answers that a method corrects and spoils. "
    "Edit kept: share of two-pass's change of the states. Prefill: its time, as a ratio to vanilla's."
)
"""Of ``answer_rows``."""
_SHARES = (0.0, 0.1, 0.2, 0.3, 0.5, 1.0)  # of the questions, handed to the diagnostic run


def answer_rows(comparison: Comparison, prompt: Prompted | None = None) -> list[list[str]]:
    """Header and one row per method: rates on every split, changes, fidelity and cost; empty without questions."""
    prompt, quiz = prompt or comparison.headline, comparison.quiz
    if prompt is None or quiz is None:
        return []
    last = quiz.headline
    header = ["method", *(f"HR {split[:3]}" for split in quiz.splits), f"change, {last[:3]} [95 %]"]
    header += ["acc", "TPR", "F1", "yes", "AUC", "fixed/broken", "edit kept", "prefill"]
    rows = [header]
    for method in comparison.names:
        scores = {split: prompt.scores[method, split] for split in quiz.splits}
        final, test = scores[last], scores[last].mcnemar
        follow, cost = comparison.fidelity.get(method), comparison.costs.get(method)
        kept = None if follow is None else follow.edit_kept
        rows.append(
            [
                method,
                *(f"{100 * item.hr.mean:.1f}" for item in scores.values()),
                "-" if final.hr_change is None else points(final.hr_change),
                f"{100 * final.accuracy:.1f}",
                f"{100 * final.tpr:.1f}",
                f"{100 * final.f1:.1f}",
                f"{100 * final.yes_ratio:.1f}",
                _number(final.auc, 3),
                "-" if test is None else f"{test.corrected}/{test.broken}",
                "1" if method == TWO_PASS else "-" if kept is None else _number(round(kept.mean, 2) + 0.0, 2),
                "-" if cost is None else f"{cost.ratio:.2f}x",
            ]
        )
    return rows


def headline_tables(comparison: Comparison) -> list[list[list[str]]]:
    """What the terminal and MLflow's page show: the answers; without any, fidelity and cost."""
    if comparison.prompts:
        return [answer_rows(comparison)]
    return [rows for rows in (fidelity_rows(comparison), cost_rows(comparison)) if rows]


def caption_rows(comparison: Comparison) -> list[list[str]]:
    """Header and one row per method and length: CHAIR with recall and length beside it; empty without captions."""
    if not comparison.captions:
        return []
    header = [
        "method",
        "tokens",
        "CHAIR-s",
        "change [95 %]",
        "CHAIR-i",
        "recall",
        "change [95 %]",
        "length",
        "objects",
    ]
    rows = [[*header, "CIDEr-D", "cut off", "differ", "alike"]]
    for (method, limit), found in comparison.captions.items():
        one = found.chair
        rows.append(
            [
                method,
                str(limit),
                f"{100 * one.chair_s:.1f}",
                "-" if found.chair_s_change is None else points(found.chair_s_change),
                f"{100 * one.chair_i:.1f}",
                f"{100 * one.recall:.1f}",
                "-" if found.recall_change is None else points(found.recall_change),
                f"{found.tokens:.1f}",
                f"{one.mentioned:.1f}",
                "-" if found.cider is None else f"{found.cider:.1f}",
                f"{100 * found.cut:.0f} %",
                "-" if found.differ is None else f"{100 * found.differ:.0f} %",
                "-" if found.alike is None else f"{found.alike:.1f}",
            ]
        )
    return rows


def fidelity_rows(comparison: Comparison) -> list[list[str]]:
    """Header and one row per method that is compared with two-pass on hidden states."""
    rows = [["method", "edit kept [95 %]", "cosine", "effect kept [95 %]", "cosine", "KL", "Spearman", "follows"]]
    for name, found in comparison.fidelity.items():
        if found.edit_kept is None or found.effect_kept is None:
            continue
        cells = [share(found.edit_kept), f"{found.edit_cosine:.2f}", share(found.effect_kept)]
        cells += [f"{found.effect_cosine:.2f}", f"{found.kl:.2g}", _number(found.spearman, 2)]
        follows = f"{found.followed} of {found.changed}" if math.isfinite(found.agreement) else "-"
        rows.append([name, *cells, follows])
    kept = [place for place in range(len(rows[0])) if any(row[place] != "-" for row in rows[1:])]
    return [[row[place] for place in kept] for row in rows] if len(rows) > 1 else []


def cost_rows(comparison: Comparison) -> list[list[str]]:
    """Header and one row per method whose prefill was timed."""
    rows = [["method", "prefill", "of vanilla's", "quartiles"]]
    for name, cost in comparison.costs.items():
        quartiles = f"{cost.low:.2f} to {cost.high:.2f}"
        rows.append([name, f"{cost.milliseconds:.1f} ms", f"{cost.ratio:.2f}x", quartiles])
    return rows if len(rows) > 1 else []


def analysis_rows(comparison: Comparison) -> list[list[str]]:
    """Header and one row per group of questions: entropy tertiles, sizes and places of objects."""
    one = comparison.analysis
    if one is None or not (one.tertiles or one.objects):
        return []
    methods = list((one.tertiles or one.objects)[0].change)
    rows = [["questions", "n", "vanilla says yes", *(f"change by {name}" for name in methods)]]
    for kind, parts in (("absent", one.tertiles), ("present", one.objects)):
        for part in parts:
            changes = [f"{100 * part.change[name]:+.1f}" for name in methods]
            rows.append([f"{kind}: {part.name}", f"{part.questions:,}", f"{100 * part.vanilla:.1f}", *changes])
    return rows


def method_rows(comparison: Comparison) -> list[list[str]]:
    """What each method is."""
    return [["method", "what it is"], *([method.name, method.entry.description] for method in comparison.methods)]


def fact_rows(comparison: Comparison, command: str = "") -> list[list[str]]:
    """What identifies the result."""
    facts, scr = comparison.facts, comparison.facts["scr"]
    model = facts["model"]
    rows = [["what", "value"]]
    rows += [["command", command]] if command else []
    place = f"folder {model['hub_id']}" if model.get("weights_sha256") else model["hub_id"]
    place += f", revision {model['revision']}" if model["revision"] else ""
    name = facts.get("model_name")
    rows.append(["model", f"{f'{name} ({place})' if name else place}, {model['dtype']}"])
    weights = str(model.get("weights_sha256") or model["config_sha256"])[:16]
    rows.append(["weights, processor", f"sha256 {weights}, {model['image_processor']}"])
    layers = "edit blocks {} to {}, map from blocks {} to {}".format(*scr["edit_layers"], *scr["attention_layers"])
    rows.append(
        ["SCR", f"K = {scr['num_sources']}, lambda = {scr['strength']}, {layers}, {scr['connectivity']}-connected"]
    )
    for name, about in facts["predictors"].items():
        known = ", ".join(f"{key} {value}" for key, value in about.items() if value is not None)
        rows.append(["predictor" if name == "predictor" else f"predictor {name}", known])
    for split, (origin, count, checksum) in facts.get("questions", {}).items():
        rows.append([f"questions, {split}", f"{count:,}, {origin}, sha256 {checksum[:16]}"])
    rows.append(["images", facts["images"]])
    if "question_images_sha256" in facts:
        rows.append(
            ["images asked about", f"{facts['question_images']:,}, sha256 {facts['question_images_sha256'][:16]}"]
        )
    if "caption_ids_sha256" in facts:
        rows.append(["images captioned", f"{facts['caption_images']:,}, sha256 {facts['caption_ids_sha256'][:16]}"])
        rows.append(["caption prompt", comparison.settings.chair_prompt])
    rows += [[f"prompt {name}", template.replace("\n", " / ")] for name, template in facts["prompts"].items()]
    rows += [["answers", facts["decoding"]], ["parser", facts["parser"]]] if comparison.prompts else []
    rows.append(["seed", str(facts["seed"])])
    rows.append(["libraries", ", ".join(f"{name} {version}" for name, version in facts["libraries"].items())])
    return rows


def metrics(comparison: Comparison) -> dict[str, float]:
    """Every number under a stable name, as evaluation.json holds it (docs/evaluation.md lists them)."""
    values: dict[str, float] = {}
    for place, prompt in enumerate(comparison.prompts):
        start = "eval" if place == 0 else f"eval/prompt-{prompt.name}"
        for (method, split), item in prompt.scores.items():
            prefix = f"{start}/{_safe(method)}/{split}"
            values |= _ends(f"{prefix}/hr", item.hr)
            for key in ("accuracy", "precision", "tpr", "f1", "yes_ratio", "auc", "unread", "disagrees"):
                values[f"{prefix}/{key}"] = float(getattr(item, key))
            for key in ("hr_change", "accuracy_change", "tpr_change"):
                values |= _ends(f"{prefix}/{key}", getattr(item, key))
            if item.mcnemar is not None:
                found = item.mcnemar
                values |= {f"{prefix}/corrected": found.corrected, f"{prefix}/broken": found.broken}
                values[f"{prefix}/mcnemar_p"] = found.p
        for (method, control, split), difference in prompt.differences.items():
            values |= _ends(f"{start}/{_safe(method)}/{split}/hr_minus_{control}", difference)
    values |= dict(_fidelity_metrics(comparison))
    for (method, limit), item in comparison.captions.items():
        prefix = f"eval/{_safe(method)}/chair_{limit}"
        values |= {f"{prefix}/{key}": float(value) for key, value in vars(item.chair).items()}
        values |= {f"{prefix}/tokens": item.tokens, f"{prefix}/cut": item.cut}
        values |= {f"{prefix}/cider": item.cider} if item.cider is not None else {}
        values |= _ends(f"{prefix}/chair_s_change", item.chair_s_change)
        values |= _ends(f"{prefix}/recall_change", item.recall_change)
    for method, cost in comparison.costs.items():
        values |= {
            f"eval/{_safe(method)}/prefill_ratio": cost.ratio,
            f"eval/{_safe(method)}/prefill_ms": cost.milliseconds,
        }
    return {key: float(value) for key, value in values.items() if value is not None and math.isfinite(value)}


def headlines(comparison: Comparison) -> dict[str, float]:
    """The few numbers that a table of runs has room for: names of at most 13 letters; hr_* are in percent."""
    values: dict[str, float | None] = {}
    quiz, prompt, method = comparison.quiz, comparison.headline, deployed(comparison)
    if quiz is not None and prompt is not None:
        for name in (VANILLA, TWO_PASS, ONE_PASS):
            if name in comparison.names:
                values[f"hr_{name.replace('-', '_')}"] = 100 * prompt.scores[name, quiz.headline].hr.mean
    if method is not None and (found := comparison.fidelity.get(method)) and found.edit_kept is not None:
        values["edit_kept"] = found.edit_kept.mean
    if method is not None and method in comparison.costs:
        values["prefill_x"] = comparison.costs[method].ratio
    values["fallback"] = comparison.fallback.get(AUTO)
    return {key: round(float(value), 4) for key, value in values.items() if value is not None and math.isfinite(value)}


def fallback_curve(comparison: Comparison) -> dict[int, float]:
    """Share of the questions that auto hands over, in percent -> what is left of vanilla's distance to two-pass."""
    curve = comparison.curves.get(ONE_PASS, ())
    return {round(100 * point.share): round(point.error, 4) for point in curve if math.isfinite(point.error)}


def _fidelity_metrics(comparison: Comparison) -> Iterable[tuple[str, float]]:
    for method, item in comparison.fidelity.items():
        for key, value in vars(item).items():
            if isinstance(value, Interval):
                yield from _ends(f"eval/{_safe(method)}/{key}", value).items()
            elif value is not None:
                yield f"eval/{_safe(method)}/{key}", float(value)
    for name, item in zip(("sensitivity", "sensitivity_strongest"), comparison.sensitivity, strict=False):
        yield from ((f"eval/{name}/{key}", float(getattr(item, key))) for key in ("shift", "margin", "changed"))
    for method, value in comparison.fallback.items():
        yield f"eval/{_safe(method)}/fallback", value
    for method, curve in comparison.curves.items():
        name = _safe(method).replace("one-pass", "auto")
        for point in (point for point in curve if point.share in _SHARES):
            prefix = f"eval/{name}_{round(100 * point.share)}"
            yield f"{prefix}/error", point.error
            yield f"{prefix}/shift_correlation", point.shift_correlation
    if comparison.analysis is not None:
        one = comparison.analysis
        yield "eval/entropy_correlation", one.by_image
        yield "eval/entropy", one.entropy
        yield "eval/entropy_normalised", one.entropy_normalised
        yield "eval/norm_attention", one.norm_attention


def markdown_text(comparison: Comparison, *, embedded: bool, command: str = "", fitted: FitTable | None = None) -> str:
    """The report as Markdown."""
    found = verdict(comparison)
    parts = [f"# {title(comparison)}", "", f"**{found.sentence}** {found.reason}", ""]
    for prompt in comparison.prompts:
        parts += [f"## Yes/no questions, prompt {prompt.name}", "", markdown(answer_rows(comparison, prompt)), ""]
    parts += [LEGEND, ""] if comparison.prompts else []
    for name, rows in (
        ("Captions", caption_rows(comparison)),
        ("Fidelity to two-pass", fidelity_rows(comparison)),
        ("Cost of a prefill", cost_rows(comparison)),
        ("Analysis", analysis_rows(comparison)),
    ):
        parts += [f"## {name}", "", markdown(rows), ""] if rows else []
    if fitted is not None:
        words = [fitted.title, *fitted.notes]
        parts += ["## The fit", "", " ".join(words), "", markdown(fitted.rows), "", fitted.confidence, ""]
    parts += ["## What the numbers say", "", *(f"- {line}" for line in reading(comparison, embedded=embedded)), ""]
    parts += ["## Methods", "", markdown(method_rows(comparison)), ""]
    parts += ["## How to reproduce", "", markdown(fact_rows(comparison, command)), ""]
    return "\n".join(parts)


def title(comparison: Comparison) -> str:
    """Model, method and size in one line."""
    scr, model = comparison.facts["scr"], comparison.facts.get("model_name") or comparison.facts["model"]["hub_id"]
    data = f" of {name}" if (name := comparison.facts.get("data_name")) else ""
    size = f"{comparison.images:,} images{data}"
    return f"SCR on {model}: {size}, K = {scr['num_sources']}, seed {comparison.settings.seed}"


def answer_lines(comparison: Comparison) -> Iterable[str]:
    """One JSON line per answer, in the order of methods and questions, without anything that a clock says."""
    quiz = comparison.quiz
    places: dict[int, dict[str, Any]] = {}
    for split, part in (quiz.splits if quiz else {}).items():
        for item, truth, number in zip(part.rows.tolist(), part.truth.tolist(), part.ids, strict=True):
            known = places.setdefault(item, {"question_ids": {}, "label": "yes" if truth else "no"})
            known["question_ids"][split] = number
    for (task, method), store in comparison.stores.items():
        prompt = next((one for one in comparison.prompts if one.name == task), None)
        items = quiz.items if prompt is not None and quiz is not None else []
        for item, asked in enumerate(items):
            about = {
                "prompt": task,
                "text": prompt.template.replace("{question}", asked.text) if prompt else asked.text,
            }
            for answer in store.of(item):
                yield json.dumps(
                    {"benchmark": "pope", **_record(comparison, method, asked.image, answer), **about, **places[item]}
                )
        if task == "chair":
            for item, number in enumerate(comparison.facts["caption_ids"]):
                for answer in store.of(item):
                    record = _record(comparison, method, "", answer)
                    yield json.dumps({"benchmark": "chair", **record, "image_id": number})


def _record(comparison: Comparison, method: str, image: str, answer: Answer) -> dict[str, Any]:
    generated = bool(answer.tokens) or comparison.settings.decoding != "margin"
    parsed = PARSERS[comparison.settings.parser](answer.text) if generated else parse_margin(answer.margin or 0.0)
    return {
        "method": method,
        "decoding": comparison.settings.decoding,
        "seed": answer.seed,
        "image": image,
        "image_id": image_id(image) if image else None,
        "answer": answer.text,
        "parsed": parsed,
        "margin": answer.margin,
        "tokens": len(answer.tokens),
        "images": [vars(facts) for facts in answer.images],
    }


def write(
    folder: Path, comparison: Comparison, *, embedded: bool, command: str = "", fitted: FitTable | None = None
) -> dict[str, Path]:
    """Writes evaluation.html, evaluation.md, evaluation.json and, if there are answers, answers.jsonl into a folder.

    Returns:
        Kind -> path.
    """
    from evaluation.page import page

    folder.mkdir(parents=True, exist_ok=True)
    paths = {kind: folder / f"evaluation.{kind}" for kind in ("html", "md", "json")}
    if comparison.stores:
        paths["answers"] = folder / "answers.jsonl"
        write_file(paths["answers"], "".join(f"{line}\n" for line in answer_lines(comparison)).encode())
    about: dict[str, Any] = {"embedded": embedded, "command": command, "fitted": fitted}
    write_file(paths["md"], markdown_text(comparison, **about).encode())
    found = verdict(comparison)
    content = {
        "verdict": vars(found),
        "deployed": deployed(comparison),
        "command": command,
        "facts": comparison.facts,
        "metrics": metrics(comparison),
    }
    write_file(paths["json"], (json.dumps(content, indent=1, default=_plain) + "\n").encode())
    write_file(paths["html"], page(comparison, **about).encode())
    return paths


def read_metrics(file: Path) -> Mapping[str, float]:
    """The metrics of an evaluation.json."""
    return json.loads(file.read_text(encoding="utf-8"))["metrics"]


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


def _ends(name: str, interval: Interval | None) -> dict[str, float]:
    if interval is None:
        return {}
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}


def _safe(method: str) -> str:
    """A method's name as MLflow takes it."""
    return method.replace(":", "-").replace("@", "_")


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"
