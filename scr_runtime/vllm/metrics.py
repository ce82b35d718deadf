"""The plug-in's counts as Prometheus counters, beside vLLM's own on /metrics."""

from __future__ import annotations

from typing import Any

from prometheus_client import Counter  # pyright: ignore[reportMissingImports]

from scr_runtime.vllm.editor import EngineStats

# At module level: a second engine in one process would register them twice.
_COUNTERS: dict[str, Any] = {
    "images": Counter("scr_images", "Images, or tiles of images, that the predictor chose sources for."),
    "edits": Counter("scr_edits", "Block outputs that were edited."),
    "switched_off": Counter("scr_switched_off", "Images of requests that asked for no edit."),
    "low_confidence": Counter("scr_low_confidence", "Images whose calibrated confidence is under the threshold."),
    "drifted": Counter("scr_drifted", "Images whose features are unlike those of the predictor's fit."),
    "not_finite": Counter("scr_not_finite", "Images whose scores were not finite; they are not edited."),
}
_LEFT_OUT: Any = Counter("scr_left_out", "Images that could not be edited.", ["reason"])


def publish(now: EngineStats, before: EngineStats) -> None:
    """Adds what has happened between two counts."""
    for name, counter in _COUNTERS.items():
        counter.inc(getattr(now, name) - getattr(before, name))
    for reason, count in now.left_out.items():
        _LEFT_OUT.labels(reason=reason).inc(count - before.left_out.get(reason, 0))
