"""Statistics add up, survive a reset and print as a table."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest

from specmoe_compile.runtime.cache.statistics import LayerStats, Stats
from tests.runtime.fakes import L, token_batch
from tests.runtime.test_session import make_session


def some_stats() -> Stats:
    layers = (
        LayerStats(steps=2, hits=3, misses=1, demand_bytes=1 << 20, stall_ms=2.0),
        LayerStats(
            steps=2,
            hits=1,
            misses=3,
            demand_bytes=3 << 20,
            stall_ms=3.0,
            needed=4,
            recalled=3,
            speculative_bytes=2 << 20,
            useful_speculative_bytes=1 << 20,
        ),
    )
    return Stats(
        layers=layers,
        fast_tier_bytes=8 << 20,
        store_bytes=64 << 20,
        store="disk",
        read_busy_ms=10.0,
        experts="int4, groups of 32",
        record_bytes=1 << 20,
    )


def test_total_is_the_sum_of_the_layers() -> None:
    stats = some_stats()
    for item in fields(LayerStats):
        values = [getattr(layer, item.name) for layer in stats.layers]
        assert getattr(stats.total, item.name) == sum(values)
    assert stats.total.hit_rate == 0.5
    assert stats.total.recall == 0.75


def test_ratios_of_nothing_are_zero() -> None:
    stats = Stats(
        layers=(LayerStats(),), fast_tier_bytes=0, store_bytes=0, store="ram", read_busy_ms=0.0
    )
    assert (stats.total.hit_rate, stats.total.recall, stats.overlap, stats.read_gbps) == (
        0,
        0,
        0,
        0,
    )


def test_overlap_is_reading_time_that_nobody_waited_for() -> None:
    stats = some_stats()
    assert stats.overlap == 0.5
    assert stats.read_gbps == (6 << 20) / 10e6


def test_dictionary_is_plain_and_complete() -> None:
    values = json.loads(json.dumps(some_stats().as_dict()))
    assert {item.name for item in fields(LayerStats)} <= set(values)
    assert len(values["layers"]) == 2
    assert values["hits"] == 4
    assert values["layers"][1]["recall"] == 0.75


def test_table_has_a_row_per_layer_and_a_total() -> None:
    lines = str(some_stats()).splitlines()
    assert lines[0].split()[0] == "layer"
    assert [line.split()[0] for line in lines[2:5]] == ["0", "1", "total"]
    assert "4.0 MiB" in lines[4]
    assert "50 % of it overlapped" in lines[5]
    # 6 MiB in 10 ms, and a record is one of them
    assert lines[6] == "experts: int4, groups of 32, 1.0 MiB each; a fetch costs 1.67 ms"
    assert some_stats().fetch_ms == pytest.approx(10 / 6)
    small = replace(some_stats(), record_bytes=48 << 10)
    assert "48.0 KiB each" in str(small), "not none"


def test_snapshot_does_not_change_and_reset_forgets() -> None:
    with make_session("half") as session:
        session.experts(0, *token_batch(0, 1))
        before = session.stats
        session.experts(0, *token_batch(1, 1))
        assert before.total.steps == 1
        assert session.stats.total.steps == 2
        session.reset_stats()
        assert session.stats.layers == (LayerStats(),) * L
        assert session.stats.read_busy_ms < before.read_busy_ms
        session.experts(0, *token_batch(1, 1))
        assert session.stats.total.misses == 0, "a reset keeps the cache"
