"""The edit of a step: scr_runtime's provider chooses, its rule and its plan decide, its function applies."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from scr_runtime.config import SCRConfig
from scr_runtime.diagnostic import Decoder, StateLayerOutput
from scr_runtime.families import Family
from scr_runtime.network import SourcePredictor
from scr_runtime.redistribute import EditPlan, apply_edit, merge_plans, plan_edit
from scr_runtime.sources import Scores, predicted
from scr_runtime.vllm.images import FlatLayout, StepImages, flat_layout
from scr_runtime.vllm.settings import EngineSettings

_SUMS = ("scored", "low_confidence", "drifted", "not_finite", "confidence")


@dataclass(frozen=True)
class EngineStats:
    """Counts since the engine started. An image with several grids (LLaVA-NeXT) counts once for each.

    Attributes:
        steps: Steps of the engine that were edited.
        images: Grids whose sources were chosen.
        edits: Block outputs that were edited: steps times edited blocks.
        switched_off: Images of requests that asked for no edit.
        left_out: Images that could not be edited, by reason: ``"partial"`` (not all of it in one step), ``"no
            question"`` (no text behind it, or not in the same step), ``"no grid"`` (a video, or embeddings).
        low_confidence: Images under the threshold: edited all the same, or left as they are if
            SCR_ON_LOW_CONFIDENCE=skip.
        drifted: Images whose features are unlike those of the fit.
        not_finite: Images whose scores were not finite; they are not edited.
        mean_confidence: Mean calibrated confidence; ``None`` before the first image.
    """

    steps: int = 0
    images: int = 0
    edits: int = 0
    switched_off: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict[str, int])
    low_confidence: int = 0
    drifted: int = 0
    not_finite: int = 0
    mean_confidence: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values."""
        return dataclasses.asdict(self)


@dataclass
class _Step:
    """A step that is running.

    Attributes:
        flat: Where its images are.
        plan: The edit of the rows ``flat.rows``; ``None`` before the state layer.
    """

    flat: FlatLayout
    plan: EditPlan | None = None


class Editor:
    """Edits the steps of one engine, in place.

    Args:
        predictor: On the device of the states.
        config: The settings in force.
        settings: The engine's.
        family: The model's.
        share: The first worker's values of a tensor, where several workers each hold a part of the weights: all of
            them then choose the same sources, also where their states round differently.
    """

    def __init__(
        self,
        predictor: SourcePredictor,
        config: SCRConfig,
        settings: EngineSettings,
        family: Family,
        share: Callable[[Tensor], Tensor] = lambda states: states,
    ) -> None:
        self.config = config
        self._predictor = predictor
        self._provide = predicted(predictor)
        self._share = share
        self._decoder = Decoder(family, nn.ModuleList())
        self._skips = settings.on_low_confidence == "skip"
        given = settings.threshold
        self._least = torch.tensor(predictor.threshold if given is None else given, dtype=torch.float32).item()
        self._step: _Step | None = None
        self._counts: Counter[str] = Counter()
        self._left_out: Counter[str] = Counter()
        device = predictor.state_mean.device
        self._sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=device)
        self._seen = torch.zeros(len(_SUMS), dtype=torch.float64, pin_memory=device.type == "cuda")

    @property
    def layers(self) -> range:
        """The blocks behind which ``after_block`` is to be called."""
        return range(self.config.state_layer, self.config.edit_layers[1] + 1)

    def begin(self, images: StepImages) -> None:
        """Takes the images of the step that is about to run."""
        self._counts["switched_off"] += images.switched_off
        self._left_out.update(images.left_out)
        device = self._predictor.state_mean.device
        self._step = _Step(flat_layout(images.images, device)) if images.images else None

    def drop(self) -> None:
        """A step without images."""
        self._step = None

    def after_block(self, layer: int, hidden: Tensor, residual: Tensor) -> None:
        """Edits the residual stream behind a block, ``hidden + residual``, where the step's images are.

        Rows of other tokens are not written to.

        Args:
            layer: The block's index.
            hidden: [T, d] the block's output, which the next block adds to ``residual``; zero at edited rows after it.
            residual: [T, d]; the edited sum after it.
        """
        step = self._step
        if step is None:
            return
        if layer == self.config.state_layer:
            self._choose(step, hidden, residual)
        assert step.plan is not None  # the state layer is the first one
        first, last = self.config.edit_layers
        if layer >= first:
            rows = step.flat.rows[: step.flat.patches]
            total = hidden[rows] + residual[rows]  # [P, d]
            apply_edit(total, step.plan)
            residual.index_copy_(0, rows, total)
            hidden.index_fill_(0, rows, 0.0)
            self._counts["edits"] += 1
        if layer == last:
            self._counts["steps"] += 1
            self._counts["images"] += step.flat.layout.num_images
            self._seen.copy_(self._sums, non_blocking=True)
            self._step = None

    def stats(self, *, wait: bool = True) -> EngineStats:
        """The counts so far.

        Args:
            wait: Whether to wait for the device. Otherwise what only it knows (confidence, drift, scores that are not
                finite) may be that of some steps before.
        """
        sums = dict(zip(_SUMS, (self._sums if wait else self._seen).tolist(), strict=True))
        scored, confidence = sums.pop("scored"), sums.pop("confidence")
        return EngineStats(
            **self._counts, left_out=dict(self._left_out), mean_confidence=confidence / scored if scored else None,
            **{name: int(value) for name, value in sums.items()},
        )  # fmt: skip

    def _choose(self, step: _Step, hidden: Tensor, residual: Tensor) -> None:
        flat = step.flat
        read = self._share((hidden[flat.rows] + residual[flat.rows])[None])  # [1, P + Q, d]
        wide = self._predictor.config.reads_question
        state = StateLayerOutput(read, flat.layout, self.config, self._decoder, {}, wide=wide)
        plans: list[EditPlan] = []
        for group, scores, strength in zip(flat.layout.groups, self._provide(state), flat.strengths, strict=True):
            config = self.config if strength is None else dataclasses.replace(self.config, strength=strength)
            values, patches = scores.rule.rank(scores.scores)
            k = scores.rule.k
            plan = plan_edit(patches[:, :k], group.grid, config, group.positions, hidden.dtype)
            kept = self._judge(scores, values[:, :k])  # [I]
            shares = plan.coefficients.view(len(plan.coefficients), -1, k) * kept.to(hidden.dtype)[:, None]
            plans.append(dataclasses.replace(plan, coefficients=shares.view_as(plan.coefficients)))
        step.plan = merge_plans(plans)

    def _judge(self, scores: Scores, chosen: Tensor) -> Tensor:
        """Counts a group's images by what their scores are worth; [I] bool, which of them are edited."""
        judged = self._predictor.judge(scores.scores, scores.spread, scores.rule)
        finite = chosen.isfinite().all(-1)
        low = finite & ~(judged.confidence >= self._least)
        confidence = torch.where(finite, judged.confidence, 0)
        columns = [finite, low, finite & judged.drifted, ~finite, confidence]
        self._sums += torch.stack([column.double() for column in columns]).sum(1)
        return finite & ~low if self._skips else finite
