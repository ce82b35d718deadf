"""Patch grids of images, by themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from scr_runtime import errors
from scr_runtime.grids import ImageGrid, qwen_vl_grids, same_grid
from tests.scr_runtime.tiny_families import TINY

GRIDS = [ImageGrid((2, 3)), ImageGrid((2, 3), skip=1), ImageGrid((2, 3), row_end=1), ImageGrid((1, 1), tail=1),
         ImageGrid((2, 3), skip=2, row_end=1, tail=3)]  # fmt: skip


@pytest.mark.parametrize("grid", GRIDS)
def test_patches_are_the_tokens_that_are_no_marks(grid: ImageGrid) -> None:
    rows, columns = grid.grid
    marks = [-1] * grid.skip
    for row in range(rows):
        marks += [row * columns + column for column in range(columns)] + [-1] * grid.row_end
    marks += [-1] * grid.tail
    assert grid.tokens == len(marks)
    positions = torch.tensor([[place + 7 for place in range(len(marks))]])
    expected = [place + 7 for place, mark in enumerate(marks) if mark >= 0]
    assert grid.patches(positions).tolist() == [expected]


def test_features_of_another_length_have_no_grid() -> None:
    features: Any = type("Encoded", (), {"pooler_output": torch.zeros(2, 35, 8)})()
    with pytest.raises(errors.PrefillError, match=r"\[35\] visual tokens, but their grids have \[36\]"):
        same_grid(ImageGrid((6, 6)), {"mm_encoder_outputs": {"image": features}})
    features.pooler_output = torch.zeros(2, 36, 8)
    assert same_grid(ImageGrid((6, 6)), {"mm_encoder_outputs": {"image": features}}) == [ImageGrid((6, 6))] * 2


@pytest.mark.parametrize("kind", [torch.tensor, list, lambda table: torch.tensor(table).numpy()])
def test_tables_of_sizes_may_be_tensors_arrays_or_lists(kind: Any) -> None:
    model = TINY["qwen2-vl"].model(1)
    table = [[1, 8, 12], [1, 4, 4]]
    found = qwen_vl_grids(model, {"image_grid_thw": kind(table)})
    assert [grid.grid for grid in found] == [(4, 6), (2, 2)]
    with pytest.raises(errors.PrefillError, match="image_grid_thw is missing"):
        qwen_vl_grids(model, {})
