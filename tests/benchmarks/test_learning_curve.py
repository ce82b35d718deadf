from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.learning_curve import fit, main, predict


def write(folder: Path, images: int, seed: int, experiment: str, recall: float) -> None:
    child = folder / f"{experiment}-{images}-{seed}"
    (child / "predictor").mkdir(parents=True)
    (child / "reports").mkdir()
    (child / "predictor/config.json").write_text(json.dumps({"metrics": {"test/recall": recall}}))
    (child / "reports/config.yaml").write_text(
        f"tracking: {{experiment: {experiment}}}\ntrainer: {{train_images: {images}}}\nharvest: {{samples: 4000}}\n"
    )


def test_the_curve_is_found_again_and_predicts() -> None:
    points = {images: [0.9 - 2 * images**-0.5] for images in (250, 500, 1000, 2000, 4000)}
    curve = fit(points)
    assert curve[2] == pytest.approx(0.5, abs=0.03)
    assert predict(curve, 16_000) == pytest.approx(0.9 - 2 * 16_000**-0.5, abs=0.003)


def test_it_reads_the_children_of_one_experiment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for images in (250, 500, 1000, 2000):
        for seed in (0, 1):
            write(tmp_path, images, seed, "learning-curve", 0.9 - 2 * images**-0.5 + 0.002 * seed)
    write(tmp_path, 4000, 0, "other", 0.1)
    main([str(tmp_path), "--out", str(tmp_path / "curve.png")])
    said = capsys.readouterr().out
    assert "   250      2  0.7745 (0.7735 to 0.7755)" in said and "4,000" not in said
    assert (tmp_path / "curve.png").stat().st_size > 10_000
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--experiment", "other"])
    assert "at 1 numbers of images; 4 are needed" in capsys.readouterr().err
