from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.harvest import harvest
from data.images import CocoImages
from tests.data import tiny


@pytest.fixture(scope="session")
def llava() -> tuple[Any, Any]:
    return tiny.build_llava()


@pytest.fixture(scope="session")
def coco(tmp_path_factory: pytest.TempPathFactory) -> CocoImages:
    """40 images; not to be changed."""
    return tiny.write_coco(tmp_path_factory.mktemp("coco") / "shared", 40)


@pytest.fixture
def run_harvest(llava: tuple[Any, Any]) -> Callable[..., dict[str, Any]]:
    """`harvest` of a tiny LLaVA with fake captures: 20 + 6 + 4 images in shards of 5."""

    def run(directory: Path, images: CocoImages, **changes: Any) -> dict[str, Any]:
        model, processor = llava
        settings: dict[str, Any] = {
            "splits": {"train": 20, "validation": 6, "test": 4},
            "shard_size": 5,
            "batch_size": 4,
            "capture": tiny.fake_capture,
        }
        return harvest(
            directory, model=model, processor=processor, config=tiny.CONFIG, images=images, **{**settings, **changes}
        )

    return run
