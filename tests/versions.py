"""Runs the runtime's tests with other versions of transformers, each in an environment of its own.

python -m tests.versions                                the oldest that pyproject.toml allows, and the newest
python -m tests.versions transformers==5.18.0 -- -k wrappers

An environment has the wheel, that transformers and what it needs; torch and the rest come from the one that runs this.
Behind `--` are arguments of pytest; without them, the tests below.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

from tests.scr_runtime.wheel import ROOT, build_wheel, make_environment, run

TESTS = ("runtime", "families", "generate", "session", "artifact", "places", "load")


def supported() -> list[str]:
    """The oldest transformers that pyproject.toml allows, and the newest."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (asked,) = (one for one in dependencies if one.startswith("transformers"))
    oldest = re.search(r">=([\d.]+)", asked)
    assert oldest is not None
    return [f"transformers=={oldest[1]}.*", asked]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints one line for each version; returns 1 if a test failed."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    if {"-h", "--help"} & set(arguments[:cut]):
        print(__doc__)
        return 0
    versions, chosen = arguments[:cut] or supported(), arguments[cut + 1 :]
    chosen = chosen or [f"tests/scr_runtime/test_{name}.py" for name in TESTS]
    failed = 0
    with tempfile.TemporaryDirectory() as text:
        place = Path(text)
        wheel = build_wheel(place)
        for number, version in enumerate(versions):
            python = make_environment(place / str(number), wheel, "--upgrade", version)
            found = run([python, "-c", "import transformers; print(transformers.__version__)"]).strip()
            tests = subprocess.run([python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen], cwd=ROOT)
            failed += tests.returncode != 0
            print(f"transformers {found}: {'ok' if tests.returncode == 0 else 'FAILED'}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
