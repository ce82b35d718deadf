"""Reads a predictor folder in a new process that has the runtime's own dependencies and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from export.errors import ExportError

_ROOT = Path(__file__).resolve().parents[1]
_CHILD = Path(__file__).with_name("fresh_child.py")
_SECONDS = 300


def check_fresh(folder: Path, expected: Mapping[str, Tensor], root: Path = _ROOT) -> None:
    """Compares the answers to the golden inputs, bit for bit.

    Args:
        folder: A predictor folder.
        expected: ``scr_runtime.golden.golden_outputs`` of the predictor that it was made from.
        root: Where ``scr_runtime`` lies.

    Raises:
        ExportError: If the new process can't read the folder, or answers differ.
    """
    threads = str(torch.get_num_threads())  # sums depend on it
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    with tempfile.TemporaryDirectory() as place:
        answers = Path(place) / "answers.safetensors"
        command = [sys.executable, "-I", str(_CHILD), str(root), str(folder.absolute()), str(answers)]
        run = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=_SECONDS)
        if run.returncode != 0:
            raise ExportError(
                f"{folder}: a new process with the runtime's dependencies alone can't use it: "
                f"{run.stderr.strip()[-1000:]}"
            )
        found = load_file(answers)
    for name, value in expected.items():
        if not torch.equal(found[name], value):
            worst = (found[name].double() - value.double()).abs().max()
            raise ExportError(
                f"{folder}: {name} of the golden inputs differ by up to {worst:.3g} between the checkpoint and a new "
                "process that has read the folder"
            )
