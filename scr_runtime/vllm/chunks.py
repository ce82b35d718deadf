"""Where a chunk of a prefill, or a hit of the prefix cache, may end: never inside an image."""

from __future__ import annotations

from collections.abc import Sequence

Spans = Sequence[tuple[int, int]]
"""First position of each image, and the one behind its last."""


def chunk_end(end: int, images: Spans) -> int:
    """The end of a chunk, moved back to the start of the image in which it would lie."""
    return next((first for first, behind in images if first < end < behind), end)


def hit_end(end: int, images: Spans, block_size: int) -> int:
    """The end of a prefix hit, moved back to a block that ends before the image in which it would lie.

    The start of that block may lie in an earlier image, hence the loop.
    """
    while (start := chunk_end(end, images)) < end:
        end = start // block_size * block_size
    return end
