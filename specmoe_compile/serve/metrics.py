"""What `/metrics` tells Prometheus."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
_FIRST_SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        given: dict[str, Any] = {"registry": self._registry}
        self.requests = Counter(
            "specmoe_requests", "Requests answered.", ("endpoint", "status"), **given
        )
        self.prompt_tokens = Counter("specmoe_prompt_tokens", "Tokens of prompts.", **given)
        self.cached_tokens = Counter(
            "specmoe_cached_prompt_tokens", "Tokens of prompts that were not read again.", **given
        )
        self.tokens = Counter("specmoe_completion_tokens", "Tokens generated.", **given)
        self._token_seconds = Histogram(
            "specmoe_time_per_token_seconds",
            "Time between one token and the next.",
            buckets=_TOKEN_SECONDS,
            **given,
        )
        self._first_seconds = Histogram(
            "specmoe_time_to_first_token_seconds",
            "From the start of a generation to its first token, waiting left out.",
            buckets=_FIRST_SECONDS,
            **given,
        )
        self._queue = Gauge("specmoe_queue_length", "Requests that wait.", **given)
        self._hit_rate = Gauge(
            "specmoe_expert_hit_rate", "Share of the needed experts in the fast tier.", **given
        )
        self._missed = Gauge(
            "specmoe_expert_missed_bytes", "Bytes of experts fetched on demand so far.", **given
        )

    def on_token(self, seconds: float, *, first: bool) -> None:
        """Count one token."""
        self.tokens.inc()
        (self._first_seconds if first else self._token_seconds).observe(seconds)

    def note_stats(self, stats: Any) -> None:
        """Take `specmoe_compile.stats` of the model."""
        self._hit_rate.set(stats.total.hit_rate)
        self._missed.set(stats.total.demand_bytes)

    def text(self, queue_length: int) -> bytes:
        """Everything, in Prometheus' text format."""
        self._queue.set(queue_length)
        return generate_latest(self._registry)
