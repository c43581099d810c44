"""The JSON of `specmoe bench`: its keys, its hashes and its quantiles."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from specmoe_compile.bench.counters import CounterLaps, add_counters
from specmoe_compile.bench.records import ArmRun, arm_record, spread, tokens_sha256
from specmoe_compile.cli.tables import (
    BENCH_HEAD,
    bench_rows,
    count_differing,
    markdown_table,
    print_bench,
)
from specmoe_compile.runtime.cache.statistics import LayerStats, Stats
from specmoe_compile.system.output import write_json

SCHEMA_KEYS = {
    "name",
    "policy",
    "tpot_ms",
    "ttft_ms",
    "tokens_sha256",
    "hit_rate",
    "demand_bytes",
    "speculative_bytes",
    "stall_ms",
    "peak_rss_bytes",
    "fast_tier_bytes",
    "memory_cap_bytes",
}


def stats_of(*layers: LayerStats, busy_ms: float = 0.0) -> Stats:
    return Stats(
        layers=layers, fast_tier_bytes=0, store_bytes=0, store="disk", read_busy_ms=busy_ms
    )


def counters(*, busy_ms: float = 0.0, **values: float) -> dict[str, Any]:
    readings = [stats_of(LayerStats()), stats_of(LayerStats(**values), busy_ms=busy_ms)]
    return CounterLaps(iter(readings).__next__).lap()


def run_of(**changes: Any) -> ArmRun:
    values: dict[str, Any] = {
        "arm": "cache",
        "policy": "exact",
        "tpot_samples_ms": [1.0, 2.0, 3.0],
        "ttft_samples_ms": [10.0],
        "tokens": [[1, 2, 3, 4]],
        "decode": counters(
            hits=3, misses=1, demand_bytes=2_000_000, stall_ms=1.0, steps=4, busy_ms=2.0
        ),
        "prefill": counters(misses=2, demand_bytes=500),
        "fast_tier_bytes": 100,
        "load_s": 1.0,
        "compile_s": 2.0,
        "first_token_s": 3.0,
        "peak_rss_bytes": 1000,
        "load_peak_rss_bytes": 900,
        "children_peak_rss_bytes": 10,
        "peak_cuda_bytes": None,
        "compiled_graphs": 2,
        "threads": 1,
        "notes": [],
    }
    return ArmRun(**{**values, **changes})


def test_quantiles_fall_between_samples() -> None:
    assert spread([7.0]) == {"p20": 7.0, "p50": 7.0, "p80": 7.0}
    assert spread([3.0, 1.0, 2.0])["p50"] == 2.0
    assert spread([0.0, 10.0]) == {"p20": 2.0, "p50": 5.0, "p80": 8.0}
    with pytest.raises(ValueError, match="no samples"):
        spread([])


def test_token_hash_is_over_lengths_and_ids() -> None:
    expected = hashlib.sha256(struct.pack("<5q", 2, 5, 6, 1, 7)).hexdigest()
    assert tokens_sha256([[5, 6], [7]]) == expected
    assert tokens_sha256([[5], [6, 7]]) != expected


def test_record_has_the_keys_of_the_schema_and_pools_repeats() -> None:
    runs = [run_of(), run_of(tpot_samples_ms=[4.0, 5.0], peak_rss_bytes=2000)]
    record = arm_record("cache", runs, memory_cap_bytes=700, cgroup_peaks_bytes=[600, None])
    assert record.keys() >= SCHEMA_KEYS
    assert record["tpot_ms"]["p50"] == 3.0
    assert record["samples"] == 5
    assert record["hit_rate"] == 0.75
    assert record["demand_bytes"] == 4_000_000
    assert record["prefill_demand_bytes"] == 1000
    assert record["read_gbps"] == pytest.approx(1.0)
    assert record["peak_rss_bytes"] == 2000
    assert (record["memory_cap_bytes"], record["cgroup_peak_bytes"]) == (700, 600)
    json.dumps(record, allow_nan=False)


def test_record_without_a_session_has_nulls() -> None:
    record = arm_record("eager", [run_of(decode=None, prefill=None)], memory_cap_bytes=None)
    for key in ("hit_rate", "demand_bytes", "speculative_bytes", "stall_ms", "read_gbps"):
        assert record[key] is None


def test_record_of_repeats_that_disagree_has_no_hash() -> None:
    record = arm_record("cache", [run_of(), run_of(tokens=[[9]])], memory_cap_bytes=None)
    assert record["tokens_sha256"] is None


def test_laps_split_counters_without_resetting_them() -> None:
    readings = iter(
        [
            stats_of(LayerStats(hits=1), LayerStats(misses=2), busy_ms=1.0),
            stats_of(LayerStats(hits=4), LayerStats(misses=2), busy_ms=3.0),
            stats_of(LayerStats(hits=5), LayerStats(misses=7), busy_ms=4.0),
        ]
    )
    laps = CounterLaps(readings.__next__)
    first, second = laps.lap(), laps.lap()
    assert (first["total"]["hits"], first["total"]["misses"], first["read_busy_ms"]) == (3, 0, 2.0)
    assert [layer["misses"] for layer in second["layers"]] == [0, 5]
    total = add_counters(add_counters(None, first), second)
    assert (total["total"]["hits"], total["total"]["misses"], total["read_busy_ms"]) == (4, 5, 3.0)


def test_rows_compare_speed_with_the_first_arm_and_tokens_with_eager() -> None:
    slow = arm_record(
        "accelerate",
        [run_of(tpot_samples_ms=[20.0], decode=None, tokens=[[1, 2]])],
        memory_cap_bytes=1 << 20,
    )
    fast = arm_record("cache", [run_of(tokens=[[1, 9, 3, 4]])], memory_cap_bytes=None)
    eager = arm_record("eager", [run_of(decode=None)], memory_cap_bytes=None)
    rows = [dict(zip(BENCH_HEAD, row, strict=True)) for row in bench_rows([slow, fast, eager])]
    assert [row["speed"] for row in rows] == ["1.00x", "10.00x", "10.00x"]
    assert [row["tokens"] for row in rows] == ["same (2)", "1 differ", "reference"]
    assert [row["hits"] for row in rows] == ["-", "75.0 %", "-"]
    assert [row["cap"] for row in rows] == ["1.0 MiB", "-", "-"]
    # 2 MB of demand over the three steps after the first token
    assert rows[1]["read/token"] == "651.0 KiB"


def test_a_table_of_many_arms_is_cut_off_nowhere(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    names = [f"an arm with a long name {number}" for number in range(6)]
    arms = [arm_record(name, [run_of()], memory_cap_bytes=None) for name in names]
    model = {"name": "m", "dtype": "float32", "moe_layers": 8, "top_k": 4, "expert_bytes": 1 << 20}
    print_bench(arms, model)
    printed = capsys.readouterr().out
    assert all(name in printed for name in names) and "…" not in printed
    assert "75.0 %" in printed


def test_differing_tokens_are_counted_over_the_common_length() -> None:
    assert count_differing([[1, 2, 3], [4]], [[1, 9, 3, 7], [5]]) == 2


def test_markdown_table_has_a_rule_under_its_head() -> None:
    assert markdown_table(("a", "b"), [("1", "2")]).splitlines() == [
        "| a | b |",
        "|---|---|",
        "| 1 | 2 |",
    ]


def test_json_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
