"""Captions under every method: which images, their references, and the scores of CHAIR, recall, length and CIDEr-D."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.images import CocoImages, seeded_order
from evaluation.answers import AnswerStore
from evaluation.chair import Chair, chair, drop_unfinished
from evaluation.cider import cider_d
from evaluation.errors import EvaluationError
from evaluation.fidelity import first_difference
from evaluation.methods import TWO_PASS, VANILLA
from evaluation.questions import Item, listed
from evaluation.settings import EvaluationSettings
from evaluation.synonyms import Vocabulary, vocabulary
from predictor.metrics import Interval, bootstrap_interval


@dataclass(frozen=True)
class Gallery:
    """The images that are captioned.

    Attributes:
        items: One request per image.
        ids: Their image ids.
        truth: Categories in each: its annotations', and those that its reference captions mention.
        references: Image id -> reference captions; `None` without a file of captions.
        words: How categories are found in captions.
    """

    items: list[Item]
    ids: list[int]
    truth: list[frozenset[str]]
    references: dict[int, list[str]] | None
    words: Vocabulary

    @property
    def sha256(self) -> str:
        """Checksum of the image ids: results on other images are not comparable."""
        return hashlib.sha256(json.dumps(sorted(self.ids)).encode()).hexdigest()


def choose_images(images: CocoImages, settings: EvaluationSettings) -> Gallery:
    """Chooses images by seed and reads what they show.

    Args:
        images: Held-out images with annotations.
        settings: How many images, the seed, the request, and files of captions and words.

    Raises:
        EvaluationError: The captions are of other images, or a file cannot be read.
    """
    ids: list[int] = seeded_order(images.ids, settings.seed, "captions")[: settings.chair_images]
    if len(ids) < 2:
        raise EvaluationError(f"chair needs at least 2 images, and {images.annotations_file} lists {len(ids)}")
    words = vocabulary(images.categories, Path(settings.synonyms) if settings.synonyms else None)
    references = _references(images, settings)
    if references is not None:
        lacking = [str(image) for image in ids if image not in references]
        if lacking:
            raise EvaluationError(
                f"{len(lacking)} of {len(ids)} images have no reference caption (image ids {listed(lacking)}): "
                "evaluation.captions is about other images; give the captions_*.json that belongs to "
                f"{images.annotations_file}"
            )
        references = {image: references[image] for image in ids}
    named = {
        image: {name for text in texts for name in words.find(text)} for image, texts in (references or {}).items()
    }
    return Gallery(
        items=[Item(images.path(i).relative_to(images.images_dir).as_posix(), settings.chair_prompt) for i in ids],
        ids=ids,
        truth=[images.present(image) | named.get(image, set()) for image in ids],
        references=references,
        words=words,
    )


def _references(images: CocoImages, settings: EvaluationSettings) -> dict[int, list[str]] | None:
    beside = images.annotations_file.with_name(images.annotations_file.name.replace("instances", "captions"))
    if settings.captions is None and (beside == images.annotations_file or not beside.is_file()):
        return None
    return read_captions(Path(settings.captions) if settings.captions else beside)


def read_captions(file: Path) -> dict[int, list[str]]:
    """Image id -> captions of a COCO captions file.

    Raises:
        EvaluationError: The file cannot be read, or holds no captions.
    """
    try:
        content: Any = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise EvaluationError(f"evaluation.captions: {file} cannot be read ({error})") from error
    entries = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise EvaluationError(
            f"evaluation.captions: {file} has no list of annotations, expected COCO's captions_*.json"
        )
    found: dict[int, list[str]] = {}
    for number, entry in enumerate(entries):
        known = (
            isinstance(entry, dict) and type(entry.get("image_id")) is int and isinstance(entry.get("caption"), str)
        )
        if not known:
            raise EvaluationError(f"evaluation.captions: {file}: annotation {number} has no image_id or no caption")
        found.setdefault(entry["image_id"], []).append(entry["caption"])
    return found


@dataclass(frozen=True)
class CaptionScore:
    """Captions of one method, of one length.

    Attributes:
        chair: Rates, with recall and objects per caption.
        chair_s_change: CHAIR-s minus vanilla's, paired over images; `None` for vanilla.
        recall_change: Recall per image minus vanilla's.
        tokens: Mean length.
        cut: Share of the captions that the limit cut off.
        cider: CIDEr-D times 100 as tables print it; `None` without references.
        alike: Mean number of tokens before the first difference from two-pass's, of captions that differ.
        differ: Share of the captions that differ from two-pass's.
    """

    chair: Chair
    chair_s_change: Interval | None
    recall_change: Interval | None
    tokens: float
    cut: float
    cider: float | None
    alike: float | None
    differ: float | None


def score_captions(
    gallery: Gallery,
    stores: Mapping[str, AnswerStore],
    decode: Callable[[Sequence[int]], str],
    settings: EvaluationSettings,
) -> dict[tuple[str, int], CaptionScore]:
    """Scores every method at every length: the longest generation, cut.

    Args:
        gallery: Images and references.
        stores: Method -> captions.
        decode: Tokens -> text.
        settings: Lengths, resamples, and whether an unfinished sentence is dropped.

    Returns:
        (method, tokens) -> scores.
    """
    scores: dict[tuple[str, int], CaptionScore] = {}
    for limit in settings.chair_tokens:
        tokens = {name: [own[item, _seed(own, item)].tokens for item in range(len(gallery.ids))]
                  for name, own in stores.items()}  # fmt: skip
        short = {name: [row[:limit] for row in rows] for name, rows in tokens.items()}
        texts: dict[str, list[str]] = {}
        for name, rows in short.items():
            cut = [len(row) >= limit for row in rows]
            texts[name] = [
                drop_unfinished(decode(row)) if settings.chair_drop_unfinished and over else decode(row)
                for row, over in zip(rows, cut, strict=True)
            ]
        for name, rows in short.items():
            scores[name, limit] = _score(gallery, texts, name, rows, limit, settings, short.get(TWO_PASS))
    return scores


def _seed(store: AnswerStore, item: int) -> int | None:
    return next(seed for seed in (None, *range(1000)) if (item, seed) in store)


def _score(
    gallery: Gallery, texts: Mapping[str, list[str]], name: str, rows: list[list[int]], limit: int,
    settings: EvaluationSettings, two: list[list[int]] | None,
) -> CaptionScore:  # fmt: skip
    own = texts[name]
    found = chair(own, gallery.words, gallery.truth, repeated=True)  # as published tables count
    changes: list[Interval | None] = [None, None]
    if name != VANILLA and VANILLA in texts:
        for place, measure in enumerate((_hallucinates, _recalled)):
            values = [
                measure(gallery, n, own[n]) - measure(gallery, n, texts[VANILLA][n]) for n in range(len(gallery.ids))
            ]
            changes[place] = bootstrap_interval(values, gallery.ids, settings.bootstrap, settings.seed)
    cider = None
    if gallery.references is not None:
        values = cider_d(dict(zip(gallery.ids, own, strict=True)), gallery.references)
        cider = 100 * float(np.mean(list(values.values())))
    firsts = None if two is None else [first_difference(a, b) for a, b in zip(rows, two, strict=True)]
    differing = [place for place in firsts or [] if place is not None]
    return CaptionScore(
        chair=found,
        chair_s_change=changes[0],
        recall_change=changes[1],
        tokens=float(np.mean(list(map(len, rows)))),
        cut=float(np.mean([len(row) >= limit for row in rows])),
        cider=cider,
        alike=float(np.mean(differing)) if differing else None,
        differ=None if firsts is None else len(differing) / len(firsts),
    )


def _hallucinates(gallery: Gallery, n: int, text: str) -> float:
    return float(bool(set(gallery.words.find(text)) - gallery.truth[n]))


def _recalled(gallery: Gallery, n: int, text: str) -> float:
    truth = gallery.truth[n]
    return len(truth & set(gallery.words.find(text))) / max(len(truth), 1)
