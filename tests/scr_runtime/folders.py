"""Predictor folders for tests: one that was written, and what may be made of it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from scr_runtime import (
    SCR,
    PredictorConfig,
    SCRConfig,
    SourcePredictor,
    describe_model,
    errors,
    load_predictor,
    save_predictor,
)
from scr_runtime.reading import checksum
from tests.conftest import make_inputs, make_tiny_llava

CONFIG = SCRConfig(num_sources=4, edit_layers=(0, 2), attention_layers=(2, 4))
FUZZ = settings(
    deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def small(size: int) -> SourcePredictor:
    """A predictor for states of a given size."""
    return SourcePredictor(PredictorConfig(size, rank=4, width=8))


class Written:
    """A folder, its files' bytes, what they hold, and a model that they are for."""

    def __init__(self, path: Path) -> None:
        torch.manual_seed(0)
        self.model: Any = make_tiny_llava(0)
        self.inputs = make_inputs(self.model, [1])
        predictor = small(32)
        predictor.set_statistics(torch.randn(32), torch.rand(32) + 1, torch.randn(32), torch.rand(32) + 1)
        predictor.set_calibration(torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.2, 0.4, 0.8]), 0.3, 1.7)
        predictor.set_drift(0.5, 1.7)
        self.folder = save_predictor(
            path, predictor, scr=CONFIG, model=describe_model(self.model), metrics={"test/mass": 0.9},
            provenance={"run": "r\u00e9sum\u00e9", "versions": {"torch": "2"}},
        )  # fmt: skip
        self.config = (path / "config.json").read_bytes()
        self.weights = (path / "model.safetensors").read_bytes()
        self.record = json.loads(self.config)
        self.loaded = load_predictor(path)

    def restore(self) -> Path:
        """The folder as it was written."""
        for name, content in (("config.json", self.config), ("model.safetensors", self.weights)):
            path = self.folder / name
            if path.is_symlink() or not path.is_file():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
            else:
                path.chmod(0o644)
            path.write_bytes(content)
        return self.folder

    def write_record(self, record: Any) -> None:
        """Writes a config.json whose checksum is right, as far as it can have one."""
        if isinstance(record, dict) and record.get("format_version") == 3 and "checksum" in record:
            record = record | {"checksum": checksum(record)}
        (self.folder / "config.json").write_text(json.dumps(record))

    def write_weights(self, content: bytes) -> None:
        """Writes weights that config.json knows the sha256 of."""
        (self.folder / "model.safetensors").write_bytes(content)
        self.write_record(self.record | {"weights_sha256": hashlib.sha256(content).hexdigest()})

    def is_same(self, other: SourcePredictor) -> bool:
        mine = self.loaded
        return (
            other.info == mine.info
            and (other.config, other.threshold) == (mine.config, mine.threshold)
            and (other.drift_typical, other.drift_limit) == (mine.drift_typical, mine.drift_limit)
            and all(torch.equal(mine.state_dict()[name], value) for name, value in other.state_dict().items())
        )  # fmt: skip

    def refused_or_usable(self) -> bool:
        """Loads the folder: nothing but PredictorErrors; what is loaded is used, and its numbers are numbers."""
        try:
            predictor = load_predictor(self.folder)
        except errors.PredictorError as error:
            assert str(self.folder) in str(error)
            assert len(str(error)) < 5000
            return True
        self.is_usable(predictor)
        return False

    def is_usable(self, predictor: SourcePredictor) -> None:
        """What is loaded is used, and its numbers are numbers."""
        numbers = [predictor.threshold, *(tensor.sum().item() for tensor in predictor.state_dict().values())]
        assert all(map(math.isfinite, numbers))
        SCRConfig.from_dict(predictor.info["scr"])
        assert predictor.info["model"] is not None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            SCR(self.model, predictor=predictor, mode="auto")


def auto_runs_two_pass(written: Written, *, config: SCRConfig | None = None) -> SCR:
    """``auto`` with the folder as it is: one warning, and two-pass edits."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", "32 sources are asked for")  # the paper's K, on 36 patches
        scr = SCR(written.model, config=config, predictor=written.folder, mode="auto")
        with torch.no_grad(), scr:
            logits = written.model(**written.inputs).logits
    assert [item.category for item in caught] == [RuntimeWarning]
    assert "every prefill runs two-pass" in str(caught[0].message)
    assert [report.provider for report in scr.reports] == ["two-pass"]
    with torch.no_grad(), SCR(written.model, config=scr.config, mode="two-pass"):
        assert torch.equal(written.model(**written.inputs).logits, logits)
    return scr


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from([2.5, 1e308, -1e308, 10**400, -(10**400), 0, -1, "5", "high", "\ud800", 2**63, 10**8, 10**9])
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value, keys and items of lists."""
    yield path
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    changed = dict(value) if isinstance(value, dict) else list(value)
    changed[path[0]] = replaced(value[path[0]], path[1:], new)
    return changed


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
