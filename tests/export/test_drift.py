"""The drift guard on the scene model's states: quiet on other scenes, awake on other features and other models."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from data.chat import chat_inputs
from data.datamodule import ShardDataModule
from data.harvest import harvest
from data.harvester import prepare
from data.images import CocoImages
from data.settings import HarvestSettings, ReadingSettings
from predictor.calibration import fit_drift, spread_rows
from predictor.module import SourceModule
from scenes import CHECKPOINT, ensure_world
from scr_runtime import SCR, PredictorConfig, SCRConfig

CONFIG = SCRConfig(num_sources=8, edit_layers=(0, 2), attention_layers=(2, 4))


@pytest.fixture(scope="module")
def scene_llava() -> tuple[Any, Any]:
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT).eval()
    return model, AutoProcessor.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> CocoImages:
    root = ensure_world(tmp_path_factory.mktemp("world") / "scenes", train=100, val=1)
    return CocoImages(root / "train", root / "annotations" / "instances_train.json")


@pytest.fixture(scope="module")
def harvested(
    scene_llava: tuple[Any, Any], images: CocoImages, tmp_path_factory: pytest.TempPathFactory
) -> ShardDataModule:
    """20 + 40 + 32 scenes, one prompt each."""
    model, processor = scene_llava
    folder = tmp_path_factory.mktemp("harvest")
    settings = HarvestSettings(samples=20, validation=40, test=32, prompts_per_image=1)
    harvest(*prepare(folder, model=model, processor=processor, scr=CONFIG, images=images, settings=settings))
    return ShardDataModule(folder, ReadingSettings(batch_size=50))


@pytest.fixture(scope="module")
def module(harvested: ShardDataModule) -> SourceModule:
    """Untrained, with the statistics of the training split and a guard of the validation split."""
    torch.manual_seed(0)
    module = SourceModule(PredictorConfig(128, context="both")).eval().requires_grad_(False)
    module.compute_statistics(harvested.train_dataloader())
    module.predictor.set_drift(*fit_drift(spread_rows(module.spread, harvested.val_dataloader())))
    return module


def alarms(module: SourceModule, harvested: ShardDataModule, change: Callable[[Tensor], Tensor]) -> float:
    """Share of the test split's rows that trip the guard, their states changed."""

    def drift(batch: Any) -> Tensor:
        return module.predictor.drift(module.spread({**batch, "states": change(batch["states"].float())}))

    limit = module.predictor.drift_limit
    assert limit is not None
    return float(np.mean(spread_rows(drift, harvested.test_dataloader()) > limit))


def test_scenes_that_it_has_not_seen_are_quiet(module: SourceModule, harvested: ShardDataModule) -> None:
    assert alarms(module, harvested, lambda states: states) == 0.0  # 32 rows; docs/performance.md has more


def test_other_features_are_not(module: SourceModule, harvested: ShardDataModule) -> None:
    deviation = module.predictor.state_std
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    assert alarms(module, harvested, lambda states: 3 * states) == 1.0
    assert alarms(module, harvested, lambda states: states + 3 * deviation) == 1.0
    assert alarms(module, harvested, lambda states: states[..., order]) > 0.9  # as another model's would lie
    assert alarms(module, harvested, lambda states: torch.full_like(states, float("nan"))) == 1.0


@pytest.fixture
def asked(scene_llava: tuple[Any, Any], images: CocoImages) -> Iterator[dict[str, Any]]:
    pictures = [images.open(image_id) for image_id in images.ids[-8:]]
    yield dict(chat_inputs(scene_llava[1], pictures, ["Is there a dog in the image?"] * len(pictures)))


def test_auto_hears_the_alarm(module: SourceModule, scene_llava: tuple[Any, Any], asked: dict[str, Any]) -> None:
    own = scene_llava[0]
    torch.manual_seed(1)
    other = copy.deepcopy(own)
    with torch.no_grad():  # another model of the same shape: its block 0 gives other states
        for parameter in other.model.language_model.layers[0].parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
        for model, trips in ((own, False), (other, True)):
            with SCR(model, config=CONFIG, mode="auto", predictor=module.predictor, threshold=0.0) as scr:
                model(**asked)
            assert [report.provider for report in scr.reports] == ["two-pass" if trips else "one-pass"] * 8
            assert scr.stats.fallbacks["drift"] == scr.stats.drifted == 8 * trips
            with SCR(model, config=CONFIG, mode="one-pass", predictor=module.predictor) as scr:
                model(**asked)
            limit = module.predictor.drift_limit or 0.0
            assert all(((report.drift or 0.0) > limit) == trips for report in scr.reports)
            assert scr.stats.one_pass == 8
