"""CHAIR: how many of the objects that captions mention are not in their images.

Rohrbach et al., "Object Hallucination in Image Captioning", EMNLP 2018 (arXiv 1809.02156).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from evaluation.errors import EvaluationError
from evaluation.synonyms import Vocabulary


@dataclass(frozen=True)
class Chair:
    """Scores of a set of captions, each over the categories that are mentioned at least once.

    Attributes:
        chair_s: Share of the captions with an object that is not in the image.
        chair_i: Share of the mentioned objects that are not in the image; 0 if none is mentioned. An object that a
            caption names twice counts twice, as in the paper's code, if `repeated`.
        recall: Share of the objects in the images that are mentioned; 0 if there are none.
        mentioned: Objects mentioned per caption.
    """

    chair_s: float
    chair_i: float
    recall: float
    mentioned: float


def chair(
    captions: Sequence[str], words: Vocabulary, truth: Sequence[Collection[str]], *, repeated: bool = False
) -> Chair:
    """Scores captions against the categories that are really there.

    Args:
        captions: One text per image.
        words: How categories are found in texts.
        truth: Names of the categories in each image.
        repeated: Whether CHAIR-i counts each mention, as the paper's code does; else each category once per caption.

    Raises:
        EvaluationError: There is no caption.
        ValueError: Captions and images differ in number.
    """
    if not captions:
        raise EvaluationError("CHAIR needs at least one caption")
    mentions = [words.find(text) for text in captions]
    mentioned = [set(found) for found in mentions]
    wrong = [found.difference(there) for found, there in zip(mentioned, truth, strict=True)]
    count, present = sum(map(len, mentioned)), sum(len(set(there)) for there in truth)
    right = count - sum(map(len, wrong))
    named, false = count, count - right
    if repeated:
        named = sum(map(len, mentions))
        false = sum(name in bad for found, bad in zip(mentions, wrong, strict=True) for name in found)
    return Chair(
        chair_s=sum(map(bool, wrong)) / len(captions),
        chair_i=false / max(named, 1),
        recall=right / max(present, 1),
        mentioned=count / len(captions),
    )


def drop_unfinished(text: str) -> str:
    """A caption up to its last whole sentence; all of it if there is none."""
    found = list(re.finditer(r"[.!?](?=\s|$)", text))
    return text[: found[-1].end()] if found else text
