"""The command `python -m evaluation`, which lives in pipeline/commands.py and pipeline/evaluate.py."""

from importlib import import_module

if __name__ == "__main__":
    raise SystemExit(import_module("pipeline.commands").evaluation())
