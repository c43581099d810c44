"""Times of tokens are counted once, whoever asks, and are there for who asks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("prometheus_client")

from specmoe_compile.serve.metrics import Metrics


def _value(metrics: Metrics, name: str) -> float:
    lines = metrics.text(0).decode().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(name + " ")))


def test_a_token_is_counted_when_somebody_asks() -> None:
    metrics = Metrics()
    metrics.on_first_token(2.0)
    metrics.on_token(0.25)
    metrics.on_token(0.5)
    assert _value(metrics, "specmoe_completion_tokens_total") == 3
    assert _value(metrics, "specmoe_time_to_first_token_seconds_sum") == 2.0
    assert _value(metrics, "specmoe_time_per_token_seconds_sum") == 0.75
    assert _value(metrics, "specmoe_time_per_token_seconds_count") == 2


def test_threads_that_count_at_once_count_each_token_once() -> None:
    metrics = Metrics()

    def work(worker: int) -> None:
        for _ in range(500):
            metrics.on_token(1.0)
            metrics.count()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert _value(metrics, "specmoe_completion_tokens_total") == 2000
    assert _value(metrics, "specmoe_time_per_token_seconds_sum") == 2000.0
