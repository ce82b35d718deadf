"""The entry point, as far as it goes without vLLM."""

from __future__ import annotations

import importlib
import sys
import tomllib
from pathlib import Path

import pytest

from scr_runtime.errors import ConfigurationError
from scr_runtime.vllm.plugin import register

ROOT = Path(__file__).parents[3]


def test_vllm_finds_the_entry_point() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["scr"].partition(":")
    assert getattr(importlib.import_module(module), name) is register


def test_without_the_variable_it_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SCR_PREDICTOR", raising=False)
    before = set(sys.modules)
    register()
    assert set(sys.modules) == before


def test_a_mistake_in_the_environment_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCR_PREDICTOR", "somewhere")
    monkeypatch.setenv("SCR_ON_LOW_CONFIDENCE", "drop")
    with pytest.raises(ConfigurationError, match="SCR_ON_LOW_CONFIDENCE='drop'"):
        register()
