"""What an SCR has done since it was made: counts for an operator, kept without waiting for the device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from scr_runtime.here import Turns
from scr_runtime.network import SourcePredictor
from scr_runtime.rule import SourceRule
from scr_runtime.sources import FALLBACKS, ONE_PASS, ONLINE, TWO_PASS, UNIFORM, Scores

_KEPT_PREFILLS = 64
_TURNS = Turns()  # nobody waits for a device in it


@dataclass(frozen=True, repr=False)
class SCRStats:
    """Counts since an SCR was made, or since its last ``reset_stats``.

    Attributes:
        prefills: Forward passes that were edited. A ``generate`` without a cache makes one at each step.
        images: Images whose sources were chosen; such a ``generate`` chooses once.
        one_pass: Images whose sources the predictor chose.
        two_pass: Images whose sources the diagnostic run chose, fallbacks among them.
        online: Images whose sources the running pass chose by its own attention.
        uniform: Images whose sources were drawn.
        fallbacks: Images for which the diagnostic run stood in for the predictor, by reason: ``"low confidence"``,
            ``"drift"``, ``"not finite"`` or ``"no predictor"``.
        edits: Block outputs that were edited: prefills times edited blocks.
        mean_confidence: Mean calibrated confidence of the images that a predictor scored; ``None`` if there are none.
        drifted: Images over the predictor's drift limit. In one-pass this is the only sign of them.
    """

    prefills: int = 0
    images: int = 0
    one_pass: int = 0
    two_pass: int = 0
    online: int = 0
    uniform: int = 0
    fallbacks: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FALLBACKS, 0))
    edits: int = 0
    mean_confidence: float | None = None
    drifted: int = 0

    def __repr__(self) -> str:
        """One line, without what is zero."""
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.fallbacks.items() if count)
        counts = {ONE_PASS: self.one_pass, TWO_PASS: self.two_pass, ONLINE: self.online, UNIFORM: self.uniform}
        parts = [f"{count:,} {name}" for name, count in counts.items() if count]
        parts += [f"fallbacks: {kinds}"] if kinds else []
        parts += [f"{self.drifted:,} drifted"] if self.drifted else []
        parts += [] if self.mean_confidence is None else [f"mean confidence {self.mean_confidence:.3f}"]
        names = {"prefill": self.prefills, "image": self.images, "edited block output": self.edits}
        prefills, images, edits = (f"{count:,} {name}{'s' * (count != 1)}" for name, count in names.items())
        images += f" ({'; '.join(parts)})" if parts else ""
        return f"<SCRStats: {prefills}, {images}, {edits}>"


class StatsCounter:
    """Adds up prefills, for several threads.

    Counts are the host's own. Confidence and drift are the device's: the scores of up to 64 prefills are kept
    (some kilobytes each) and then added up there in one go, and read when somebody asks.
    """

    def __init__(self) -> None:
        self.reset()

    @_TURNS
    def reset(self) -> None:
        """Starts again from zero."""
        self._stats = SCRStats()
        self._kept: list[list[Scores]] = []
        self._sums: dict[torch.device, Tensor] = {}  # [3]: confidence, images it is of, drifted images

    @_TURNS
    def add(self, chosen: Iterable[Scores], edits: int) -> None:
        """Adds one prefill.

        Args:
            chosen: What the provider said, per group; empty if the sources are those of an earlier prefill.
            edits: Blocks that were edited.
        """
        chosen = list(chosen)
        names = [name for scores in chosen for name in scores.providers]
        kinds = [fallback.kind for scores in chosen for fallback in scores.fallbacks if fallback is not None]
        now = self._stats
        self._stats = replace(
            now,
            prefills=now.prefills + 1,
            images=now.images + len(names),
            one_pass=now.one_pass + names.count(ONE_PASS),
            two_pass=now.two_pass + names.count(TWO_PASS),
            online=now.online + names.count(ONLINE),
            uniform=now.uniform + names.count(UNIFORM),
            fallbacks={kind: count + kinds.count(kind) for kind, count in now.fallbacks.items()},
            edits=now.edits + edits,
        )
        predicted = [scores for scores in chosen if scores.predicted is not None]
        if predicted:
            self._kept.append(predicted)
        if len(self._kept) >= _KEPT_PREFILLS:
            self._add_up()

    def snapshot(self) -> SCRStats:
        """The counts so far. Waits for the device."""
        stats, all_sums = self._added_up()
        rows = [sums.tolist() for sums in all_sums.values()]
        confidence, images, drifted = (sum(column) for column in zip(*rows, strict=True)) if rows else (0.0, 0, 0)
        return replace(
            stats,
            fallbacks=dict(stats.fallbacks),
            mean_confidence=confidence / images if images else None,
            drifted=int(drifted),
        )

    @_TURNS
    def _added_up(self) -> tuple[SCRStats, dict[torch.device, Tensor]]:
        self._add_up()
        return self._stats, self._sums

    def _add_up(self) -> None:
        """Judges all kept scores, those of equal grids as one batch, and adds them to the sums on their device."""
        by_rule: dict[tuple[SourceRule, bool, SourcePredictor], list[Scores]] = {}
        for scores in (scores for prefill in self._kept for scores in prefill):
            assert scores.predictor is not None  # it predicted them
            by_rule.setdefault((scores.rule, scores.spread is not None, scores.predictor), []).append(scores)
        all_sums = dict(self._sums)
        with torch.inference_mode(False), torch.no_grad():
            for (rule, guarded, predictor), parts in by_rule.items():
                predicted = torch.cat([part.predicted for part in parts if part.predicted is not None])
                spread = torch.cat([part.spread for part in parts if part.spread is not None]) if guarded else None
                judged = predictor.judge(predicted, spread, rule)
                device, finite = predicted.device, judged.confidence.isfinite()
                exact = torch.float32 if device.type == "mps" else torch.float64
                confidence = torch.where(finite, judged.confidence, 0).sum(dtype=exact)
                sums = torch.stack([confidence, finite.sum(), judged.drifted.sum()])
                former = all_sums.get(device)
                all_sums[device] = sums if former is None else former + sums
        self._sums, self._kept = all_sums, []  # at once: an interrupt in between loses nothing
