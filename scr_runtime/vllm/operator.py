"""The edit as an operator of its own: compiled graphs keep it, where they drop a plain Python hook without a word."""
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

from scr_runtime.vllm.editor import Editor

NAME = "scr_edit"
OPERATOR = f"vllm::{NAME}"
"""As ``CompilationConfig.splitting_ops`` names it."""


def _edit(hidden: Tensor, residual: Tensor, layer: int) -> None:
    editor: Editor | None = get_forward_context().no_compile_layers.get(OPERATOR)
    if editor is not None:
        editor.after_block(layer, hidden, residual)


def _shapes_only(hidden: Tensor, residual: Tensor, layer: int) -> None:
    return


direct_register_custom_op(NAME, _edit, mutates_args=["hidden", "residual"], fake_impl=_shapes_only)


def _hook(layer: int) -> Callable[..., None]:
    def after(module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> None:
        torch.ops.vllm.scr_edit(output[0], output[1], layer)

    return after


def insert(blocks: nn.ModuleList, editor: Editor, static_forward_context: dict[str, Any]) -> None:
    """Puts the operator behind the blocks that are edited.

    Args:
        blocks: The decoder blocks, whose output is ``(hidden, residual)``.
        editor: What the operator calls.
        static_forward_context: The engine's, in which a forward pass finds the editor.
    """
    static_forward_context[OPERATOR] = editor
    for layer in editor.layers:
        blocks[layer].register_forward_hook(_hook(layer))
