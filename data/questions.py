"""Yes/no questions about objects, made from annotations as POPE makes them (Li et al., arXiv 2305.10355).

A present object gives a question whose answer is yes. The absent ones are chosen by strategy:

- `random`: any absent category;
- `popular`: the absent categories that the most images show;
- `adversarial`: the absent categories that most often occur together with what the image does show.

Everything follows from (seed, image id) alone: no question depends on which other images are asked about.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations, cycle, islice
from typing import get_args

from data.errors import SettingsError
from data.images import CocoImages, seeded_order
from data.settings import CATEGORY_KINDS, DEFAULT_MIX, PromptKind, is_prompt_text
from data.wording import CAPTION_PROMPT, question_text

STRATEGIES = ("random", "popular", "adversarial")
PROMPT_KINDS: tuple[str, ...] = get_args(PromptKind)


@dataclass(frozen=True)
class Question:
    """One prompt about one image.

    Attributes:
        image_id: the image.
        text: what the model is asked.
        label: "yes" or "no"; None for a caption prompt.
        category: the object asked about; None for a caption prompt.
        strategy: in `pope_questions` the strategy of the whole list (as in POPE's files, where the yes questions
            belong to a list too); in `image_prompts` how this prompt was chosen: one of `PROMPT_KINDS`, or `text`.
    """

    image_id: int
    text: str
    label: str | None
    category: str | None
    strategy: str


@dataclass(frozen=True)
class ObjectCounts:
    """How often categories occur, alone and together, counted once per image.

    Attributes:
        frequency: images per category.
        together: images per ordered pair of categories.
    """

    frequency: Counter[str] = field(default_factory=Counter)
    together: Counter[tuple[str, str]] = field(default_factory=Counter)


def count_objects(index: CocoImages, image_ids: Iterable[int] | None = None) -> ObjectCounts:
    """Counts categories and pairs of categories over images (default: all of the index)."""
    counts = ObjectCounts()
    for image_id in index.ids if image_ids is None else image_ids:
        names = sorted(index.present(image_id))
        counts.frequency.update(names)
        for a, b in combinations(names, 2):
            counts.together[a, b] += 1
            counts.together[b, a] += 1
    return counts


def absent_categories(index: CocoImages, counts: ObjectCounts, image_id: int, strategy: str, seed: int) -> list[str]:
    """The categories that an image does not show, in the order in which questions are made of them.

    `adversarial` ranks by the number of images that show the category together with one of this image's
    categories, summed over those; `popular` by frequency. Ties go to the more frequent one, then to the seeded
    order.

    Raises:
        ValueError: an unknown strategy.
    """
    present = index.present(image_id)
    absent = [name for name in index.categories if name not in present]
    shuffled = seeded_order(absent, seed, f"absent:{image_id}")
    if strategy == "random":
        return shuffled
    if strategy == "popular":
        return sorted(shuffled, key=lambda name: -counts.frequency[name])
    if strategy == "adversarial":
        beside = {name: sum(counts.together[other, name] for other in present) for name in absent}
        return sorted(shuffled, key=lambda name: (-beside[name], -counts.frequency[name]))
    raise ValueError(f"unknown strategy {strategy!r}: use one of {', '.join(STRATEGIES)}")


def pope_questions(
    index: CocoImages,
    image_ids: Iterable[int],
    strategy: str,
    per_image: int = 6,
    seed: int = 0,
    counts: ObjectCounts | None = None,
) -> list[Question]:
    """Balanced yes/no questions: per image, yes and no in turn, as in POPE's files.

    Args:
        index: images and annotations.
        image_ids: images to ask about.
        strategy: how absent objects are chosen: random, popular or adversarial.
        per_image: questions per image, an even number; an image that shows fewer than half as many categories gets
            fewer (still balanced), one that shows none gets none.
        seed: chooses among present and absent categories. The present ones do not depend on the strategy, so that
            strategies can be compared image by image.
        counts: tables to rank by; by default counted over the whole index.
    """
    if per_image < 2 or per_image % 2:
        raise ValueError(
            f"per_image={per_image}: half of the questions are yes, half no: use an even number from 2 on"
        )
    if counts is None:
        counts = count_objects(index)
    questions = []
    for image_id in image_ids:
        present = seeded_order(index.present(image_id), seed, f"present:{image_id}")
        absent = absent_categories(index, counts, image_id, strategy, seed)
        for yes, no in zip(present[: per_image // 2], absent[: per_image // 2], strict=False):
            questions.append(Question(image_id, question_text(yes), "yes", yes, strategy))
            questions.append(Question(image_id, question_text(no), "no", no, strategy))
    return questions


def image_prompts(
    index: CocoImages,
    counts: ObjectCounts,
    image_id: int,
    prompts: int,
    mix: Sequence[str] = DEFAULT_MIX,
    seed: int = 0,
) -> list[Question]:
    """The prompts under which one image's maps are harvested: `mix` in turn, from a seeded start.

    No prompt comes twice: a caption or a text is asked once per image, and no category is asked about twice. When an
    image has no present (absent) category left, an absent (present) one takes its place.

    Args:
        index: images and annotations.
        counts: tables to rank absent categories by.
        image_id: the image.
        prompts: how many.
        mix: kinds of prompts, and texts that are asked as they are.
        seed: chooses start and categories.

    Raises:
        SettingsError: an unknown kind in `mix`, or more prompts than `mix` and the categories can give.
    """
    check_prompts(index, prompts, mix)
    fixed = {kind: CAPTION_PROMPT if kind == "caption" else kind for kind in mix if kind not in CATEGORY_KINDS}
    order = {kind: absent_categories(index, counts, image_id, kind, seed) for kind in STRATEGIES}
    order["present"] = seeded_order(index.present(image_id), seed, f"present:{image_id}")
    # an even start keeps yes and no alternating in the default mix
    start: int = seeded_order(range(0, len(mix), 2), seed, f"start:{image_id}")[0]
    chosen: list[Question] = []
    asked: set[str] = set()
    for kind in islice(cycle(mix), start, None):
        if len(chosen) == prompts:
            break
        if kind not in CATEGORY_KINDS:
            if text := fixed.pop(kind, None):
                chosen.append(Question(image_id, text, None, None, kind if kind == "caption" else "text"))
            continue
        if len(asked) == len(index.categories):
            continue  # only captions and texts are left
        other = "random" if kind == "present" else "present"
        kind, category = next((way, name) for way in (kind, other) for name in order[way] if name not in asked)
        asked.add(category)
        label = "yes" if kind == "present" else "no"
        chosen.append(Question(image_id, question_text(category), label, category, kind))
    return chosen


def check_prompts(index: CocoImages, prompts: int, mix: Sequence[str]) -> None:
    """Checks that an image can have so many prompts of these kinds.

    Raises:
        SettingsError: an unknown kind in `mix`, kinds that need annotations where there are none, or more prompts than
            `mix` and the categories can give.
    """
    unknown = sorted(kind for kind in set(mix) - set(PROMPT_KINDS) if not is_prompt_text(kind))
    if unknown or not mix:
        known = f"{', '.join(PROMPT_KINDS)}, or texts of several words"
        raise SettingsError(f"harvest.prompts has unknown kinds {unknown or mix}: use {known}")
    fixed, about = set(mix) - CATEGORY_KINDS, set(mix) & CATEGORY_KINDS
    if about and not index.annotated:
        raise SettingsError(
            f"harvest.prompts has {', '.join(sorted(about))}, which ask about annotated objects, and "
            f"{index.images_dir} has no annotations: use caption, or texts of several words"
        )
    most = len(fixed) + len(index.categories) * bool(about)
    if not 1 <= prompts <= most:
        raise SettingsError(
            f"harvest.prompts_per_image={prompts}: use 1 to {most}: {len(index.categories)} categories can be asked "
            "about, captions and texts asked for, each once, if harvest.prompts lists questions and caption"
        )
