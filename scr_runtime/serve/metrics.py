"""What an operator watches, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from scr_runtime.serve.engine import Answer
from scr_runtime.sources import FALLBACKS, ONE_PASS, ONLINE, TWO_PASS, UNIFORM

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Metrics:
    """Counts of one server, in a registry of its own.

    Args:
        queue_length: Requests that wait for the model, now.
        ready: Whether requests are taken, now.
    """

    def __init__(self, queue_length: Callable[[], float], ready: Callable[[], float]) -> None:
        self._registry = at = CollectorRegistry()
        self.requests = Counter(
            "scr_requests", "Requests by HTTP status; 499: the client went away", ["status"], registry=at
        )
        self.refused = Counter("scr_refused", "Requests that were refused, by code", ["code"], registry=at)
        self._images = Counter("scr_images", "Images by who chose their sources", ["provider"], registry=at)
        self._fallbacks = Counter(
            "scr_fallbacks", "Images that fell back to two-pass, by reason", ["reason"], registry=at
        )
        self._drifted = Counter("scr_drifted_images", "Images over the predictor's drift limit", registry=at)
        self._drift = Histogram(
            "scr_drift", "Drift of each image", registry=at, buckets=(1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 5, 10)
        )
        self._confidence = Histogram(
            "scr_confidence", "Confidence of each image", registry=at, buckets=[tenth / 10 for tenth in range(1, 11)]
        )
        self._prefill = Histogram(
            "scr_prefill_seconds",
            "Seconds to the first token, without the queue",
            ["mode"],
            registry=at,
            buckets=_SECONDS,
        )
        self._waited = Histogram("scr_queue_seconds", "Seconds in the queue", registry=at, buckets=_SECONDS)
        self._tokens = Counter("scr_tokens", "Tokens", ["kind"], registry=at)
        Gauge("scr_queue_length", "Requests that wait for the model", registry=at).set_function(queue_length)
        Gauge("scr_ready", "1 if requests are taken", registry=at).set_function(ready)
        for name in (ONE_PASS, TWO_PASS, ONLINE, UNIFORM):
            self._images.labels(name)
        for name in FALLBACKS:
            self._fallbacks.labels(name)

    def add(self, answer: Answer, waited: float) -> None:
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
            if report.confidence is not None:
                self._confidence.observe(report.confidence)
        self._prefill.labels(answer.mode if answer.has_images else "text").observe(answer.prefill_seconds)
        self._waited.observe(waited)
        self._tokens.labels("prompt").inc(answer.prompt_tokens)
        self._tokens.labels("completion").inc(answer.completion_tokens)

    def text(self) -> bytes:
        """Prometheus's text format."""
        return generate_latest(self._registry)
