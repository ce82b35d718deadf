"""What every file here reads: batches of the data module, the sources' rule for one, and a progress bar over many."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from scr_runtime.config import SCRConfig
from scr_runtime.rule import SourceRule, source_rule

Batch = Mapping[str, Any]
"""Rows of one patch grid, one for each (image, prompt): `states` [B, N, d] of 16 or 32 bit, `attention` [B, N]
float32, `question` [B, d], `grid` (rows, columns), `key` [B] str. `weight`, if it is there, is what the batch's loss
counts (among several processes, 1 on average)."""
Score = Callable[[Batch], Tensor]
"""A batch's scores [B, N], higher for likelier sources: a predictor's, or a baseline's."""


def rule_of(batch: Batch, scr: SCRConfig) -> SourceRule:
    """How sources are chosen on a batch's grid, on the device of its maps."""
    rows, columns = batch["grid"]
    return source_rule(scr, (int(rows), int(columns)), batch["attention"].device)


def progress(batches: Iterable[Batch], name: str) -> Iterable[Batch]:
    """Shows a bar on stderr, once the loop has run for two seconds."""
    return tqdm(batches, desc=name, unit="batch", leave=False, delay=2)
