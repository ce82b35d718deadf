"""What an operator watches, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from scr_runtime.serve.engine import Answer
from scr_runtime.sources import FALLBACKS, ONE_PASS, ONLINE, TWO_PASS, UNIFORM

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_DRIFT = (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 5, 10)


class Metrics:
    """Counts of one server, in a registry of its own.

    Args:
        queue_length: Requests that wait for the model, now.
    """

    def __init__(self, queue_length: Callable[[], float]) -> None:
        self._registry = at = CollectorRegistry()
        self.requests = Counter("scr_requests", "Requests by status; 499: the client left", ["status"], registry=at)
        self.refused = Counter("scr_refused", "Requests without an answer, by code", ["code"], registry=at)
        self._images = Counter("scr_images", "Images by who chose their sources", ["provider"], registry=at)
        self._fallbacks = Counter("scr_fallbacks", "Images that fell back to two-pass", ["reason"], registry=at)
        self._drifted = Counter("scr_drifted_images", "Images over the predictor's drift limit", registry=at)
        self._drift = Histogram("scr_drift", "Drift of each image", registry=at, buckets=_DRIFT)
        self._prefill = Histogram(
            "scr_prefill_seconds", "To the first token, without the queue", ["mode"], registry=at, buckets=_SECONDS
        )
        Gauge("scr_queue_length", "Requests that wait for the model", registry=at).set_function(queue_length)
        for name in (ONE_PASS, TWO_PASS, ONLINE, UNIFORM):
            self._images.labels(name)
        for name in FALLBACKS:
            self._fallbacks.labels(name)

    def add(self, answer: Answer) -> None:
        """Adds what was done for one request."""
        stats = answer.stats
        counts = {ONE_PASS: stats.one_pass, TWO_PASS: stats.two_pass, ONLINE: stats.online, UNIFORM: stats.uniform}
        for name, count in counts.items():
            self._images.labels(name).inc(count)
        for name, count in stats.fallbacks.items():
            self._fallbacks.labels(name).inc(count)
        self._drifted.inc(stats.drifted)
        for report in answer.reports:
            if report.drift is not None:
                self._drift.observe(report.drift)
        self._prefill.labels(answer.mode if answer.has_images else "text").observe(answer.prefill_seconds)

    def text(self) -> bytes:
        """Prometheus's text format."""
        return generate_latest(self._registry)
