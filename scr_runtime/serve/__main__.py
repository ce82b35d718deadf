"""The command `python -m scr_runtime.serve key=value ...`; `--help` lists the keys."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until SIGTERM or Ctrl-C; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch starts
    try:
        from scr_runtime.serve.settings import PROGRAM, SettingsError, help_text, parse

        if {"--help", "-h"} & set(arguments):
            print(help_text())
            return 0
        settings = parse(arguments)
        print(
            f"{PROGRAM}: model {settings.model}, predictor {settings.predictor}, mode {settings.default_mode}",
            flush=True,
        )
        from scr_runtime.serve.process import run
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"the server needs packages that are not installed ({error}): pip install 'scr-runtime[serve]'")
        return 2
    return run(settings)


if __name__ == "__main__":
    raise SystemExit(main())
