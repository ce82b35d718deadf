"""The command `python -m export`, which lives in pipeline/commands.py and pipeline/export.py."""

from importlib import import_module

if __name__ == "__main__":
    raise SystemExit(import_module("pipeline.commands").export())
