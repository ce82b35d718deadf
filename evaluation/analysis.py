"""Who is hallucinated about: credit entropy, norms, and the size and place of the objects asked about."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data.images import CocoImages
from evaluation.answers import AnswerStore
from evaluation.methods import ONE_PASS, TWO_PASS, VANILLA
from evaluation.pictures import image_id
from evaluation.questions import Quiz
from evaluation.states import States

if TYPE_CHECKING:
    from evaluation.compare import Prompted

_QUESTION = re.compile(r"is there (?:an?|the|any)? ?(.+?) in the (?:image|picture|photo)", re.IGNORECASE)


@dataclass(frozen=True)
class Part:
    """Questions that have something in common.

    Attributes:
        name: What.
        questions: How many.
        vanilla: Vanilla's rate: hallucination rate by entropy, share of right answers by object.
        change: Method -> its rate minus vanilla's.
    """

    name: str
    questions: int
    vanilla: float
    change: Mapping[str, float]


@dataclass(frozen=True)
class Analysis:
    """What goes with hallucination.

    Attributes:
        entropy: Mean credit entropy over images, in nats.
        entropy_normalised: The same over ln N: comparable between grids.
        by_question: Correlation, over questions about absent objects, of H / ln N and vanilla's "yes".
        by_image: The same over images, with the image's rate.
        tertiles: Absent objects by tertile of H / ln N, low to high.
        norm_attention: Rank correlation of a patch's norm and its attention; NaN if it was not measured.
        norm_overlap: Share of two-pass's sources among the K patches of largest norm.
        norms: (method, part) -> mean norm behind each block.
        objects: Present objects by size, by distance to the border and by the share of two-pass's sources that lie on
            them, where annotations are available.
    """

    entropy: float
    entropy_normalised: float
    by_question: float
    by_image: float
    tertiles: list[Part]
    norm_attention: float
    norm_overlap: float
    norms: Mapping[tuple[str, str], list[float]]
    objects: list[Part]


def analyse(
    quiz: Quiz,
    prompted: Prompted,
    two_pass: AnswerStore,
    images: CocoImages | None,
    states: States | None,
    crops: bool = False,
) -> Analysis:
    """Looks at the headline split under the first prompt.

    Args:
        quiz: The questions.
        prompted: Their answers.
        two_pass: Two-pass's answers, which hold each image's entropy.
        images: Annotations, for sizes and places of objects.
        states: What hidden states say, if they were compared.
        crops: Whether the model sees the middle square of an image.
    """
    split, answered = quiz.splits[quiz.headline], prompted.answered
    seed = next(seed for seed in (None, *range(1000)) if (0, seed) in two_pass)
    entropy = np.full(len(quiz.items), np.nan)
    share = entropy.copy()
    for item in range(len(quiz.items)):
        facts = [image for image in two_pass[item, seed].images if image.entropy is not None]
        if facts:
            entropy[item] = np.mean([image.entropy or 0.0 for image in facts])
            share[item] = np.mean(
                [(image.entropy or 0.0) / math.log(max(math.prod(image.grid), 2)) for image in facts]
            )
    absent = split.rows[~split.truth]
    yes = {name: answered.yes(name) for name in answered.parsed}
    shown = [name for name in yes if name.split(":")[0] in (TWO_PASS, ONE_PASS)]
    rates = [yes[VANILLA][absent], share[absent]]
    names = np.array([quiz.items[item].image for item in absent.tolist()])
    grouped = [[values[names == name].mean() for name in dict.fromkeys(names.tolist())] for values in rates]
    return Analysis(
        entropy=float(np.nanmean(entropy)),
        entropy_normalised=float(np.nanmean(share)),
        by_question=_correlation(*rates),
        by_image=_correlation(*map(np.array, grouped)),
        tertiles=_tertiles(share, absent, yes, shown),
        norm_attention=states.norm_attention if states else math.nan,
        norm_overlap=states.norm_overlap if states else math.nan,
        norms=states.norms if states else {},
        objects=_by_object(quiz, yes, shown, images, two_pass, crops) if images is not None else [],
    )


def _tertiles(
    share: NDArray[np.float64], absent: NDArray[np.int64], yes: Mapping[str, NDArray[np.float64]], shown: list[str]
) -> list[Part]:
    values = share[absent]
    if not len(values) or not np.isfinite(values).all():
        return []
    low, high = np.quantile(values, [1 / 3, 2 / 3])
    members = {
        f"H / ln N up to {low:.3f}": values <= low,
        f"between {low:.3f} and {high:.3f}": (values > low) & (values <= high),
        f"above {high:.3f}": values > high,
    }
    return [_part(name, absent[chosen], yes, shown) for name, chosen in members.items() if chosen.any()]


def _part(name: str, items: NDArray[np.int64], yes: Mapping[str, NDArray[np.float64]], shown: list[str]) -> Part:
    before = yes[VANILLA][items]
    return Part(
        name,
        len(items),
        float(before.mean()),
        {method: float((yes[method][items] - before).mean()) for method in shown},
    )


def _by_object(
    quiz: Quiz,
    yes: Mapping[str, NDArray[np.float64]],
    shown: list[str],
    images: CocoImages,
    two_pass: AnswerStore,
    crops: bool,
) -> list[Part]:
    """Share of present objects that are affirmed, by size, distance to the border and relevance of the sources."""
    split, boxes = quiz.splits[quiz.headline], _boxes(images)
    items: list[int] = []
    values: list[tuple[float, float, float]] = []
    for item, present in zip(split.rows.tolist(), split.truth.tolist(), strict=True):
        found = _QUESTION.match(quiz.items[item].text)
        number = image_id(quiz.items[item].image)
        own = boxes.get((number, found[1].lower())) if found and present and number is not None else None
        if own:
            largest = max(own, key=lambda box: (box.area, box.distance))
            grids = two_pass.of(item)[0].images
            shares = [sources_on(own, one.sources, one.grid, crops) for one in grids[:1]]
            items.append(item)  # tiles don't say where in the image they lie
            values.append((largest.area, largest.distance, shares[0] if len(grids) == 1 else math.nan))
    if len(items) < 3:
        return []
    where, (size, distance, on) = np.array(items), np.array(values).T
    parts = [
        ("largest box under 2 % of the image", size < 0.02),
        ("2 to 10 %", (size >= 0.02) & (size < 0.1)),
        ("over 10 %", size >= 0.1),
        ("box touches the border", distance <= 0.01),
        ("box within the image", distance > 0.01),
        ("none of two-pass's sources on the object", on == 0),
        ("up to a quarter of them", (on > 0) & (on <= 0.25)),
        ("over a quarter", on > 0.25),
    ]
    return [_part(name, where[chosen], yes, shown) for name, chosen in parts if chosen.any()]


@dataclass(frozen=True)
class Box:
    """An object's bounding box.

    Attributes:
        corners: Left, top, right and bottom, in pixels.
        size: Width and height of the image, in pixels.
    """

    corners: tuple[float, float, float, float]
    size: tuple[float, float]

    @property
    def area(self) -> float:
        """As a share of the image's."""
        left, top, right, bottom = self.corners
        return (right - left) * (bottom - top) / (self.size[0] * self.size[1])

    @property
    def distance(self) -> float:
        """To the border, as a share of the side."""
        left, top, right, bottom = self.corners
        width, height = self.size
        return min(left / width, top / height, 1 - right / width, 1 - bottom / height)


def sources_on(boxes: Sequence[Box], sources: Sequence[int], grid: tuple[int, int], crops: bool) -> float:
    """Share of the sources whose patch has its middle in one of the boxes.

    Args:
        boxes: Of one image.
        sources: Patches, row-major.
        grid: Rows and columns of patches.
        crops: Whether they cover the middle square of the image, and not all of it.
    """
    width, height = boxes[0].size
    wide, high = (min(width, height),) * 2 if crops else (width, height)
    found = 0
    for row, column in (divmod(patch, grid[1]) for patch in sources):
        x = (width - wide) / 2 + wide * (column + 0.5) / grid[1]
        y = (height - high) / 2 + high * (row + 0.5) / grid[0]
        corners = (box.corners for box in boxes)
        found += any(left <= x <= right and top <= y <= bottom for left, top, right, bottom in corners)
    return found / len(sources)


def _boxes(images: CocoImages) -> dict[tuple[int, str], list[Box]]:
    """(image, category) -> the box of each object."""
    content: Any = json.loads(images.annotations_file.read_bytes())
    names = {entry["id"]: str(entry["name"]).lower() for entry in content.get("categories", [])}
    sizes = {entry["id"]: (entry.get("width"), entry.get("height")) for entry in content.get("images", [])}
    found: dict[tuple[int, str], list[Box]] = {}
    for entry in content.get("annotations", []):
        width, height = sizes.get(entry["image_id"], (None, None))
        box = entry.get("bbox")
        if not width or not height or not isinstance(box, list) or len(box) != 4:
            continue
        x, y, w, h = map(float, box)
        key = entry["image_id"], names.get(entry["category_id"], "")
        found.setdefault(key, []).append(Box((x, y, x + w, y + h), (width, height)))
    return found


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    if len(a) < 2 or np.std(a) == 0 or not np.std(b) > 0:
        return math.nan
    return float(np.corrcoef(a, b)[0, 1])
