"""What the full-size GPU benchmark makes of its rows and of a profiler's trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.full_size.profile import (
    Event,
    covered_us,
    draw_layer,
    one_layer,
    reduced_events,
    summarise,
)
from benchmarks.full_size.report import Results, judge, row_key, write_markdown

MODEL = "m"
LAYERS, STEPS = 4, 2
GRAPH_GOALS = ("from the limit", "3 times", "10 times", "0 host synchronisations")


def row_of(arm: str, ms: float, context: int = 1024, mode: str = "graph", **more: Any) -> Any:
    """A row whose misses would take 1 ms per 50 MB on the link."""
    return {
        "arm": arm,
        "mode": mode,
        "context": context,
        "routing": "trace",
        "tpot_ms": {"p20": ms, "p50": ms, "p80": ms},
        "hit_rate": 0.5,
        "demand_bytes": 500e6,
        "speculative_bytes": 250e6,
        "missed_bytes": 500e6,
        "host_synchronisations": 0,
        "copies_to_host": 0,
        "copying_share": 0.8,
        "tokens": [1, 2, 3],
        **more,
    }


def data_of(*rows: Any) -> dict[str, Any]:
    return {
        "dry": False,
        "commit": "a" * 40,
        "device": "a GPU",
        "versions": {},
        "seed": 0,
        "models": {
            MODEL: {
                "layers": 4,
                "experts": 32,
                "top_k": 4,
                "dtype": "bfloat16",
                "store_bytes": 1e9,
                "link": {"copy_gbps": 50.0},
                "trace": {
                    "routing": "trace-driven routing",
                    "recall_mean": 0.8,
                    "previous_token_mean": 0.4,
                    "digest": "d",
                },
            }
        },
        "rows": {row_key(MODEL, row): row for row in rows},
        "checks": [],
    }


def verdicts(*rows: Any) -> dict[str, str]:
    claims = judge(Results(data_of(*rows), MODEL))
    return {claim.text: claim.verdict for claim in claims}


def caches(ms: float, **more: Any) -> list[Any]:
    return [row_of(f"specmoe_{share}", ms, **more) for share in (10, 25, 50)]


def test_goals_without_rows_are_not_measured() -> None:
    assert set(verdicts().values()) == {"not measured"}
    refused = {**row_of("on_demand", 1.0), "not_run": "no"}
    del refused["tpot_ms"]
    assert set(verdicts(refused).values()) == {"not measured"}


def test_goals_hold_and_fail_by_their_rows() -> None:
    good = [row_of("resident", 5.0), row_of("on_demand", 80.0), *caches(10.4)]
    good.append(row_of("accelerate", 1000.0, mode="eager"))
    found = verdicts(*good)
    assert [v for t, v in found.items() if any(g in t for g in GRAPH_GOALS)] == ["yes"] * 4
    bad = [row_of("resident", 5.0), row_of("on_demand", 30.0)]
    bad += caches(10.6, host_synchronisations=1)
    bad.append(row_of("accelerate", 100.0, mode="eager"))
    found = verdicts(*bad)
    assert [v for t, v in found.items() if any(g in t for g in GRAPH_GOALS)] == ["no"] * 4


def test_the_distance_is_judged_at_every_context() -> None:
    rows = [row_of("resident", 5.0), *caches(10.4)]
    far = [row_of("resident", 5.0, 4096), *(row_of(r["arm"], 10.6, 4096) for r in caches(0.0))]
    (near_claim,) = [c for c in judge(Results(data_of(*rows), MODEL)) if "from the limit" in c.text]
    (far_claim,) = [
        c for c in judge(Results(data_of(*rows, *far), MODEL)) if "from the limit" in c.text
    ]
    assert near_claim.holds is True and far_claim.holds is False
    assert "10 %: 1.04, 25 %: 1.04, 50 %: 1.04 at 1024 tokens; " in far_claim.found
    assert far_claim.found.endswith("50 %: 1.06 at 4096 tokens")


@pytest.mark.parametrize(("context", "ms", "verdict"), [(1024, 90.0, "yes"), (65536, 90.0, "no")])
def test_prefetch_is_judged_at_both_contexts(context: int, ms: float, verdict: str) -> None:
    found = verdicts(row_of("on_demand", 100.0, context), row_of("prefetch_no_cache", ms, context))
    asked = [v for t, v in found.items() if f"at {context} tokens (graph)" in t]
    assert asked == [verdict]
    assert list(found.values()).count("not measured") >= 3


def test_an_arm_is_judged_by_its_fastest_variant() -> None:
    slow, fast = row_of("prefetch_no_cache", 99.0), row_of("prefetch_no_cache_most_1", 90.0)
    (claim,) = (
        claim
        for claim in judge(Results(data_of(row_of("on_demand", 100.0), slow, fast), MODEL))
        if "at 1024 tokens (graph)" in claim.text
    )
    assert claim.holds
    assert claim.found == "10.0% (prefetch_no_cache_most_1)"


def test_the_limit_is_the_larger_of_bytes_and_resident_time() -> None:
    ours = row_of("specmoe_50", 20.0)
    assert Results(data_of(ours, row_of("resident", 5.0)), MODEL).limit_ms(ours) == 10.0
    assert Results(data_of(ours, row_of("resident", 16.0)), MODEL).distance(ours) == 1.25
    assert Results(data_of(ours), MODEL).limit_ms(ours) is None
    assert Results(data_of(ours), MODEL).link_use(ours) == pytest.approx(0.75)
    other = row_of("resident", 5.0, tokens=[1, 2, 4])
    assert Results(data_of(ours, other), MODEL).differing_tokens(ours) == 1


def test_the_report_says_what_was_not_run_and_what_is_predicted() -> None:
    refused = {**row_of("commit_25", 1.0), "not_run": "policy='commit' is not supported."}
    text = write_markdown(data_of(row_of("specmoe_50", 20.0), refused))
    assert "not run: policy='commit' is not supported." in text
    assert "Predicted, not measured" in text
    assert "Dry run" not in text
    assert all(line.count("|") == 18 for line in text.splitlines() if line.startswith("| 1024"))


def device_trace() -> list[Event]:
    """Two steps of four layers of 100 us: plan, gather on a side stream, experts, and a sync."""
    events: list[Event] = []

    def add(cat: str, name: str, ts: float, dur: float, tid: int) -> None:
        events.append(
            {"ph": "X", "cat": cat, "name": name, "pid": 0, "tid": tid, "ts": ts, "dur": dur}
        )

    for step in range(STEPS):
        begin = 1000.0 * step
        add("user_annotation", f"decode_step_{step}", begin, 300.0, 1)
        add("cuda_runtime", "cudaGraphLaunch", begin + 10, 5.0, 1)
        add("cuda_runtime", "cudaLaunchKernel", begin + 20, 5.0, 1)
        for layer in range(LAYERS):
            at = begin + 100.0 * layer
            add("kernel", "plan_cache_kernel", at, 5.0, 7)
            add("kernel", "gather_experts_kernel", at + 5, 60.0, 8)
            add("kernel", "gate_up_kernel", at + 65, 20.0, 7)
            add("kernel", "down_kernel", at + 85, 10.0, 7)
    add("cuda_runtime", "cudaStreamSynchronize", 1050.0, 5.0, 1)
    add("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 1060.0, 1.0, 7)
    add("cuda_runtime", "cudaDeviceSynchronize", 1900.0, 5.0, 1)
    events.append({"ph": "i", "cat": "kernel", "name": "an instant"})
    return events


def test_a_trace_is_summarised_without_the_profilers_own_wait() -> None:
    events = reduced_events(device_trace())
    assert "cudaLaunchKernel" not in {event["name"] for event in events}
    found = summarise(events, STEPS, on_device=True)
    assert found["host_synchronisations"] == 0.5
    assert found["copies_to_host"] == 0.5
    assert found["graph_launches"] == 1.0
    assert found["copying_share"] == pytest.approx(8 * 60 / 1395)


def test_overlapping_copies_count_once() -> None:
    spans = [{"ts": 0.0, "dur": 10.0}, {"ts": 5.0, "dur": 10.0}, {"ts": 20.0, "dur": 1.0}]
    assert covered_us(spans) == 16.0


def test_one_layer_is_cut_out_and_drawn(tmp_path: Path) -> None:
    layer = one_layer(reduced_events(device_trace()), LAYERS, STEPS)
    names = [event["name"] for event in layer]
    assert names.count("gather_experts_kernel") == 1
    assert names.count("plan_cache_kernel") == 2  # its own, and the next layer's, which ends it
    draw_layer(layer, tmp_path / "layer.png", "one layer")
    assert (tmp_path / "layer.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_layer([], tmp_path / "none.png", "none")
