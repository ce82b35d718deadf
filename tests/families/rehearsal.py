"""The whole chain on a tiny model of each family with its real processor: `python -m tests.families.rehearsal`.

It prints a table of families and stages. Processors that hold one for videos (Qwen, OneVision, InternVL) need
torchvision: `python -m tests.families.rehearsal --torchvision FOLDER` installs it there, without the dependencies that
would bring another torch, unless the folder has it. On a CPU build of torch its operators can't be loaded; none is
called for images, so that two names are enough.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

VERSION = "0.28.0"  # of torchvision, for the torch of constraints.txt
STAGES = ("load", "harvest", "fit", "export", "figures", "modes")
MODES = ("two-pass", "one-pass", "auto", "uniform")
COUNTS = {"samples": 16, "validation": 8, "test": 8, "tuning": 0}  # images
SOURCES = "{source_fraction: 0.1, edit_layers: [0, 1], attention_layers: [1, 2]}"


_KEPT: list[Any] = []  # operators are forgotten with their library


def arguments(name: str, model: Path, photos: Path, runs: Path) -> list[str]:
    """Of train.py, for one family."""
    return [
        "model=llava-1.5-7b", f"model.name={name}", f"model.hub_id={model}", "model.dtype=float32", "model.device=cpu",
        f"model.scr={SOURCES}", "data=coco2014", f"data.root={photos}", f"runs_dir={runs}",
        *(f"harvest.{key}={count}" for key, count in COUNTS.items()), "harvest.states_dtype=float32",
        "harvest.shard_size=8", "harvest.batch_size=8", "trainer.max_epochs=2", "trainer.accelerator=cpu",
        "evaluation.images=0", "evaluation.bootstrap=50",
    ]  # fmt: skip


def run_chain(name: str, model: Path, photos: Path, runs: Path) -> tuple[int, str]:
    """Runs train.py in this process; returns its exit code and what it printed."""
    import train

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = train.main(arguments(name, model, photos, runs))
    return code, printed.getvalue()


def check_modes(name: str, model: Path, photos: Path, runs: Path) -> None:
    """Asks about a photo of each shape in one batch, in every mode; the reports name row, grid and K sources."""
    import torch
    from PIL import Image

    import scr_runtime
    from data.chat import chat_inputs
    from data.pictures import PictureGrids
    from data.settings import VLMSettings
    from data.vlm import load_vlm
    from scr_runtime.rule import source_rule
    from tests.families.photos import SHAPES, name_of

    vlm, processor = load_vlm(VLMSettings(hub_id=str(model), device="cpu", dtype="float32"))
    pictures = [Image.open(photos / "train2014" / name_of(number)) for number in range(len(SHAPES))]
    inputs = chat_inputs(
        processor, pictures, ["Describe the image .", "Is there a cup ?", "cup", "a bus in the image"]
    )
    table = PictureGrids(vlm, processor)
    expected = [grid for picture in pictures for grid in table.of(picture)]
    with torch.no_grad():
        plain = vlm(**inputs).logits[:, -1]
        for mode in MODES:
            with scr_runtime.SCR(vlm, predictor=runs / "predictors" / name, mode=mode, processor=processor) as scr:
                edited = vlm(**inputs).logits[:, -1]
            assert [report.grid for report in scr.reports] == expected, (mode, scr.reports)
            for report in scr.reports:
                assert len(set(report.sources)) == source_rule(scr.config, report.grid).k, (mode, report)
            assert ((edited - plain).abs().amax(-1) > 0).all(), mode


def rehearse(name: str, folder: Path) -> dict[str, str]:
    """Each stage of a family: ok, a dash where it was not reached, or what went wrong."""
    from tests.families.models import save_model
    from tests.families.photos import write_photos

    photos, runs = folder / "photos", folder / "runs"
    if not photos.is_dir():
        write_photos(photos, sum(COUNTS.values()))
    model = save_model(name, folder / "models" / name)
    started = time.perf_counter()
    code, printed = run_chain(name, model, photos, runs)
    reached = sum(f"[{number}/5]" in printed for number in range(1, 5))
    stages = dict.fromkeys(STAGES[:reached], "ok")
    if code:
        failed = printed.strip().splitlines()[-1]
        stages[STAGES[reached - 1]] = f"FAILS: {failed}"
    else:
        stages["figures"] = "ok" if list(runs.glob(f"fits/{name}/latest/reports/maps.png")) else "FAILS"
        check_modes(name, model, photos, runs)
        stages["modes"] = "ok"
    return {**dict.fromkeys(STAGES, "-"), **stages, "seconds": f"{time.perf_counter() - started:.0f}"}


def use_torchvision(folder: Path) -> None:
    """Installs torchvision into a folder of its own, and makes it importable beside a CPU build of torch."""
    if not (folder / "torchvision").is_dir():
        command = ["pip", "install", "--quiet", "--no-deps", "--target", str(folder), f"torchvision=={VERSION}"]
        subprocess.run(command, check=True)
    sys.path.append(str(folder))
    import torch

    library: Any = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):  # where its own operators could be loaded
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401  # pyright: ignore[reportMissingImports]

    _KEPT.append(library)


def main() -> int:
    """Rehearses the families and prints the table; 1 if one fails."""
    parser = argparse.ArgumentParser(description="Runs the chain on a tiny model of each family.")
    parser.add_argument("names", nargs="*", help="families (default: all that can be loaded)")
    parser.add_argument("--torchvision", type=Path, metavar="FOLDER", help="where torchvision is, or is installed")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if options.torchvision:
        use_torchvision(options.torchvision)
    from tests.families.models import PLAIN, WITH_VIDEOS

    names = options.names or [*PLAIN, *(WITH_VIDEOS if options.torchvision else ())]
    print(f"| family | {' | '.join(STAGES)} | s |\n|{'---|' * (len(STAGES) + 2)}", flush=True)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            try:
                stages = rehearse(name, Path(folder))
            except Exception as error:  # the table shows all families
                stages = dict.fromkeys(STAGES, "?") | {"modes": f"FAILS: {type(error).__name__}: {error}"[:300]}
            print(f"| {name} | {' | '.join(stages.values())} |", flush=True)
            failed |= any(stage != "ok" for stage in list(stages.values())[: len(STAGES)])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
