"""train.py on a tiny model of each family whose real processor needs no torchvision, with photos of four shapes."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from data.chat import chat_inputs
from data.images import CocoImages
from data.settings import VLMSettings
from data.shards import ShardReader
from data.vlm import load_vlm
from scr_runtime import SCRConfig, capture, load_predictor
from tests.families.models import PLAIN, SEVERAL_GRIDS, save_model
from tests.families.photos import write_photos
from tests.families.rehearsal import COUNTS, check_modes, run_chain

pytestmark = [
    pytest.mark.slow,
    # MLflow's own, as in tests/test_train.py
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning"),
]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    write_photos(folder / "photos", sum(COUNTS.values()))
    return folder


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """A command sets a handler, and a fit makes torch deterministic."""
    handler, strict = signal.getsignal(signal.SIGTERM), torch.are_deterministic_algorithms_enabled()
    yield
    signal.signal(signal.SIGTERM, handler)
    torch.use_deterministic_algorithms(strict)


@pytest.mark.parametrize("name", PLAIN)
def test_the_chain_comes_to_its_end(work: Path, name: str):
    photos, runs, model = work / "photos", work / "runs", save_model(name, work / "models" / name)
    code, printed = run_chain(name, model, photos, runs)
    assert code == 0, printed[-3000:]
    reports = {path.name for path in (runs / f"reports/{name}").iterdir()}
    assert reports == {"fit.json", "maps.png", "reliability.png"}
    metrics = load_predictor(runs / "predictors" / name).info["metrics"]
    if name in SEVERAL_GRIDS:
        assert 6 == metrics["test/k_min"] < metrics["test/k_mean"] < metrics["test/k_max"] == 26  # of 8 x 8 to 16 x 16
        assert "mass@K" in printed and "K = 6 to 26 (mean " in printed
    else:
        assert metrics["test/k_min"] == metrics["test/k_mean"] == metrics["test/k_max"] == 6
        assert "mass@6" in printed and "K = 6 (16.7% of the eligible patches)" in printed
    check_modes(name, model, photos, runs)
    check_harvest(name, model, photos, runs)


def check_harvest(name: str, folder: Path, photos: Path, runs: Path) -> None:
    """A sample holds, grid by grid, what the diagnostic run of each of its prompts alone gives."""
    model, processor = load_vlm(VLMSettings(hub_id=str(folder), device="cpu", dtype="float32"))
    images = CocoImages(photos / "train2014", photos / "annotations/instances_train2014.json")
    config = SCRConfig(num_sources=6, edit_layers=(0, 1), attention_layers=(1, 2))
    grids: set[Any] = set()
    (shards,) = (runs / "harvest").glob(f"{name}-coco2014*/index.json")
    for sample in ShardReader(shards.parent, "test"):
        grids.add(sample.grids)
        picture = images.open(sample.image_id)
        for prompt, asked in enumerate(sample.prompts):
            alone = capture(model, config, chat_inputs(processor, [picture], [asked["text"]]))
            assert sample.grids == tuple(one.grid for one in alone)
            for place, one in enumerate(alone):
                part = sample.part(place)
                torch.testing.assert_close(part.states, one.states, atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(part.attention[prompt], one.attention, atol=1e-5, rtol=1e-3)
                torch.testing.assert_close(part.question[prompt], one.question, atol=1e-4, rtol=1e-4)
                assert part.entropy[prompt] == pytest.approx(one.entropy, abs=1e-4)
    assert {len(of_one) for of_one in grids} == {2 if name in SEVERAL_GRIDS else 1}
    assert (len(grids) > 1) == (name in SEVERAL_GRIDS)
