from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from data import inspect
from data.folder import HarvestSummary
from data.images import CocoImages


def test_an_unfinished_harvest_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert inspect.main(["verify", str(tmp_path)]) == 2
    assert "no finished harvest" in capsys.readouterr().err


def test_a_missing_manifest_is_reported(undisturbed: Path, capsys: pytest.CaptureFixture[str]):
    (undisturbed / "manifest.json").unlink()
    assert inspect.main(["verify", str(undisturbed)]) == 1
    assert "manifest.json is missing or was changed. Run the harvest again" in capsys.readouterr().out


def test_show_prints_a_summary_and_draws_maps_over_images(
    tmp_path: Path, coco: CocoImages, run_harvest: Callable[..., HarvestSummary], capsys: pytest.CaptureFixture[str]
):
    run_harvest(tmp_path, coco)
    assert inspect.main(["verify", str(tmp_path)]) == 0
    assert inspect.main(["show", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "train: 20 images, 40 maps" in shown and "states (16, 16) float16, grids 4 x 4" in shown
    assert (tmp_path / "contact-sheet.png").stat().st_size > 1000
    assert inspect.main(["show", str(tmp_path), "--images", str(tmp_path / "nowhere")]) == 0
    assert "no contact sheet" in capsys.readouterr().out
