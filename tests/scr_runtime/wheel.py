"""Environments of their own, with the wheel in them and without the project on the path."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_NOT_THE_WHEEL = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__", "docs", "tests")


def run(command: Sequence[str | Path], **kwargs: object) -> str:
    """Runs a command and returns what it prints; its own words end a failure."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=900, **kwargs)  # type: ignore[call-overload]
    if done.returncode != 0:
        raise RuntimeError(f"{command}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    return str(done.stdout)


def build_wheel(place: Path) -> Path:
    """Builds the wheel from a copy of the sources, with the setuptools that is installed."""
    source = shutil.copytree(ROOT, place / "source", ignore=_NOT_THE_WHEEL)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", place / "dist", source]
    run(command)
    (wheel,) = (place / "dist").glob("scr_runtime-*.whl")
    return wheel


def make_environment(place: Path, wheel: Path, *packages: str) -> Path:
    """Makes an environment with the wheel and other packages; all else comes from the one that runs this.

    A path file adds that one's packages behind the new ones, without its own path files: an editable install of the
    project there is not seen.

    Returns:
        Its Python.
    """
    run([sys.executable, "-m", "venv", "--without-pip", place])
    python = place / "bin" / "python"
    (own,) = (place / "lib").glob("python3.*/site-packages")
    (own / "behind.pth").write_text(f"{_packages()}\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "install", "--quiet"]
    run([*pip, "--no-deps", "--no-index", wheel])
    if packages:
        run([*pip, *packages])
    return python


def _packages() -> Path:
    import torch

    return Path(torch.__file__).parents[1]
