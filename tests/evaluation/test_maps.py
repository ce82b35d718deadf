"""Controls take their sources from where they say, whatever grids meet in a block."""

from __future__ import annotations

import pytest
import torch

from evaluation import maps
from evaluation.batches import Row, make_batches, make_blocks
from evaluation.edits import owned_neighbours
from evaluation.errors import EvaluationError
from evaluation.maps import BlockMaps, ImageMap, move
from evaluation.questions import Item
from scr_runtime import SCRConfig

SCR = SCRConfig(num_sources=4)


def image_map(grid: tuple[int, int], seed: int) -> ImageMap:
    generator = torch.Generator().manual_seed(seed)
    count = grid[0] * grid[1]
    return ImageMap(grid, torch.rand(count, generator=generator), torch.rand(count, generator=generator), 1.0)


def block(grids: dict[str, list[tuple[int, int]]], questions: int = 2, seed: int = 0) -> BlockMaps:
    rows = [Row(n, name, f"q{n}") for n, name in enumerate(name for name in grids for _ in range(questions))]
    found = [[image_map(grid, 10 * row.item + n) for n, grid in enumerate(grids[row.image])] for row in rows]
    return BlockMaps(rows, found, SCR, seed)


def test_swapped_takes_an_image_of_the_same_grid() -> None:
    made = block({"a": [(6, 6)], "b": [(4, 8)], "c": [(6, 6)], "d": [(4, 8)]})
    for place, partner in ((0, 4), (1, 5), (2, 6), (4, 0), (6, 2)):
        assert made.partner(place) == partner
        assert maps.swapped(made, place, 0) == maps.two_pass(made, partner - partner % 2, 0)  # of its first question
        assert maps.swapped(made, place, 0) != maps.two_pass(made, place, 0)


def test_swapped_moves_by_relative_place_where_no_grid_is_equal() -> None:
    made = block({"a": [(6, 6)], "b": [(12, 12)]})
    moved = move(made.maps[2][0].attention, (12, 12), (6, 6))
    assert maps.swapped(made, 0, 0) == made.rule((6, 6)).choose(moved[None])[0].tolist()
    assert len(maps.swapped(made, 0, 0)) == 4


def test_every_tile_has_its_own_sources() -> None:
    made = block({"a": [(6, 6), (4, 8)], "b": [(6, 6)]})
    assert max(maps.swapped(made, 0, 1)) < 32 and len(maps.swapped(made, 0, 1)) == 4
    assert maps.two_pass(made, 0, 0) != maps.two_pass(made, 0, 1)
    for choose in (maps.uniform, maps.dose_matched, maps.position, maps.norm, maps.least):
        for image, grid in enumerate(((6, 6), (4, 8))):
            chosen = choose(made, 0, image)
            assert len(set(chosen)) == 4 and bool(made.rule(grid).eligible[chosen].all())


def test_a_single_image_has_nothing_to_swap_with() -> None:
    with pytest.raises(EvaluationError, match="there is one image only"):
        maps.swapped(block({"a": [(6, 6)]}), 0, 0)


def test_uniform_is_one_draw_per_image_and_follows_the_seed() -> None:
    made = block({"a": [(8, 8)], "b": [(8, 8)]})
    assert maps.uniform(made, 0, 0) == maps.uniform(made, 1, 0) != maps.uniform(made, 2, 0)
    assert maps.uniform(block({"a": [(8, 8)], "b": [(8, 8)]}, seed=1), 0, 0) != maps.uniform(made, 0, 0)


def test_dose_matched_writes_to_as_many_neighbours() -> None:
    made = block({"a": [(12, 12)], "b": [(9, 16)]}, questions=5)
    for place, row in enumerate(made.maps):
        grid = row[0].grid
        wanted = owned_neighbours(maps.two_pass(made, place, 0), grid, 8)
        chosen = maps.dose_matched(made, place, 0)
        assert owned_neighbours(chosen, grid, 8) == wanted
        assert chosen == maps.dose_matched(made, place, 0)


def test_position_is_the_mean_of_other_images_alone() -> None:
    made = block({"a": [(6, 6)], "b": [(6, 6)], "c": [(6, 6)]}, questions=1)
    others = sum(made.maps[n][0].attention / made.maps[n][0].attention.sum() for n in (1, 2))
    torch.testing.assert_close(made.mean_map("a", (6, 6)), others)


def test_least_and_norm() -> None:
    made = block({"a": [(6, 6)], "b": [(6, 6)]})
    own, eligible = made.maps[0][0], made.rule((6, 6)).eligible
    lowest = own.attention.masked_fill(~eligible, torch.inf).argsort()[:4].tolist()
    highest = own.norms.masked_fill(~eligible, -torch.inf).argsort(descending=True)[:4].tolist()
    assert (maps.least(made, 0, 0), maps.norm(made, 0, 0)) == (lowest, highest)


def test_moving_keeps_the_place() -> None:
    values = torch.zeros(8 * 8)
    values[8 * 1 + 6] = 1.0  # upper right
    moved = move(values, (8, 8), (4, 4)).view(4, 4)
    assert divmod(int(moved.argmax()), 4) == (0, 3)
    assert move(values, (8, 8), (8, 8)) is values


def test_blocks_are_nearly_equal_and_batches_keep_images_together() -> None:
    items = [Item(f"{image}.jpg", f"q{n}") for image in range(33) for n in range(1 + image % 3)]
    blocks = make_blocks(items, "{question}?", images=32)
    assert [len({row.image for row in rows}) for rows in blocks] == [16, 17]
    assert [row.item for rows in blocks for row in rows] == list(range(len(items)))
    assert blocks[0][0].text == "q0?"
    batches = make_batches(blocks[0], 4)
    assert sorted(row.item for rows in batches for row in rows) == [row.item for row in blocks[0]]
    assert max(map(len, batches)) <= 4
    for image in {row.image for row in blocks[0]}:
        assert sum(any(row.image == image for row in rows) for rows in batches) == 1
    assert [len(rows) for rows in make_batches(blocks[0][:3], 1)] == [1, 1, 1]
