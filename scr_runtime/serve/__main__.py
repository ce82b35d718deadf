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
        from scr_runtime.serve import settings as given

        if {"--help", "-h"} & set(arguments):
            try:
                print(given.help_text(), flush=True)
            except BrokenPipeError:  # `--help | head`
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        try:
            settings = given.parse(arguments)
        except given.SettingsError as error:
            print(error, file=sys.stderr)
            return 2
        words = f"model {settings.model}, predictor {settings.predictor}, mode {settings.default_mode}"
        print(f"{given.PROGRAM}: {words}", flush=True)
        from scr_runtime.serve.process import run
    except ImportError as error:
        print(f"the server needs what is not installed: pip install 'scr-runtime[serve]' ({error})", file=sys.stderr)
        return 2
    return run(settings)


if __name__ == "__main__":
    raise SystemExit(main())
