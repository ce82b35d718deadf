"""The hooks of a prefill: there while one runs, found again after an interrupted removal."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from torch import nn

from scr_runtime import SCR, SCRConfig, errors
from scr_runtime.diagnostic import Decoder
from scr_runtime.families import family_of
from scr_runtime.layout import VisualLayout
from scr_runtime.prefill import BlockHooks, Prefill
from tests.conftest import make_inputs, make_tiny_llava
from tests.scr_runtime.reference import hook_count

CONFIG = SCRConfig(num_sources=4, strength=1.3, edit_layers=(0, 2), attention_layers=(2, 4))


def made(blocks: Any, hooks: BlockHooks) -> Prefill:
    layout: Any = VisualLayout(1, [], blocks[0].weight)
    family = family_of(make_tiny_llava(0))
    return Prefill(owner=hooks, call={}, layout=layout, decoder=Decoder(family, blocks), past=0)


def test_hooks_are_there_while_a_prefill_lives() -> None:
    blocks = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])
    hooks = BlockHooks(blocks, dict.fromkeys((0, 2), lambda *_: None))
    one, other = made(blocks, hooks), made(blocks, hooks)
    assert not hooks.acquire(one)  # nobody has attached
    assert hook_count(blocks) == 0
    hooks.active = True
    for prefill in (one, other):
        prefill.begin(sys._getframe())
        assert hooks.acquire(prefill)
    assert [len(block._forward_hooks) for block in blocks] == [1, 0, 1]  # shared
    assert not hooks.stop()
    hooks.release(one)
    hooks.release(one)
    assert [len(block._forward_hooks) for block in blocks] == [1, 0, 1]
    hooks.release(other)
    assert hook_count(blocks) == 0
    assert hooks.stop()


def test_a_prefill_that_died_blocks_nobody() -> None:
    blocks = nn.ModuleList([nn.Linear(2, 2)])
    hooks = BlockHooks(blocks, {0: lambda *_: None})
    hooks.active = True

    def die() -> None:
        prefill = made(blocks, hooks)
        prefill.begin(sys._getframe())
        hooks.acquire(prefill)

    die()
    assert hook_count(blocks) > 0
    assert hooks.stop()
    assert hook_count(blocks) == 0


def test_hooks_that_were_half_removed_are_found() -> None:
    """A handle that an interrupt has lost, or a table of which it has cleared a part."""
    blocks = nn.ModuleList([nn.Linear(2, 2) for _ in range(2)])
    hooks = BlockHooks(blocks, dict.fromkeys((0, 1), lambda *_: None))
    hooks.active = True
    prefill = made(blocks, hooks)
    prefill.begin(sys._getframe())
    hooks.acquire(prefill)
    blocks[0]._forward_hooks_with_kwargs.clear()
    blocks[1]._forward_hooks.clear()
    hooks.release(prefill)
    assert all(len(block._forward_hooks) == 0 for block in blocks)
    assert len(blocks[0]._forward_hooks_with_kwargs) == 0


def test_a_block_that_is_called_on_its_own_is_an_error() -> None:
    """It would be edited once more."""
    model: Any = make_tiny_llava(82)
    inputs = make_inputs(model, [1])
    layers = model.model.language_model.layers
    busy = False

    def again(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal busy
        if not busy:
            busy = True
            layers[2](output.clone(), **kwargs)

    hook = layers[1].register_forward_hook(again, with_kwargs=True)
    with SCR(model, config=CONFIG, mode="uniform"):
        with pytest.raises(errors.EditNotFiredError, match=r"\[0, 1, 2\] should have been edited"):
            model(**inputs)
        hook.remove()
        model(**inputs)
    assert hook_count(layers) == 0
