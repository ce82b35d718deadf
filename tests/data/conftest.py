from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.folder import HarvestSummary
from data.harvest import harvest
from data.harvester import DiagnosticRun, prepare
from data.images import CocoImages
from data.ranks import Rank
from scr_runtime import SCRConfig
from tests.data import tiny


@pytest.fixture(scope="session")
def llava() -> tuple[Any, Any]:
    return tiny.build_llava()


@pytest.fixture(scope="session")
def coco(tmp_path_factory: pytest.TempPathFactory) -> CocoImages:
    """40 images; not to be changed."""
    return tiny.write_coco(tmp_path_factory.mktemp("coco") / "shared", 40)


@pytest.fixture
def run_harvest(llava: tuple[Any, Any]) -> Callable[..., HarvestSummary]:
    """Harvests with a tiny LLaVA and fake captures: 20 + 6 + 4 images in shards of 5."""

    def run(
        directory: Path,
        images: CocoImages,
        *,
        scr: SCRConfig = tiny.CONFIG,
        capture: DiagnosticRun = tiny.fake_capture,
        output: str | None = None,
        overwrite: bool = False,
        rank: Rank | None = None,
        **changes: Any,
    ) -> HarvestSummary:
        model, processor = llava
        job, harvester = prepare(
            directory,
            model=model,
            processor=processor,
            scr=scr,
            images=images,
            settings=tiny.changed(**changes),
            output=output,
            capture=capture,
        )
        return harvest(job, harvester, overwrite=overwrite, rank=rank)

    return run


@pytest.fixture
def undisturbed(tmp_path: Path, coco: CocoImages, run_harvest: Callable[..., HarvestSummary]) -> Path:
    """A finished harvest."""
    run_harvest(tmp_path / "undisturbed", coco)
    return tmp_path / "undisturbed"
