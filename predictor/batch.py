"""What every file here reads: batches of the data module, the sources' rule for one, and a progress bar over many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from scr_runtime.config import SCRConfig
from scr_runtime.redistribute import Grid
from scr_runtime.rule import SourceRule, source_rule

Batch = Mapping[str, Any]
"""Rows of one patch grid, one for each (image, grid of it, prompt): `states` [B, N, d] of 16 or 32 bit, `attention`
[B, N] float32, `question` [B, d], `grid` (rows, columns), `key` [B] str, of the image. If they are there: `place` [B]
int, of the row's grid among those of its image (else 0), and `weight`, what the batch's loss counts (among several
processes, 1 on average)."""
Score = Callable[[Batch], Tensor]
"""A batch's scores [B, N], higher for likelier sources: a predictor's, or a baseline's."""


def rule_of(batch: Batch, scr: SCRConfig) -> SourceRule:
    """How sources are chosen on a batch's grid, on the device of its maps."""
    rows, columns = batch["grid"]
    return source_rule(scr, (int(rows), int(columns)), batch["attention"].device)


@dataclass(frozen=True)
class SourceCount:
    """K, as it came out over the rows of a set, whose grids may differ.

    Attributes:
        fewest: Smallest K of a row.
        mean: Over the rows.
        most: Largest K of a row.
        share: Mean over the rows of K / eligible patches: the recall of random scores.
    """

    fewest: int
    mean: float
    most: int
    share: float

    @classmethod
    def of(cls, grids: Iterable[Grid], scr: SCRConfig) -> SourceCount:
        """Counts the sources of rows with these grids, of which there is at least one."""
        rows = Counter(grids)
        rules = {grid: source_rule(scr, grid) for grid in rows}
        eligible = {grid: int(rule.eligible.sum()) for grid, rule in rules.items()}
        return cls(
            fewest=min(rule.k for rule in rules.values()),
            mean=sum(rows[grid] * rule.k for grid, rule in rules.items()) / rows.total(),
            most=max(rule.k for rule in rules.values()),
            share=sum(rows[grid] * rule.k / eligible[grid] for grid, rule in rules.items()) / rows.total(),
        )

    def __str__(self) -> str:
        share = f"{self.share:.1%} of the eligible patches"
        if self.fewest == self.most:
            return f"{self.most} ({share})"
        return f"{self.fewest} to {self.most} (mean {self.mean:.1f}, {share})"

    def metrics(self) -> dict[str, float]:
        """The numbers under their names in MLflow and in a predictor folder."""
        return {"k_min": self.fewest, "k_mean": self.mean, "k_max": self.most, "k_share": self.share}


def progress(batches: Iterable[Batch], name: str) -> Iterable[Batch]:
    """Shows a bar on stderr, once the loop has run for two seconds."""
    return tqdm(batches, desc=name, unit="batch", leave=False, delay=2)
