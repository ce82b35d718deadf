"""Settings of this room: what the predictor is, and how it is fitted.

The configuration (configs/schema.py) has these very objects as its sections; a library caller makes them by hand. The
string under a field is its help text. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from scr_runtime.config import ContextFeatures, PositionFeatures, PredictorConfig, QuestionFeatures

LossName = Literal["kl", "bce", "mse_log", "lambdarank"]
Target = Literal["prompt", "mean"]
Accelerator = Literal["auto", "cpu", "gpu", "mps"]
Precision = Literal["auto", "32-true", "bf16-mixed"]

_SECTION = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)


class PredictorSettings(BaseModel):
    """The source predictor and its objective."""

    model_config = _SECTION

    rank: int | None = Field(default=PredictorConfig.rank, ge=1)
    """Width of the first, factorised layer; null takes the one whose parameter count is nearest to the budget."""
    width: int = Field(default=PredictorConfig.width, ge=1)
    """Hidden units of the second layer."""
    budget: int = Field(default=PredictorConfig.budget, ge=1)
    """Trainable parameters to aim at."""
    position: PositionFeatures = PredictorConfig.position
    """Features of a patch's place: none; linear: row, column and distance to the border; fourier: their sines and
    cosines too."""
    question: QuestionFeatures = PredictorConfig.question
    """How the pooled states of the question enter: none; concat: beside the patch's; bilinear: as a gate on it."""
    context: ContextFeatures = PredictorConfig.context
    """Features of the other patches: none, the mean of the image, that of the 3 x 3 neighbourhood, or both."""
    components: int = Field(default=PredictorConfig.components, ge=1)
    """Softmaxes whose mixture is the predicted map, as a real one is a mean over layers and heads; 1: a plain one."""
    target: Target = "prompt"
    """What is fitted to: prompt, the map of the row's own prompt; mean, the mean over the prompts of its image.
    Validation and test are always against the own map."""
    loss: LossName = "kl"
    """Objective: kl to the attention map (listwise), bce on top-K membership, mse_log on its logarithm, lambdarank
    on the order of its top K."""
    target_fallback: float | None = Field(default=0.2, ge=0, le=1, allow_inf_nan=False)
    """Share of the maps, those of lowest confidence, that mode "auto" gives to the diagnostic run; null if
    target_fidelity decides."""
    target_fidelity: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    """Instead of target_fallback: expected share of true sources that the maps which stay one-pass have on average."""

    @field_validator("target_fidelity")
    @classmethod
    def _one_target(cls, fidelity: float | None, info: ValidationInfo) -> float | None:
        if "target_fallback" in info.data and (info.data["target_fallback"] is None) == (fidelity is None):
            both = fidelity is not None
            reason = "with target_fallback set too, there are two targets" if both else "there is no target"
            hint = "Add predictor.target_fallback=null." if both else "Set it, or predictor.target_fallback."
            raise PydanticCustomError("contradiction", "{reason}", {"reason": reason, "hint": hint})
        return fidelity

    def network(self, hidden_size: int) -> PredictorConfig:
        """Sizes and features of the network for a model's hidden size.

        Raises:
            ConfigurationError: If they don't fit that size.
        """
        own = {field.name for field in dataclasses.fields(PredictorConfig)} & type(self).model_fields.keys()
        return PredictorConfig(hidden_size, **{name: getattr(self, name) for name in own})


class FitSettings(BaseModel):
    """Fitting the predictor with Lightning."""

    model_config = _SECTION

    max_epochs: int = Field(default=20, ge=1)
    """Passes over the harvest at most."""
    learning_rate: float = Field(default=5e-3, gt=0, le=1, allow_inf_nan=False)
    """Peak learning rate of AdamW."""
    weight_decay: float = Field(default=1e-2, ge=0, le=1, allow_inf_nan=False)
    """Weight decay of AdamW."""
    warmup_fraction: float = Field(default=0.1, ge=0, lt=1, allow_inf_nan=False)
    """Share of all steps over which the learning rate rises from 0."""
    patience: int = Field(default=6, ge=1)
    """Epochs without a better validation score before the fit stops."""
    gradient_clip: float | None = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Largest gradient norm; null never clips."""
    accelerator: Accelerator = "auto"
    """Where the fit runs, in Lightning's words."""
    devices: int = Field(default=1, ge=1)
    """Processes of the fit, each on its own device; they share each batch, so that results stay the same."""
    precision: Precision = "auto"
    """Number format of the fit: 32-true, float32; bf16-mixed, bfloat16 where torch's autocast allows it; auto takes
    bf16-mixed where the processor multiplies bfloat16 by itself, and logs which."""
    trial: bool = False
    """The run is a trial: runs/predictors/<model> and its like stay at a run that was none."""
    resume: bool = True
    """Resume an interrupted run of the same settings; false starts a new one. After a finished run, the same command
    starts a new one."""
