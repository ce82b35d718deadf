"""One-pass Spatial Credit Redistribution (arXiv 2602.22469) for vision-language models."""

from scr_runtime import errors
from scr_runtime.artifact import load_predictor, save_predictor
from scr_runtime.capture import Capture, capture
from scr_runtime.config import SCRConfig
from scr_runtime.families import describe_model
from scr_runtime.network import PredictorConfig, SourcePredictor
from scr_runtime.runtime import SCR, ImageReport
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
