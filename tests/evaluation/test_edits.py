"""The edit on given sources is the runtime's; the controls have the dose and the size that they are said to have."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from evaluation.batches import find_layout
from evaluation.edits import NoiseEdit, SourceEdit, edited, near_patches, owned_neighbours, owned_patches
from evaluation.errors import EvaluationError
from scr_runtime import SCR, SCRConfig
from scr_runtime.families import blocks_of

CONFIG = SCRConfig(num_sources=3, edit_layers=(0, 2), attention_layers=(2, 4), strength=1.3)


def states(model: Any, inputs: Any, context: Any) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    handle = blocks_of(model)[2].register_forward_hook(
        lambda _m, _a, out: seen.append(out if torch.is_tensor(out) else out[0])
    )
    try:
        with torch.no_grad(), context:
            model(**inputs)
    finally:
        handle.remove()
    return seen[-1]  # a nested diagnostic passes first


def test_given_sources_are_edited_as_the_runtime_edits_its_own(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava()
    inputs = llava_inputs(model, [1, 2, 1])
    scr = SCR(model, config=CONFIG, mode="two-pass")
    wanted = states(model, inputs, scr)
    layout = find_layout(model, inputs, inputs["attention_mask"])
    act = SourceEdit(layout, [report.sources for report in scr.reports], CONFIG)
    found = states(model, inputs, edited(model, (0, 2), inputs["input_ids"].shape[1], act))
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(found, states(model, inputs, torch.no_grad()))


def test_generation_is_edited_in_its_prefill_alone(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava()
    inputs = llava_inputs(model, [1, 1])
    scr = SCR(model, config=CONFIG, mode="two-pass")
    with scr:
        wanted = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    act = SourceEdit(find_layout(model, inputs, inputs["attention_mask"]), [r.sources for r in scr.reports], CONFIG)
    with edited(model, (0, 2), inputs["input_ids"].shape[1], act):
        found = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert torch.equal(found, wanted)


def test_noise_moves_the_same_patches_as_far(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava()
    inputs = llava_inputs(model, [1])
    layout = find_layout(model, inputs, inputs["attention_mask"])
    edit = SourceEdit(layout, [[14, 8, 21]], CONFIG)
    plain = torch.randn(1, inputs["input_ids"].shape[1], 32)
    moved, noisy, again = plain.clone(), plain.clone(), plain.clone()
    edit(0, moved)
    NoiseEdit(edit, 5)(0, noisy)
    NoiseEdit(edit, 5)(0, again)
    assert torch.equal(noisy, again)
    sizes = [(states - plain).norm(dim=-1) for states in (moved, noisy)]
    torch.testing.assert_close(*sizes, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(moved, noisy)


def test_a_wide_edit_reaches_two_steps_and_each_patch_has_one_owner(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava()
    inputs = llava_inputs(model, [1])
    layout = find_layout(model, inputs, inputs["attention_mask"])
    edit = SourceEdit(layout, [[14, 21]], CONFIG, radius=2)
    hidden = torch.randn(1, inputs["input_ids"].shape[1], 32)
    before = hidden.clone()
    edit(0, hidden)
    positions = layout.groups[0].positions[0]
    old, new = before[0, positions], hidden[0, positions]
    near = {patch for source in (14, 21) for patch in near_patches((6, 6), 2)[:, source].tolist()} - {14, 21}
    changed = {patch for patch in range(36) if not torch.equal(old[patch], new[patch])}
    assert changed == near | {14, 21}
    torch.testing.assert_close(new[14], old[14] / 1.3)
    for patch in near:
        row, column = divmod(patch, 6)
        owner = 14 if max(abs(row - 2), abs(column - 2)) <= 2 else 21  # 14 is the better one
        torch.testing.assert_close(new[patch], old[patch] + 0.3 * old[owner])


def test_owned_neighbours_by_hand() -> None:
    assert owned_neighbours([14], (6, 6), 8) == 8 and owned_neighbours([14], (6, 6), 4) == 4
    assert owned_neighbours([14, 15], (6, 6), 8) == 10  # 12 around both
    assert owned_neighbours([0], (6, 6), 8) == 3
    assert sorted(owned_patches([0], (6, 6), 8)) == [1, 6, 7]


def test_another_prefill_or_none_is_an_error(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava()
    inputs = llava_inputs(model, [1])
    act = SourceEdit(find_layout(model, inputs, None), [[14]], CONFIG)
    with pytest.raises(EvaluationError, match="a prefill of"), edited(model, (0, 2), 3, act), torch.no_grad():
        model(**inputs)
    nothing = r"blocks \[0, 1, 2\] should have been edited, and \[\] were"
    with pytest.raises(EvaluationError, match=nothing), edited(model, (0, 2), 3, act):
        pass
    assert not any(block._forward_hooks for block in blocks_of(model))
