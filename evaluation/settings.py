"""Settings of this room: how the modes of SCR are compared.

The configuration (configs/schema.py) has this very object as its section; a library caller makes it by hand. The
string under a field is its help text. Nothing here imports torch.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError


class EvaluationSettings(BaseModel):
    """Comparing the modes of SCR on held-out images."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)

    images: int = Field(default=300, ge=0)
    """Images asked about; 0 compares no answers: train.py then ends with the fit's own metrics."""
    questions_per_image: int = Field(default=6, ge=2)
    """Questions per image and strategy, half about present, half about absent objects, as POPE asks."""
    batch_size: int = Field(default=32, ge=2)
    """Questions per forward; at least 2, because the swapped control takes another question's sources."""
    bootstrap: int = Field(default=2000, ge=1)
    """Resamples of the images behind each confidence interval."""
    latency_repeats: int = Field(default=20, ge=1)
    """Prefills timed per mode."""
    seed: int = Field(default=0, ge=0)
    """Seed of the questions and of the resamples."""

    @field_validator("questions_per_image")
    @classmethod
    def _even(cls, count: int) -> int:
        if count % 2:
            legal = {"legal": "an even number"}
            raise PydanticCustomError("contradiction", "half of the questions are about absent objects", legal)
        return count
