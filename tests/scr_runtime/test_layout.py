"""Which text asks about an image, and whether the grids fit the prompt."""

from __future__ import annotations

import pytest
import torch

from scr_runtime import errors
from scr_runtime.families import ImageGrid
from scr_runtime.layout import count_mismatch, visual_layout


def test_padding_is_no_text_under_any_mask() -> None:
    visual = torch.tensor([[False] * 2 + [True] * 9 + [False] * 5])
    kept_positions = torch.ones(1, 16, dtype=torch.bool)
    kept_positions[:, -2:] = False
    causal = (torch.ones(16, 16, dtype=torch.bool).tril() & kept_positions)[None, None]
    additive = torch.zeros(1, 1, 16, 16).masked_fill(~causal, -1e9)
    expected = [0, 0, 1 / 3, 1 / 3, 1 / 3, 0, 0]
    for mask in (kept_positions.long(), causal, additive, {"sliding_attention": None, "full_attention": causal}):
        (group,) = visual_layout(visual, mask, [ImageGrid((3, 3))]).groups
        assert group.text_weights.tolist() == [pytest.approx(expected)]
    (group,) = visual_layout(visual, None, [ImageGrid((3, 3))], prompt_length=13).groups
    assert group.text_weights.tolist() == [pytest.approx([0, 0, 0.5, 0.5, 0, 0, 0])]


def test_images_take_tokens_in_order_of_appearance() -> None:
    visual = torch.zeros(2, 20, dtype=torch.bool)
    visual[0, 2:6] = visual[0, 7:13] = visual[1, 5:9] = True
    layout = visual_layout(visual, None, [ImageGrid((2, 2)), ImageGrid((2, 3)), ImageGrid((2, 2))])
    assert (layout.num_images, layout.text_rows, layout.fits(layout.edge.tolist())) == (3, 16, True)
    by_grid = {group.grid: group for group in layout.groups}
    assert by_grid[2, 2].images == [0, 2] and by_grid[2, 3].images == [1]
    assert by_grid[2, 2].positions.tolist() == [[2, 3, 4, 5], [25, 26, 27, 28]]
    assert by_grid[2, 3].positions.tolist() == [[7, 8, 9, 10, 11, 12]]
    assert by_grid[2, 2].rows.tolist() == [0, 1]
    text = by_grid[2, 2].text_weights[0]  # of image 0: behind it, without the visual tokens of image 1
    assert [place + 4 for place in text.nonzero().flatten().tolist()] == [6, *range(13, 20)]


def test_a_prompt_with_another_number_of_visual_tokens_does_not_fit() -> None:
    visual = torch.zeros(1, 20, dtype=torch.bool)
    visual[0, 2:7] = True
    for tokens in ((2, 2), (2, 3)):
        layout = visual_layout(visual, None, [ImageGrid(tokens)])
        assert not layout.fits(layout.edge.tolist())
        assert f"need {tokens[0] * tokens[1]} tokens" in str(count_mismatch(layout))
    with pytest.raises(errors.PrefillError, match="1 images need 25 visual tokens"):
        visual_layout(visual, None, [ImageGrid((5, 5))])
