from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from export.errors import ExportError
from export.package import Facts, export_predictor
from predictor.errors import FitError
from predictor.module import SourceModule, load_module
from predictor.settings import PredictorSettings
from scr_runtime import PredictorConfig, SCRConfig, load_predictor

SCR_CONFIG = SCRConfig(num_sources=4, edit_layers=(0, 1), attention_layers=(1, 2))
MODEL = {
    "name": "tiny", "revision": None, "family": "llava", "hidden_size": 16, "num_blocks": 4,
    "embedding_probe": [0.5] * 32,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_new_process(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """It takes seconds; tests/export/test_fresh.py is about it."""
    if "new_process" not in request.keywords:
        monkeypatch.setattr("export.package.check_fresh", lambda *_: None)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    module = SourceModule(PredictorConfig(16, rank=4, width=8, context="both"), SCRConfig(num_sources=4))
    module.predictor.set_statistics(torch.randn(16), torch.rand(16) + 1, torch.randn(16), torch.rand(16) + 1)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, barebones=True)
    trainer.strategy.connect(module)
    module.trainer = trainer
    trainer.save_checkpoint(tmp_path / "best.ckpt")
    return tmp_path / "best.ckpt"


@pytest.fixture
def batches() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "states": torch.randn(30, 36, 16, generator=generator).half(),
            "attention": torch.rand(30, 36, generator=generator),
            "question": torch.randn(30, 16, generator=generator).half(),
            "grid": (6, 6),
            "key": [f"{index:012d}" for index in range(30)],
        }
        for _ in range(3)
    ]


def run(checkpoint: Path, folder: Path, batches: list[dict[str, Any]], **kwargs: Any) -> Any:
    settings = kwargs.pop("settings", PredictorSettings())
    return export_predictor(
        checkpoint, folder, scr=SCR_CONFIG, model=MODEL, validation=batches, settings=settings, **kwargs
    )


def test_the_folder_gives_the_checkpoints_outputs(
    checkpoint: Path, batches: list[dict[str, Any]], tmp_path: Path
) -> None:
    exported = run(checkpoint, tmp_path / "predictor", batches, facts=Facts({"test/mass": 0.5}, {"seed": 3}))
    module = load_module(checkpoint)
    loaded = load_predictor(tmp_path / "predictor")
    batch = batches[0]
    with torch.no_grad():
        expected = module(batch["states"], batch["grid"], batch["question"])
        assert torch.equal(loaded(batch["states"], batch["grid"], batch["question"]), expected)
    assert loaded.threshold == exported.calibration.threshold
    assert SCRConfig.from_dict(loaded.info["scr"]) == SCR_CONFIG
    assert loaded.info["metrics"] == {"test/mass": 0.5}
    assert loaded.info["provenance"] == {
        "seed": 3, "used": {"target_fallback": 0.2, "temperature": exported.calibration.temperature}
    }  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.ckpt", "predictor"]


def test_a_failed_check_leaves_the_former_folder(
    checkpoint: Path, batches: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run(checkpoint, tmp_path / "predictor", batches).folder
    before = (folder / "config.json").read_bytes()

    def damaged(path: Path, verify: bool) -> Any:
        predictor = load_predictor(path, verify=verify)
        assert predictor.weights is not None
        with torch.no_grad():
            predictor.weights.bias.add_(1e-3)
        return predictor

    monkeypatch.setattr("export.package.load_predictor", damaged)
    with pytest.raises(ExportError, match=r"differ from the checkpoint's by up to 0\.001"):
        run(checkpoint, tmp_path / "predictor", batches, facts=Facts({"test/mass": 0.9}))
    assert (folder / "config.json").read_bytes() == before


def test_no_checkpoint(batches: list[dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"run train\.py first"):
        run(tmp_path / "none.ckpt", tmp_path / "predictor", batches)


def test_the_folder_has_a_drift_guard(checkpoint: Path, batches: list[dict[str, Any]], tmp_path: Path) -> None:
    predictor = run(checkpoint, tmp_path / "predictor", batches).predictor
    assert predictor.drift_limit is not None
    own, other = ({**batches[0], "states": batches[0]["states"] * factor} for factor in (1, 10))
    spreads = [
        predictor.score_and_spread(batch["states"], batch["grid"], batch["question"])[1] for batch in (own, other)
    ]
    assert bool((predictor.drift(spreads[0]) <= predictor.drift_limit).all())
    assert bool((predictor.drift(spreads[1]) > predictor.drift_limit).all())


def test_the_targets_of_the_settings_decide_the_threshold(
    checkpoint: Path, batches: list[dict[str, Any]], tmp_path: Path
) -> None:
    every, none = (
        run(checkpoint, tmp_path / str(share), batches, settings=PredictorSettings(target_fallback=share))
        for share in (1.0, 0.0)
    )
    assert load_predictor(every.folder).threshold > 1.0
    assert load_predictor(none.folder).threshold == 0.0
    sure = PredictorSettings(target_fallback=None, target_fidelity=1.0)
    assert load_predictor(run(checkpoint, tmp_path / "sure", batches, settings=sure).folder).threshold > 1.0


def test_scores_that_are_not_finite_are_the_fits_fault(
    checkpoint: Path, batches: list[dict[str, Any]], tmp_path: Path
) -> None:
    batches[1]["states"][3, 7, 2] = float("nan")
    with pytest.raises(FitError, match=r"trainer\.learning_rate"):
        run(checkpoint, tmp_path / "predictor", batches)
    assert not (tmp_path / "predictor").exists()


def test_twice_gives_the_same_bytes(checkpoint: Path, batches: list[dict[str, Any]], tmp_path: Path) -> None:
    facts = Facts({"test/mass": 0.5}, {"data_fingerprint": "f"}, {"sentence": "No effect shown.", "reason": "Few."})
    first, second = (run(checkpoint, tmp_path / name / "predictor", batches, facts=facts).folder for name in "ab")
    names = ["README.md", "config.json", "golden.safetensors", "model.safetensors"]
    assert sorted(path.name for path in first.iterdir()) == names
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_nothing_of_this_machine_is_in_the_folder(
    checkpoint: Path, batches: list[dict[str, Any]], tmp_path: Path
) -> None:
    folder = run(checkpoint, tmp_path / "predictor", batches).folder
    mine = [str(tmp_path), str(Path.cwd()), str(Path.home()), socket.gethostname()]
    for file in folder.iterdir():
        content = file.read_bytes()
        assert not [place for place in mine if len(place) > 2 and place.encode() in content], file.name


@pytest.mark.new_process
def test_a_new_process_reads_it_too(
    checkpoint: Path, batches: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real one: it is called with what the checkpoint answers, and a refusal keeps the former folder."""
    folder = run(checkpoint, tmp_path / "predictor", batches).folder
    before = (folder / "config.json").read_bytes()

    def refuse(staged: Path, expected: Any) -> None:
        assert load_predictor(staged).info["metrics"] == {"test/mass": 0.9} and "scores" in expected
        raise ExportError("the new process answers otherwise")

    monkeypatch.setattr("export.package.check_fresh", refuse)
    with pytest.raises(ExportError, match="answers otherwise"):
        run(checkpoint, tmp_path / "predictor", batches, facts=Facts({"test/mass": 0.9}))
    assert (folder / "config.json").read_bytes() == before
