"""What the model does with one picture and one question under every mode, as plain values for the page."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from PIL.Image import Image as PILImage

from data.chat import chat_inputs
from evaluation.decoding import yes_no_tokens
from evaluation.edits import owned_by
from evaluation.errors import EvaluationError
from evaluation.latency import prefill_costs
from playground.settings import Ask
from scr_runtime import SCR, Capture, SCRConfig, SourcePredictor, capture
from scr_runtime.config import Mode
from scr_runtime.families import blocks_of
from scr_runtime.reports import ImageReport
from scr_runtime.rule import effective_num_sources, source_rule

MODES: dict[str, Mode] = {"vanilla": "off", "two-pass": "two-pass", "one-pass": "one-pass", "auto": "auto"}
"""As the page names them -> as the runtime does."""
_NEED_PREDICTOR = ("one-pass", "auto")


class Engine:
    """Asks one model; one request at a time, since an SCR has its model to itself.

    Args:
        model: A supported model in eval mode.
        processor: Its processor.
        scr: Where the sliders start.
        predictor: Of this model; None leaves one-pass and auto out.
    """

    def __init__(self, model: Any, processor: Any, scr: SCRConfig, predictor: SourcePredictor | None) -> None:
        self.model, self.processor, self.scr, self.predictor = model, processor, scr, predictor
        if predictor is not None:
            self._scr(scr, "one-pass", None)  # checks that it fits
        self._turn = threading.Lock()
        try:
            self._yes_no = yes_no_tokens(processor.tokenizer)
        except EvaluationError:
            self._yes_no = None

    @property
    def depth(self) -> int:
        """Decoder blocks of the model."""
        return len(blocks_of(self.model))

    @property
    def modes(self) -> list[str]:
        """The modes that can run."""
        return [name for name in MODES if self.predictor is not None or name not in _NEED_PREDICTOR]

    def settings(self, ask: Ask) -> SCRConfig:
        """The method's settings of a screen.

        Raises:
            ConfigurationError: They are out of range, or don't fit the model.
        """
        config = replace(
            self.scr,
            strength=ask.strength,
            num_sources=ask.num_sources or self.scr.num_sources,
            source_fraction=None if ask.num_sources else self.scr.source_fraction,
            edit_layers=ask.edit_layers,
            attention_layers=ask.attention_layers,
        )
        config.check_depth(self.depth)
        return config

    def look(self, picture: PILImage, ask: Ask) -> dict[str, Any]:
        """Answers under every mode, and what was attended to and chosen in each grid of the picture.

        Raises:
            SCRError: The settings don't fit the model, or the picture has no patch off its border.
        """
        config = self.settings(ask)
        with self._turn, torch.no_grad(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            inputs = chat_inputs(self.processor, [picture], [ask.question]).to(self.model.device)
            grids = [self._grid(one, config) for one in capture(self.model, config, inputs)]
            answers = [self._answer(name, inputs, config, ask) for name in self.modes]
        notes = dict.fromkeys(str(one.message) for one in caught if issubclass(one.category, RuntimeWarning))
        sizes = [grid["rows"] * grid["columns"] for grid in grids]
        overview = max(place for place, size in enumerate(sizes) if size == max(sizes))  # covers the whole picture
        return {"answers": answers, "grids": grids, "overview": overview, "notes": list(notes)}

    def cost(self, picture: PILImage, ask: Ask) -> list[dict[str, Any]]:
        """What a prefill takes under each mode, measured now, interleaved: medians of three."""
        config = self.settings(ask)

        def applied(name: str) -> Any:
            return nullcontext() if name == "vanilla" else self._scr(config, MODES[name], ask.threshold)

        with self._turn, warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            inputs = chat_inputs(self.processor, [picture], [ask.question]).to(self.model.device)
            costs = prefill_costs(self.model, inputs, self.modes, applied, repeats=3, warm_up=1)
        first = costs["vanilla"].milliseconds
        return [
            {"mode": name, "milliseconds": one.milliseconds, "added": first * (one.ratio - 1), "ratio": one.ratio}
            for name, one in costs.items()
        ]

    def _scr(self, config: SCRConfig, mode: Mode, threshold: float | None) -> SCR:
        predictor = self.predictor if mode in _NEED_PREDICTOR else None
        return SCR(self.model, config=config, predictor=predictor, mode=mode, threshold=threshold,
                   processor=self.processor)  # fmt: skip

    def _answer(self, name: str, inputs: Mapping[str, Any], config: SCRConfig, ask: Ask) -> dict[str, Any]:
        with self._scr(config, MODES[name], ask.threshold) as scr:
            made: Any = self.model.generate(
                **inputs, max_new_tokens=ask.tokens, do_sample=False, num_beams=1,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
            reports = scr.reports if name != "vanilla" else []
        tokens = made.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        text = self.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        answer: dict[str, Any] = {"mode": name, "text": text, "why": self._why(name, reports, ask)}
        if self._yes_no is not None and not ask.caption:
            likely = made.logits[0][0].float().softmax(-1)
            answer["yes"], answer["no"] = (float(likely[ids].sum()) for ids in self._yes_no)
        return answer

    def _why(self, name: str, reports: list[ImageReport], ask: Ask) -> str:
        """Who chose the sources, in a sentence."""
        if not reports:
            return "the model as it is"
        if name == "two-pass":
            return "the diagnostic run chose the sources"
        fallen = [report for report in reports if report.fallback_reason]
        if fallen:
            return f"the diagnostic run chose: {fallen[0].fallback_reason}"
        sure = min(report.confidence or 0.0 for report in reports)
        if name == "auto":
            return f"the predictor chose: confidence {sure:.3f}, threshold {ask.threshold:.3f}"
        return f"the predictor chose, with confidence {sure:.3f}"

    def _grid(self, one: Capture, config: SCRConfig) -> dict[str, Any]:
        """One grid: maps over the eligible patches, sources and the neighbours that each owns, for both choosers."""
        rule = source_rule(config, one.grid, one.attention.device)
        found: dict[str, Any] = {
            "rows": one.grid[0],
            "columns": one.grid[1],
            "eligible": rule.eligible.tolist(),
            "most_sources": effective_num_sources(one.grid, replace(config, num_sources=10**6, source_fraction=None)),
            "entropy": one.entropy,
            "entropy_share": one.entropy / math.log(max(len(one.attention), 2)),
        }
        attention = one.attention.float().masked_fill(~rule.eligible, 0.0)
        chosen = {"two-pass": rule.choose(one.attention[None])[0]}
        found["attention"] = _shares(attention)
        if self.predictor is not None:
            scores, spread = self.predictor.score_and_spread(one.states[None], one.grid, one.question[None])
            judged = self.predictor.judge(scores, spread, rule)
            found["predicted"] = _shares(scores.masked_fill(~rule.eligible, -torch.inf).softmax(-1)[0])
            found["confidence"] = float(judged.confidence[0])
            chosen["one-pass"] = rule.choose(scores)[0]
            found["overlap"] = len(set(chosen["one-pass"].tolist()) & set(chosen["two-pass"].tolist()))
        found["sources"] = {name: sources.tolist() for name, sources in chosen.items()}
        found["owned"] = {name: owned_by(s, one.grid, config.connectivity) for name, s in found["sources"].items()}
        return found


def _shares(values: torch.Tensor) -> list[float]:
    return (values / values.sum().clamp(min=1e-12)).tolist()
