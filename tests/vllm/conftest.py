"""The environment that vLLM reads, set before it is imported: an engine in this process, one thread, no network."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
}  # fmt: skip
os.environ.update(SETTINGS)

from tests.vllm.engines import Reference, engine, write_checkpoint  # noqa: E402


def pytest_sessionstart() -> None:
    """Without the entry point, every engine would run unedited."""
    if "scr" not in importlib.metadata.entry_points(group="vllm.general_plugins").names:
        pytest.exit("the package's metadata here has no plug-in for vLLM: pip install --no-deps -e .", returncode=1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Warnings of vLLM's own dependencies are no errors of ours."""
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "scene-llava")


@pytest.fixture(scope="session")
def reference(checkpoint: Path) -> Reference:
    return Reference(checkpoint)


class Engines:
    """One engine at a time: an engine stays until another one is asked for."""

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint = checkpoint
        self._key: Any = None
        self._engine: Any = None

    def __call__(self, predictor: Path | None, **settings: Any) -> Any:
        key = (predictor, repr(settings))
        if key != self._key:
            self.close()
            os.environ.pop("SCR_PREDICTOR", None)
            if predictor is not None:
                os.environ["SCR_PREDICTOR"] = str(predictor)
            self._engine, self._key = engine(self._checkpoint, **settings), key
        return self._engine

    def close(self) -> None:
        if self._engine is not None:
            self._engine.llm_engine.engine_core.shutdown()
        self._engine = self._key = None


@pytest.fixture(scope="session")
def engines(checkpoint: Path) -> Iterator[Engines]:
    made = Engines(checkpoint)
    yield made
    made.close()
