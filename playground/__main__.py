"""The command `python -m playground`, which lives in pipeline/commands.py and pipeline/playground.py."""

from importlib import import_module

if __name__ == "__main__":
    raise SystemExit(import_module("pipeline.commands").playground())
