"""The report as one self-contained HTML page: no script, no external resource, light and dark."""

from __future__ import annotations

import base64
import html
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path

from evaluation.charts import curves, forest, scatter
from evaluation.compare import Comparison, Prompted
from evaluation.edits import owned_patches
from evaluation.fit_report import FitTable
from evaluation.methods import ONE_PASS, TWO_PASS, VANILLA
from evaluation.report import (
    LEGEND,
    analysis_rows,
    answer_rows,
    caption_rows,
    cost_rows,
    fact_rows,
    fidelity_rows,
    method_rows,
    title,
)
from evaluation.scores import Changed, roc
from evaluation.verdict import deployed, reading, verdict
from predictor.metrics import Interval

_SHOWN = 12  # changed answers in the gallery, at most
_ROCS = (VANILLA, TWO_PASS, ONE_PASS, "uniform", "swapped", "shift")
_PARTS = {"neighbours": "near", "rest": "elsewhere"}  # short enough for a legend
_SIDE = 300  # pixels of a picture's longer side

_STYLE = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
_COLOURS = "".join(f".c{n}.full{{fill:var(--c{n})}}.c{n}.line,.c{n}.hollow{{stroke:var(--c{n})}}" for n in range(8))


def page(comparison: Comparison, *, embedded: bool, command: str = "", fitted: FitTable | None = None) -> str:
    """The whole page; `fitted` is the table of the fit that made the predictor, of a run that began with one."""
    found = verdict(comparison)
    parts = [
        f"<h1>{html.escape(title(comparison))}</h1>",
        f'<div class="verdict {found.kind}"><strong>{html.escape(found.sentence)}</strong>'
        f"<p>{html.escape(found.reason)}</p></div>",
    ]
    parts += [_questions(comparison, prompt) for prompt in comparison.prompts]
    if rows := caption_rows(comparison):
        note = "CHAIR falls when a caption says less: read it beside recall and length."
        parts.append(f"<h2>Captions</h2><p class='soft'>{note}</p>{_table(rows, comparison)}")
    parts += [_fidelity(comparison), _costs(comparison)]
    parts += [_fit(fitted)] if fitted else []
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in reading(comparison, embedded=embedded))
    parts.append(f"<h2>What the numbers say, and what they do not</h2><ul>{lines}</ul>")
    parts += [_gallery(comparison), _analysis(comparison)]
    parts.append(f"<h2>Methods</h2>{_table(method_rows(comparison), comparison, words=True)}")
    parts.append("<h2>How to reproduce</h2>")
    parts.append(f"<pre><code>{html.escape(command)}</code></pre>" if command else "")
    parts.append(_table(fact_rows(comparison), comparison, words=True))
    body = "".join(parts)
    links = []
    for number, heading in enumerate(re.findall("<h2>(.*?)</h2>", body)):
        body = body.replace(f"<h2>{heading}</h2>", f'<h2 id="part-{number}">{heading}</h2>', 1)
        links.append(f'<a href="#part-{number}">{heading}</a>')
    body = body.replace("</p></div>", f"</p></div><nav>{' · '.join(links)}</nav>", 1)  # behind the verdict
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title(comparison))}</title><style>{_STYLE}{_COLOURS}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def _questions(comparison: Comparison, prompt: Prompted) -> str:
    quiz = comparison.quiz
    assert quiz is not None
    first, split = prompt is comparison.headline, quiz.headline
    scores = {name: prompt.scores[name, split] for name in comparison.names}
    template = html.escape(prompt.template.replace("\n", " / "))
    parts = [
        f"<h2>Yes/no questions, prompt {html.escape(prompt.name)}</h2>",
        f'<p class="soft"><code>{template}</code> · {html.escape(str(comparison.facts["decoding"]))} · '
        f"{len(quiz.splits[split].ids):,} {html.escape(split)} questions about {len(quiz.images):,} images · columns "
        "from accuracy on are of that split</p>",
        _table(answer_rows(comparison, prompt), comparison),
    ]
    if first:
        parts.append(f"<p class='soft'>{LEGEND}</p>")
        changes: dict[str, Interval] = {
            name: one.hr_change for name, one in scores.items() if one.hr_change is not None
        }
        absolute = {name: f"{100 * one.hr.mean:.1f} %" for name, one in scores.items()}
        parts.append(
            f"<h3>Change of the {html.escape(split)} hallucination rate against vanilla's "
            f"{100 * scores[VANILLA].hr.mean:.1f} %</h3><p class='soft'>Points with 95 % intervals, paired over "
            "images; left of 0 is better. In brackets each method's rate.</p><div class='chart wide'>"
            + forest(changes, "percentage points", zero=True, absolute=absolute) + "</div>"
        )  # fmt: skip
        latency = {
            name: (cost.milliseconds, Interval(*(100 * end for end in scores[name].hr)))
            for name, cost in comparison.costs.items()
            if name in scores
        }
        rocs = {name: list(zip(*roc(prompt.answered, name, quiz.splits[split]), strict=True)) for name in _ROCS
                if name in scores}  # fmt: skip
        cells = []
        if latency:
            chart = scatter(latency, "prefill of one question (ms)", "hallucination rate (%)")
            heading = "Latency against hallucination, with 95 % intervals"
            cells.append(f"<div><h3>{heading}</h3><div class='chart'>{chart}</div></div>")
        if not any(math.isnan(place) for points in rocs.values() for point in points for place in point):
            chart = curves(rocs, "yes to absent objects", "yes to present objects", unit=True)
            cells.append(f"<div><h3>ROC of the yes margin</h3><div class='chart'>{chart}</div></div>")
        parts.append(f'<div class="two">{"".join(cells)}</div>')
    return "".join(parts)


def _fidelity(comparison: Comparison) -> str:
    rows = fidelity_rows(comparison)
    if not rows:
        return ""
    note = (
        "Edit kept: the share of two-pass's change of the patches' states, behind the last edited block, that a "
        "method makes too; 100 % is the same edit. Effect kept: the same at the last text row, whose "
        "state makes the answer. KL: of the next token, two-pass to the method, in nats."
    )
    parts = [f"<h2>Fidelity to two-pass</h2><p class='soft'>{note}</p>{_table(rows, comparison)}"]
    lines = {}
    for name, curve in comparison.curves.items():
        lines[f"{name}"] = [(100 * point.share, 100 * point.error) for point in curve]
        lines["at random"] = [(100 * point.share, 100 * point.error_random) for point in curve]
    if lines:
        chart = curves(
            lines, "questions handed to the diagnostic run (%)", "distance to two-pass (% of vanilla's)", unit=False
        )
        parts.append(f"<h3>auto: distance to two-pass by the share handed over, least confident first</h3>"
                     f"<div class='chart'>{chart}</div>")  # fmt: skip
    return "".join(parts)


def _costs(comparison: Comparison) -> str:
    rows = cost_rows(comparison)
    note = "One prefill of one image with one prompt, interleaved; CPU time of one thread, on CUDA the device's time. "
    note += "Ratios are medians over pairs, times are medians over rounds: one does not follow from the other."
    return f"<h2>Cost of a prefill</h2><p class='soft'>{note}</p>{_table(rows, comparison)}" if rows else ""


def _fit(fitted: FitTable) -> str:
    words = html.escape(" ".join([fitted.title, *fitted.notes]))
    return (
        f"<h2>The fit</h2><p class='soft'>{words}</p>{_table(fitted.rows)}"
        f"<p class='soft'>{html.escape(fitted.confidence)}</p>" + "".join(map(_embedded, fitted.figures))
    )


def _embedded(figure: Path) -> str:
    coded = base64.b64encode(figure.read_bytes()).decode()
    return f"<div class='scroll'><img class='figure' alt='{figure.stem}' src='data:image/png;base64,{coded}'></div>"


def _analysis(comparison: Comparison) -> str:
    rows, one = analysis_rows(comparison), comparison.analysis
    parts = [f"<h2>Analysis</h2>{_table(rows, comparison)}"] if rows else []
    if one is not None and one.norms:
        lines = {
            name if part == "sources" else f"{name}:{_PARTS[part]}": list(enumerate(values))
            for (name, part), values in one.norms.items()
        }
        chart = curves(lines, "decoder block", "mean norm of the residual stream", unit=False)
        parts.append(
            "<h3>Norm by block: sources, their neighbours, other patches</h3><p class='soft'>'two-pass': its "
            "sources; ':near': their neighbours; ':elsewhere': the other patches. "
            f"Rank correlation of norm and attention {one.norm_attention:.2f}; "
            f"{100 * one.norm_overlap:.0f} % of two-pass's sources are among the patches of largest norm.</p>"
            f"<div class='chart'>{chart}</div>"
        )
    return "".join(parts)


def _gallery(comparison: Comparison) -> str:
    """Changed answers over their images, good and bad in turn; maps of the first questions where none changed."""
    headline, quiz = comparison.headline, comparison.quiz
    if headline is None or quiz is None or TWO_PASS not in comparison.names:
        return ""
    shown: list[Changed] = []
    for method in (TWO_PASS, ONE_PASS):
        own = headline.changed.get(method, [])
        good, bad = ([one for one in own if one.corrected is kind] for kind in (True, False))
        paired = [one for pair in zip(good, bad, strict=False) for one in pair]
        rest = good[len(bad) :] + bad[len(good) :]
        shown += (paired + rest)[: _SHOWN // 2]
    items = [one.item for one in shown]
    shown.sort(key=lambda one: items.index(one.item))  # one question under both methods: side by side
    counts = ", ".join(
        f"{method}: {sum(one.corrected for one in own)} corrected, {sum(not one.corrected for one in own)} broken"
        for method, own in headline.changed.items()
        if method in (TWO_PASS, ONE_PASS)
    )
    cards = [_card(comparison, one.item, one.method, one) for one in shown]
    intro = f"Of the {quiz.headline} questions. {counts}."
    if not shown:
        intro += " No answer changed; the first questions and their sources instead."
        method = ONE_PASS if ONE_PASS in comparison.names else TWO_PASS
        rows = quiz.splits[quiz.headline].rows.tolist()
        cards = [_card(comparison, item, method, None) for item in rows[:: max(len(rows) // 4, 1)][:4]]
    note = "Framed: sources; yellow: neighbours that gain."
    head = f"<h2>Changed answers</h2><p class='soft'>{html.escape(intro)} {note}</p>"
    return f"{head}<div class='cards'>{''.join(cards)}</div>"


def _card(comparison: Comparison, item: int, method: str, changed: Changed | None) -> str:
    quiz, headline = comparison.quiz, comparison.headline
    assert quiz is not None and headline is not None
    asked = quiz.items[item]
    answer = comparison.stores[headline.name, method].of(item)[0]
    shift = (answer.margin or 0.0) - (comparison.stores[headline.name, VANILLA].of(item)[0].margin or 0.0)
    words = f"{html.escape(asked.text)}<br>"
    if changed is not None:
        kind, word = ("good", "corrected") if changed.corrected else ("bad", "broken")
        words += f'<b class="{kind}">{word}</b> by {html.escape(method)}: {changed.before} → {changed.after} '
        words += f"(right: {changed.label})<br>"
    words += f'<span class="soft">{html.escape(method)}, margin {shift:+.3f} · {html.escape(asked.image)}</span>'
    images = answer.images
    picture = _picture(comparison, asked.image, images[0].grid, images[0].sources if len(images) == 1 else [])
    return f'<div class="card">{picture}<div>{words}</div></div>'


def _picture(comparison: Comparison, name: str, grid: tuple[int, int], sources: Sequence[int]) -> str:
    """An image with its sources and the neighbours that they write to, as the processor shows it to the model."""
    image = comparison.pictures.open(name)
    crops = comparison.facts["grid_crops"]
    if crops and image.width != image.height:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    image.thumbnail((_SIDE, _SIDE))
    stream = io.BytesIO()
    image.save(stream, format="JPEG", quality=82)
    data = base64.b64encode(stream.getvalue()).decode()
    rows, columns = grid
    width, height = image.width / columns, image.height / rows
    connectivity = comparison.facts["scr"]["connectivity"]
    near = owned_patches(sources, grid, connectivity) if sources else []
    squares = [_square(patch, columns, width, height, "near") for patch in near]
    for patch in sources:
        squares += [_square(patch, columns, width, height, kind) for kind in ("source", "source2")]
    return (
        f'<svg viewBox="0 0 {image.width} {image.height}" role="img" aria-label="{html.escape(name)}">'
        f'<image href="data:image/jpeg;base64,{data}" width="{image.width}" height="{image.height}"/>'
        f"{''.join(squares)}</svg>"
    )


def _square(patch: int, columns: int, width: float, height: float, kind: str) -> str:
    row, column = divmod(patch, columns)
    size = f'width="{width:.1f}" height="{height:.1f}"'
    return f'<rect class="{kind}" x="{column * width:.1f}" y="{row * height:.1f}" {size}/>'


def _table(rows: Sequence[Sequence[str]], comparison: Comparison | None = None, *, words: bool = False) -> str:
    """A table; names of a comparison's controls are grey, and what would be deployed is bold."""
    if not rows:
        return ""
    marked = deployed(comparison) if comparison else "predictor"
    controls = {method.name for method in comparison.methods if method.entry.control} if comparison else set[str]()
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    body = "".join(
        f"<tr{' class=control' if row[0] in controls else ' class=marked' * (row[0] == marked and not words)}>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        + "</tr>"
        for row in rows[1:]
    )
    return (
        f'<div class="scroll"><table{" class=words" if words else ""}><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
