"""The new process of ``check_fresh``. Run as a script: fresh_child.py ROOT FOLDER ANSWERS, with ``python -I``.

Of all that is installed it can import the packages below, what those require, and scr_runtime.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Sequence
from importlib.machinery import BuiltinImporter, FrozenImporter, ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

DEPENDENCIES = ("torch", "transformers", "safetensors")


def importable() -> set[str]:
    """Top-level names of the dependencies, and of all that they require."""
    known: set[str] = set()
    queue = list(DEPENDENCIES)
    while queue:
        name = _normal(queue.pop())
        if name in known:
            continue
        known.add(name)
        try:
            required = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform
        queue += [re.split(r"[^\w.-]", one, maxsplit=1)[0] for one in required if "extra ==" not in one]
    homes = importlib.metadata.packages_distributions()
    return {package for package, names in homes.items() if known & {_normal(name) for name in names}}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


class OnlyThese(PathFinder):
    """Finds a package only if it is among `names`; others are not there."""

    names: frozenset[str] = frozenset()

    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """As PathFinder's."""
        allowed = path is not None or fullname in cls.names
        return super().find_spec(fullname, path, target) if allowed else None


def main(root: str, folder: str, answers: str) -> None:
    """Loads, verifies, answers the golden inputs once more, and writes the answers."""
    OnlyThese.names = frozenset({*sys.stdlib_module_names, *importable(), "scr_runtime"})
    sys.meta_path[:] = [BuiltinImporter, FrozenImporter, OnlyThese]
    sys.path.insert(0, root)
    from safetensors.torch import load_file, save_file

    from scr_runtime import SCRConfig, load_predictor
    from scr_runtime.golden import golden_outputs

    predictor = load_predictor(folder, verify=True)
    inputs = load_file(Path(folder) / "golden.safetensors")
    save_file(golden_outputs(predictor, inputs, SCRConfig.from_dict(predictor.info["scr"])), answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
