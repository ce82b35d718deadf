"""One-pass Spatial Credit Redistribution (arXiv 2602.22469) for vision-language models.

Names are loaded at first use, so that settings and errors cost no import of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from scr_runtime import errors
from scr_runtime.config import PredictorConfig, SCRConfig

if TYPE_CHECKING:
    __version__: str

    from scr_runtime.artifact import load_predictor, save_predictor
    from scr_runtime.identity import describe_model
    from scr_runtime.maps import Capture, capture
    from scr_runtime.network import SourcePredictor
    from scr_runtime.reports import ImageReport
    from scr_runtime.runtime import SCR
    from scr_runtime.session import ImageSession
    from scr_runtime.stats import SCRStats

__all__ = [
    "SCR",
    "Capture",
    "ImageReport",
    "ImageSession",
    "PredictorConfig",
    "SCRConfig",
    "SCRStats",
    "SourcePredictor",
    "capture",
    "describe_model",
    "errors",
    "load_predictor",
    "save_predictor",
]

_HOMES = {
    "SCR": "runtime",
    "Capture": "maps",
    "ImageReport": "reports",
    "ImageSession": "session",
    "SCRStats": "stats",
    "SourcePredictor": "network",
    "capture": "maps",
    "describe_model": "identity",
    "load_predictor": "artifact",
    "save_predictor": "artifact",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("scr-runtime")
    except PackageNotFoundError:  # a folder on the path, not an installed package
        return "0+unknown"


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
