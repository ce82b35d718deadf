"""CIDEr-D: how close a caption's n-grams are to those of its references (Vedantam et al., arXiv 1411.5726).

The formulas of the paper's section 5 with the constants of its public evaluation: n = 1 to 4, sigma = 6, times 10.
Texts are split into lower-case words here; the public evaluation's tokenizer needs Java. It differs on contractions
and on hyphens alone.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

_LENGTHS = 4
_SIGMA = 6.0

Grams = Counter[tuple[str, ...]]


def words(text: str) -> list[str]:
    """Lower-case words, without punctuation."""
    return re.findall(r"[a-z0-9]+(?:'[a-z]+)?", text.lower())


def ngrams(text: str) -> Grams:
    """Counts of all n-grams of 1 to 4 words."""
    listed = words(text)
    return Counter(
        tuple(listed[start : start + length])
        for length in range(1, _LENGTHS + 1)
        for start in range(len(listed) - length + 1)
    )


def cider_d(candidates: Mapping[int, str], references: Mapping[int, Sequence[str]]) -> dict[int, float]:
    """Scores each caption against the references of its image.

    Args:
        candidates: Image -> caption.
        references: Image -> reference captions, of these images at least; document frequencies are counted over the
            images of `candidates`.

    Returns:
        Image -> CIDEr-D, 0 to 10. The corpus' score is the mean; published tables print it times 100.
    """
    counted = {image: [ngrams(text) for text in references[image]] for image in candidates}
    frequency: Counter[tuple[str, ...]] = Counter()
    for own in counted.values():
        frequency.update({gram for grams in own for gram in grams})
    total = math.log(max(len(counted), 1))

    def vector(grams: Grams) -> list[dict[tuple[str, ...], float]]:
        found: list[dict[tuple[str, ...], float]] = [{} for _ in range(_LENGTHS)]
        for gram, count in grams.items():
            found[len(gram) - 1][gram] = count * (total - math.log(max(1.0, frequency[gram])))
        return found

    scores: dict[int, float] = {}
    for image, text in candidates.items():
        mine = ngrams(text)
        sums = [_similarity(vector(mine), vector(other), _length(mine) - _length(other)) for other in counted[image]]
        scores[image] = 10.0 * sum(sums) / len(sums) if sums else 0.0
    return scores


def _length(grams: Grams) -> int:
    """What the public evaluation takes for a text's length: its 2-grams."""
    return sum(count for gram, count in grams.items() if len(gram) == 2)


def _similarity(
    mine: Sequence[Mapping[tuple[str, ...], float]], other: Sequence[Mapping[tuple[str, ...], float]], longer: int
) -> float:
    """Mean over n of the clipped cosine, times the penalty of eq. (5) for texts of another length."""
    total = 0.0
    for own, reference in zip(mine, other, strict=True):
        sizes = math.sqrt(sum(v * v for v in own.values())) * math.sqrt(sum(v * v for v in reference.values()))
        dot = sum(min(value, reference.get(gram, 0.0)) * reference.get(gram, 0.0) for gram, value in own.items())
        total += dot / sizes if sizes else 0.0
    return total / _LENGTHS * math.exp(-(longer**2) / (2 * _SIGMA**2))
