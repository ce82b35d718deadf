"""Chunks and prefix hits end before images, or behind them."""

from __future__ import annotations

import pytest

from scr_runtime.vllm.chunks import chunk_end, hit_end

IMAGES = [(5, 149), (150, 294)]


@pytest.mark.parametrize(
    ("end", "moved"),
    [(3, 3), (5, 5), (6, 5), (148, 5), (149, 149), (150, 150), (151, 150), (293, 150), (294, 294), (300, 300)],
)
def test_a_chunk_ends_outside_of_images(end: int, moved: int) -> None:
    assert chunk_end(end, IMAGES) == moved
    assert chunk_end(end, []) == end


@pytest.mark.parametrize(
    ("end", "block", "moved"),
    [
        (128, 32, 0),
        (288, 32, 0),
        (288, 16, 0),
        (160, 32, 0),
        (320, 32, 320),
        (0, 32, 0),
        (149, 149, 149),
        (290, 5, 150),
    ],
)
def test_a_hit_ends_at_a_block_outside_of_images(end: int, block: int, moved: int) -> None:
    assert hit_end(end, IMAGES, block) == moved


def test_a_hit_keeps_the_blocks_between_two_images() -> None:
    assert hit_end(200, [(5, 50), (130, 274)], 32) == 128
