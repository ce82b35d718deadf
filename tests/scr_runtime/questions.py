"""Several questions about one image: prompts for sessions, and what they cost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from scr_runtime import SCR
from tests.scr_runtime.reference import IMAGE_TOKEN

Inputs = dict[str, Tensor]


def ask(inputs: Inputs, texts: list[int], seed: int, *, columns: int = 0, pad: str = "left") -> Inputs:
    """The same prefix and pixels with other text behind them; ``texts`` tokens per row, at least ``columns`` wide."""
    generator = torch.Generator().manual_seed(1000 + seed)
    rows: list[list[int]] = []
    for ids, kept, count in zip(inputs["input_ids"], inputs["attention_mask"], texts, strict=True):
        ids = ids[kept.bool()]
        end = int((ids == IMAGE_TOKEN).nonzero()[-1]) + 1
        rows.append([*ids[:end].tolist(), *torch.randint(3, 90, (count,), generator=generator).tolist()])
    width = max(columns, *map(len, rows))
    ids, mask = [], []
    for row in rows:
        fill, kept = [0] * (width - len(row)), [1] * len(row)
        ids.append(fill + row if pad == "left" else row + fill)
        mask.append([0] * len(fill) + kept if pad == "left" else kept + [0] * len(fill))
    return inputs | {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def positions(inputs: Inputs) -> Tensor:
    """As ``generate`` counts them: from the first token behind the padding."""
    return (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)


def same_rows(model: Any, make: Any, rows: int, images: int, seed: int) -> Inputs:
    """A batch whose rows have prefixes of equal length."""
    single = make(model, [images], seed=seed)
    pixels = torch.randn(
        rows * images, *single["pixel_values"].shape[1:], generator=torch.Generator().manual_seed(seed)
    )
    return {
        "input_ids": single["input_ids"].repeat(rows, 1),
        "attention_mask": single["attention_mask"].repeat(rows, 1),
        "pixel_values": pixels,
    }


def fresh(scr: SCR, inputs: Inputs) -> tuple[Tensor, list[list[int]]]:
    with torch.no_grad():
        logits = scr.model(**inputs).logits
    return logits, [report.sources for report in scr.reports]


@contextmanager
def calls_of(module: Any) -> Iterator[list[int]]:
    """Positions in each call of a module's ``forward``, with or without its hooks."""
    forward, seen = module.forward, []

    def spy(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(hidden.shape[1])
        return forward(hidden, *args, **kwargs)

    module.forward = spy
    try:
        yield seen
    finally:
        del module.__dict__["forward"]
