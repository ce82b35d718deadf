"""The golden pair of a predictor folder: stored inputs, and what the predictor answered when it was saved.

Whoever loads the folder elsewhere can see that the same numbers come out. The inputs are noise with the mean and the
deviation of the fit's states: no image can be read from them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from scr_runtime.config import SCRConfig
from scr_runtime.errors import PredictorCorruptError
from scr_runtime.network import SourcePredictor
from scr_runtime.redistribute import Grid
from scr_runtime.rule import source_rule

GRID: Grid = (6, 8)
_IMAGES = 2
_TOLERANCE = 1e-4  # of scores, as a share of the largest: other machines add up in another order


def golden_inputs(predictor: SourcePredictor) -> dict[str, Tensor]:
    """Draws inputs for a predictor on the CPU: ``states`` [2, 48, d] float16 and ``question`` [2, d] float32."""
    generator = torch.Generator().manual_seed(0)
    size = predictor.config.hidden_size
    states = torch.randn(_IMAGES, GRID[0] * GRID[1], size, generator=generator)
    question = torch.randn(_IMAGES, size, generator=generator)
    states = (states * predictor.state_std + predictor.state_mean).clamp(-6e4, 6e4).half()
    return {"states": states, "question": question * predictor.question_std + predictor.question_mean}


@torch.inference_mode()
def golden_outputs(predictor: SourcePredictor, inputs: dict[str, Tensor], scr: SCRConfig) -> dict[str, Tensor]:
    """What a predictor answers: ``scores`` [2, 48], ``confidence`` and ``drift`` [2], ``sources`` [2, K]."""
    rule = source_rule(scr, GRID)
    scores, spread = predictor.score_and_spread(inputs["states"], GRID, inputs["question"])
    judged = predictor.judge(scores, spread, rule)
    sources = rule.choose(scores).contiguous()
    return {"scores": scores, "confidence": judged.confidence, "drift": judged.drift, "sources": sources}


def golden_pair(predictor: SourcePredictor, scr: SCRConfig) -> dict[str, Tensor]:
    """Inputs and outputs of a predictor on the CPU, as they are stored."""
    inputs = golden_inputs(predictor)
    return inputs | golden_outputs(predictor, inputs, scr)


def most_golden_bytes(hidden_size: int) -> int:
    """Size that a stored pair cannot exceed."""
    patches = _IMAGES * GRID[0] * GRID[1]
    return patches * (2 * hidden_size + 4 + 8) + _IMAGES * (4 * hidden_size + 8) + 4096


def check_golden(predictor: SourcePredictor, stored: dict[str, Tensor], scr: SCRConfig, path: Path) -> None:
    """Compares what a predictor on the CPU answers with the stored pair.

    Raises:
        PredictorCorruptError: If a tensor is missing or of another shape or type, or an answer differs.
    """
    expected = golden_pair(predictor, scr)
    kinds = {name: (tuple(value.shape), value.dtype) for name, value in expected.items()}
    found = {name: (tuple(value.shape), value.dtype) for name, value in stored.items()}
    if found != kinds:
        raise PredictorCorruptError(f"{path}: holds {found!r:.300}, expected {kinds!r:.300}. Export it again.")
    answers = golden_outputs(predictor, stored, scr)
    scale = max(1.0, float(stored["scores"].abs().max()))
    for name, unit in (("scores", scale), ("confidence", 1.0), ("drift", scale)):
        worst = float((answers[name] - stored[name]).abs().max())
        if not worst <= _TOLERANCE * unit:  # NaN is not
            raise PredictorCorruptError(
                f"{path}: {name} of the golden inputs differ by up to {worst:.3g} from those that were stored, "
                f"expected at most {_TOLERANCE * unit:.3g}. This machine or these versions of torch and scr_runtime "
                "compute something else than the export did."
            )
    if not torch.equal(source_rule(scr, GRID).choose(stored["scores"]), stored["sources"]):
        raise PredictorCorruptError(
            f"{path}: the sources chosen from the stored scores are not the stored ones: this scr_runtime chooses "
            "otherwise than the one that wrote the folder"
        )
