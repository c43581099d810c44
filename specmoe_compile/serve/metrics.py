"""What `/metrics` tells Prometheus."""

from __future__ import annotations

import contextlib
from collections import deque
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
_FIRST_SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Counters of one server, in a registry of their own.

    Times come while the model decodes and are counted when somebody asks, at the latest after each
    job: until then they wait in a queue, which any thread may fill and empty.

    Attributes:
        on_first_token: takes the seconds of an answer's first token.
        on_token: takes the seconds of each other token.
    """

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
        self._uncounted: list[tuple[deque[float], Histogram]] = [
            (deque(), self._first_seconds),
            (deque(), self._token_seconds),
        ]
        self.on_first_token, self.on_token = (seconds.append for seconds, _ in self._uncounted)
        self._queue = Gauge("specmoe_queue_length", "Requests that wait.", **given)
        self._hit_rate = Gauge(
            "specmoe_expert_hit_rate", "Share of the needed experts in the fast tier.", **given
        )
        self._missed = Gauge(
            "specmoe_expert_missed_bytes", "Bytes of experts fetched on demand so far.", **given
        )

    def count(self) -> None:
        """Count the tokens that wait."""
        for waiting, histogram in self._uncounted:
            for _ in range(len(waiting)):
                with contextlib.suppress(IndexError):  # another thread counted it
                    histogram.observe(waiting.popleft())
                    self.tokens.inc()

    def note_stats(self, stats: Any) -> None:
        """Take `specmoe_compile.stats` of the model after a job."""
        self.count()
        self._hit_rate.set(stats.total.hit_rate)
        self._missed.set(stats.total.demand_bytes)

    def text(self, queue_length: int) -> bytes:
        """Everything, in Prometheus' text format."""
        self.count()
        self._queue.set(queue_length)
        return generate_latest(self._registry)
