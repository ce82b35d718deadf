"""CHAIR: how many of the objects that captions mention are not in their images.

Rohrbach et al., "Object Hallucination in Image Captioning", EMNLP 2018 (arXiv 1809.02156).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from evaluation.errors import EvaluationError


@dataclass(frozen=True)
class Chair:
    """Scores of a set of captions, each over the categories that are mentioned at least once.

    Attributes:
        chair_s: Share of the captions with an object that is not in the image.
        chair_i: Share of the mentioned objects that are not in the image; 0 if none is mentioned.
        recall: Share of the objects in the images that are mentioned; 0 if there are none.
        mentioned: Objects mentioned per caption.
    """

    chair_s: float
    chair_i: float
    recall: float
    mentioned: float


def chair(captions: Sequence[str], categories: Collection[str], truth: Sequence[Collection[str]]) -> Chair:
    """Scores captions against the categories that are really there.

    A category is mentioned where its name stands as whole words, in any case, in singular or plural with -s or
    -es. Synonyms are not known.

    Args:
        captions: One text per image.
        categories: Names of all categories that are looked for.
        truth: Names of the categories in each image.

    Raises:
        EvaluationError: There is no caption.
        ValueError: Captions and images differ in number.
    """
    if not captions:
        raise EvaluationError("CHAIR needs at least one caption")
    patterns = {name: re.compile(rf"\b{re.escape(name)}(?:s|es)?\b", re.IGNORECASE) for name in categories}
    mentioned = [{name for name, pattern in patterns.items() if pattern.search(text)} for text in captions]
    wrong = [found.difference(there) for found, there in zip(mentioned, truth, strict=True)]
    count, present = sum(map(len, mentioned)), sum(len(set(there)) for there in truth)
    wrong_count = sum(map(len, wrong))
    return Chair(
        chair_s=sum(map(bool, wrong)) / len(captions),
        chair_i=wrong_count / max(count, 1),
        recall=(count - wrong_count) / max(present, 1),
        mentioned=count / len(captions),
    )
