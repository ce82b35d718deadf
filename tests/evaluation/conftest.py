"""The embedded model and a few scenes, shared by the tests of this room."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from data.images import CocoImages
from data.settings import VLMSettings
from data.vlm import load_vlm
from scenes import CHECKPOINT, ensure_world
from scr_runtime import PredictorConfig, SourcePredictor

Scene = tuple[Any, Any, CocoImages]


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    root = ensure_world(tmp_path_factory.mktemp("world"), train=6, val=10, seed=3)
    model, processor = load_vlm(VLMSettings(hub_id=str(CHECKPOINT)))
    return model, processor, CocoImages(root / "val", root / "annotations/instances_val.json")


def make_predictor(question: Any = "none", seed: int = 0) -> SourcePredictor:
    """A random predictor of the embedded model."""
    torch.manual_seed(seed)
    config = PredictorConfig(128, rank=8, width=16, context="both", question=question)
    return SourcePredictor(config).eval().requires_grad_(False)
