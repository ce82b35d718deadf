"""What an SCR has done since it was made: counts for an operator, kept without waiting for the device."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from scr_runtime.redistribute import Grid
from scr_runtime.sources import FALLBACKS, ONE_PASS, TWO_PASS, UNIFORM, Scores

_KEPT_PREFILLS = 64


@dataclass(frozen=True)
class SCRStats:
    """Counts since an SCR was made, or since its last ``reset_stats``.

    Attributes:
        prefills: Forward passes that were edited. A ``generate`` without a cache makes one at each step.
        images: Images whose sources were chosen; such a ``generate`` chooses once.
        one_pass: Images whose sources the predictor chose.
        two_pass: Images whose sources the diagnostic run chose, fallbacks among them.
        uniform: Images whose sources were drawn.
        fallbacks: Images for which the diagnostic run stood in for the predictor, by reason: ``"low confidence"``,
            ``"drift"``, ``"not finite"`` or ``"no predictor"``.
        edits: Block outputs that were edited: prefills times edited blocks.
        mean_confidence: Mean calibrated confidence of the images that a predictor scored; ``None`` if there are none.
        drifted: Images over the predictor's drift limit. In one-pass nothing else tells of them.
    """

    prefills: int = 0
    images: int = 0
    one_pass: int = 0
    two_pass: int = 0
    uniform: int = 0
    fallbacks: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FALLBACKS, 0))
    edits: int = 0
    mean_confidence: float | None = None
    drifted: int = 0


class Tally:
    """Adds up prefills. One lock, so that another thread may read.

    Counts are the host's own. Confidence and drift are the device's: the scores of up to 64 prefills are kept
    (some kilobytes each) and then added up there in one go, and read when somebody asks.

    Args:
        judge: A grid and the Scores of some images of it -> [I] their confidence and [I] bool, whether they drifted.
    """

    def __init__(self, judge: Callable[[Grid, Scores], tuple[Tensor, Tensor]]) -> None:
        self._judge = judge
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Starts again from zero."""
        with self._lock:
            self._stats = SCRStats()
            self._kept: list[list[tuple[Grid, Scores]]] = []
            self._sums: dict[torch.device, Tensor] = {}  # [3]: confidence, images it is of, drifted images

    def add(self, chosen: Iterable[tuple[Grid, Scores]], edits: int) -> None:
        """Adds one prefill.

        Args:
            chosen: What the provider said, by grid; empty if the sources are those of an earlier prefill.
            edits: Blocks that were edited.
        """
        chosen = list(chosen)
        names = [name for _, scores in chosen for name in scores.providers]
        kinds = [fallback.kind for _, scores in chosen for fallback in scores.fallbacks if fallback is not None]
        with self._lock:
            now = self._stats
            self._stats = replace(
                now,
                prefills=now.prefills + 1,
                images=now.images + len(names),
                one_pass=now.one_pass + names.count(ONE_PASS),
                two_pass=now.two_pass + names.count(TWO_PASS),
                uniform=now.uniform + names.count(UNIFORM),
                fallbacks={kind: count + kinds.count(kind) for kind, count in now.fallbacks.items()},
                edits=now.edits + edits,
            )
            predicted = [(grid, scores) for grid, scores in chosen if scores.predicted is not None]
            if predicted:
                self._kept.append(predicted)
            if len(self._kept) >= _KEPT_PREFILLS:
                self._add_up()

    def snapshot(self) -> SCRStats:
        """The counts so far. Waits for the device."""
        with self._lock:
            self._add_up()
            rows = [sums.tolist() for sums in self._sums.values()]
            confidence, images, drifted = (sum(column) for column in zip(*rows, strict=True)) if rows else (0.0, 0, 0)
            return replace(
                self._stats,
                fallbacks=dict(self._stats.fallbacks),
                mean_confidence=confidence / images if images else None,
                drifted=int(drifted),
            )

    def _add_up(self) -> None:
        by_grid: dict[tuple[Grid, torch.device], list[Scores]] = {}
        for prefill in self._kept:
            for grid, scores in prefill:
                by_grid.setdefault((grid, scores.scores.device), []).append(scores)
        self._kept = []
        with torch.inference_mode(False), torch.no_grad():
            for (grid, device), parts in by_grid.items():
                confidence, drifted = self._judge(grid, _join(parts))
                told = confidence.isfinite()
                exact = torch.float32 if device.type == "mps" else torch.float64
                sums = torch.stack([torch.where(told, confidence, 0).sum(dtype=exact), told.sum(), drifted.sum()])
                former = self._sums.get(device)
                self._sums[device] = sums if former is None else former + sums


def _join(parts: list[Scores]) -> Scores:
    """The predictor's scores and spreads of several prefills, as those of one."""

    def cat(tensors: list[Tensor | None]) -> Tensor | None:
        given = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(given) if len(given) == len(parts) else None

    scores = torch.cat([part.scores for part in parts])
    return Scores(
        scores,
        [name for part in parts for name in part.providers],
        [fallback for part in parts for fallback in part.fallbacks],
        predicted=cat([part.predicted for part in parts]),
        spread=cat([part.spread for part in parts]),
    )
