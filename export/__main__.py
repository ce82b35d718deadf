"""The command `python -m export`, which lives in pipeline/export.py."""

from importlib import import_module

if __name__ == "__main__":
    raise SystemExit(import_module("pipeline.export").main())
