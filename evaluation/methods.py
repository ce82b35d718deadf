"""What is compared: vanilla, the modes of SCR, and the controls that say what a gain is made of.

A lower hallucination rate alone proves little: sources drawn at random lower it too, and so does a model that simply
says "no" more often. So every comparison carries the same edit on random sources, on the sources of another image
(equal K and equal topology, hence an equal dose, in the wrong place), and a constant shift of the yes margin.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scr_runtime import SCR, ImageReport, PredictorConfig, SCRConfig, SourcePredictor, load_predictor

VANILLA, TWO_PASS, ONE_PASS, AUTO = "vanilla", "two-pass", "one-pass", "auto"
UNIFORM, SWAPPED, SHIFT = "uniform", "swapped", "shift"

DESCRIPTIONS = {
    VANILLA: "the model as it is",
    TWO_PASS: "sources from the diagnostic run",
    ONE_PASS: "sources from the predictor",
    AUTO: "the predictor, two-pass where it is unsure",
    UNIFORM: "control: K random sources",
    SWAPPED: "control: two-pass sources of another image, equal dose",
    SHIFT: "control: vanilla, yes margin shifted by two-pass's mean shift",
}


class GivenSources(SourcePredictor):
    """Takes a predictor's place and chooses the sources it is given, in their order.

    Attributes:
        sources: One list of patches per image of the next prefill.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__(
            PredictorConfig(
                hidden_size, rank=1, width=1, position="none", question="none", context="none", components=1
            )
        )
        self.sources: list[list[int]] = []

    def forward(self, states: Tensor, grid: tuple[int, int], question: Tensor | None = None) -> Tensor:
        """[I, N] scores that descend along each list and are zero elsewhere."""
        scores = torch.zeros(states.shape[:2], device=states.device)
        for image, chosen in enumerate(self.sources):
            scores[image, chosen] = torch.arange(len(chosen), 0, -1, device=states.device, dtype=torch.float32)
        return scores


class Methods:
    """The methods of one comparison, over one model.

    Args:
        model: A supported model in eval mode, without an SCR attached.
        scr: The method's settings.
        predictor: A predictor folder, or a loaded predictor; without it there is no one-pass and no auto.
        seed: Of the uniform control.
    """

    def __init__(
        self,
        model: Any,
        scr: SCRConfig,
        predictor: str | Path | SourcePredictor | None = None,
        seed: int = 0,
    ) -> None:
        self._given = GivenSources(model.config.get_text_config().hidden_size)
        self._runtimes = {
            TWO_PASS: SCR(model, config=scr, mode="two-pass"),
            UNIFORM: SCR(model, config=scr, mode="uniform", seed=seed),
            SWAPPED: SCR(model, config=scr, mode="one-pass", predictor=self._given),
        }
        if predictor is not None:
            loaded = predictor if isinstance(predictor, SourcePredictor) else load_predictor(predictor)
            self._runtimes[ONE_PASS] = SCR(model, config=scr, mode="one-pass", predictor=loaded)
            self._runtimes[AUTO] = SCR(model, config=scr, mode="auto", predictor=loaded)

    @contextmanager
    def applied(self, name: str) -> Iterator[SCR | None]:
        """Attaches a method for one or more prefills; yields its SCR, or ``None`` for vanilla."""
        if name == VANILLA:
            yield None
            return
        with self._runtimes[name] as scr:
            yield scr

    @torch.no_grad()
    def logits(
        self, model: Any, inputs: Mapping[str, Any], names: Sequence[str]
    ) -> tuple[dict[str, Tensor], dict[str, list[ImageReport]]]:
        """Runs one batch, one image a row, under the named methods.

        Args:
            model: The model.
            inputs: Its inputs, on its device.
            names: Methods in the order of their runs; two-pass has to come before swapped, which takes its sources.

        Returns:
            Per method, [B, V] float32 logits after the last token, and the reports of its prefill.
        """
        logits: dict[str, Tensor] = {}
        reports: dict[str, list[ImageReport]] = {}
        for name in names:
            if name == SWAPPED:  # each row gets the sources of the row before it
                own = [report.sources for report in reports[TWO_PASS]]
                self._given.sources = own[-1:] + own[:-1]
            with self.applied(name) as scr:
                logits[name] = model(**inputs, logits_to_keep=1).logits[:, -1].float()
                reports[name] = scr.reports if scr is not None else []
        return logits, reports
