"""The full-size GPU benchmark, dry: tiny models on the CPU through the parts that run on a GPU."""

from __future__ import annotations

import fcntl
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GptOssConfig

from benchmarks.full_size import run as gpu_full_size
from benchmarks.full_size.arms import Bench, Steps, sharing_groups
from benchmarks.full_size.extra import _eager_tokens
from benchmarks.full_size.measure import measure_arms
from benchmarks.full_size.model import SHAPES, FilledCache, RandomStore, build_skeleton
from benchmarks.full_size.profile import (
    read_trace,
)
from benchmarks.full_size.trace import (
    PREDICTED,
    TRUE,
    RoutingTrace,
    describe_tables,
    map_trace,
    record_reference,
)
from benchmarks.kit import turns
from benchmarks.kit.turns import turn
from specmoe_compile.runtime.session import Session
from tests.helpers import PATIENCE_S

CPU = torch.device("cpu")
STD = 0.2  # so large that experts decide tokens
CONTEXT, TEXTS, TOKENS, EXPERTS, TOP_K = 32, 4, 12, 32, 4
STEPS = Steps(warm_up=3, timed=5, profiled=2)


def made_trace() -> RoutingTrace:
    """A trace whose predictions are right for some tokens and wrong for others."""
    generator = torch.Generator().manual_seed(0)

    def choices() -> torch.Tensor:
        scores = torch.rand(8, TEXTS, TOKENS, EXPERTS, generator=generator)
        return scores.topk(TOP_K, dim=-1).indices

    weights = torch.rand(8, TEXTS, TOKENS, TOP_K, generator=generator) + 0.1
    weights /= weights.sum(-1, keepdim=True)
    ids, wrong = choices(), choices()
    misled = torch.rand(8, TEXTS, TOKENS, 1, generator=generator) < 0.3
    return RoutingTrace(
        ids=ids,
        weights=weights,
        predicted_ids=torch.where(misled, wrong, ids),
        predicted_weights=weights.clone(),
        experts=EXPERTS,
    )


def bench_of(name: str) -> Bench:
    shape = SHAPES[name]
    _, layers = build_skeleton(shape, CPU)
    tables = map_trace(made_trace(), layers=len(layers), experts=layers[0].num_experts, top_k=TOP_K)
    store = RandomStore(layers, TOP_K, CPU, std=STD)
    return Bench(shape=shape, device=CPU, store=store, tables=tables, steps=STEPS, lowering="eager")


@pytest.fixture(scope="module")
def qwen() -> Bench:
    return bench_of("tiny-qwen3")


def test_records_hold_random_weights_and_no_module_holds_any(qwen: Bench) -> None:
    _, layers = build_skeleton(qwen.shape, CPU)
    assert all(p.shape[0] == 0 for layer in layers for p in layer.module.parameters())
    layout = qwen.store.layouts[1]
    first, second = (layout.views(qwen.store.record(1, expert)) for expert in (0, 63))
    for name, view in first.items():
        assert view.std().item() == pytest.approx(STD, rel=0.1)
        assert not torch.equal(view, second[name])
    again = RandomStore(layers, TOP_K, CPU, std=STD)
    assert torch.equal(again.region, qwen.store.region)


def test_mapped_tables_choose_the_heaviest_of_the_traced_experts() -> None:
    trace = made_trace()
    tables = map_trace(trace, layers=9, experts=64, top_k=4)
    for layer, source, text in ((0, 0, 0), (1, 1, 0), (7, 7, 0), (8, 1, 2)):
        for token in range(TOKENS):
            both = torch.cat([trace.ids[source, text + b, token] + 32 * b for b in (0, 1)])
            heavy = torch.cat([trace.weights[source, text + b, token] for b in (0, 1)])
            want = both[heavy.topk(4).indices]
            got = tables[layer, token, TRUE].topk(4).indices
            assert got.tolist() == want.tolist()
    about = describe_tables(tables, 4)
    assert 0.5 < about["recall_mean"] < 0.95
    with pytest.raises(ValueError, match="does not map"):
        map_trace(trace, layers=48, experts=128, top_k=8)


def test_exact_arms_give_the_tokens_of_the_eager_model(
    qwen: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    guessed: list[tuple[int, list[int]]] = []
    routed: list[tuple[int, list[int]]] = []
    start, wait = Session.start_prefetch, Session.wait_prefetch

    def spy_start(self: Any, layer: int, ids: Any, weights: Any) -> int:
        guessed.append((layer, sorted(ids[0].tolist())))
        return start(self, layer, ids, weights)

    def spy_wait(self: Any, ticket: int, layer: int, ids: Any) -> int:
        routed.append((layer, sorted(ids[0].tolist())))
        return wait(self, ticket, layer, ids)

    monkeypatch.setattr(Session, "start_prefetch", spy_start)
    monkeypatch.setattr(Session, "wait_prefetch", spy_wait)
    want = _eager_tokens(qwen, CONTEXT)
    # A given number is not tried: every predicted expert comes ahead in every step.
    arms, routings = ["prefetch_no_cache_most_4"], ("trace", "router")
    (rows,) = measure_arms(qwen, arms, "compiled", CONTEXT, routings)
    for routing, row in rows.items():
        assert row["tokens"] == want[routing]
        assert row["compiled_graphs"] == 1
    assert want["trace"] != want["router"]

    def chosen(which: int) -> list[tuple[int, list[int]]]:
        return [
            (layer, sorted(qwen.tables[layer, token, which].topk(TOP_K).indices.tolist()))
            for token in range(STEPS.total)
            for layer in range(0 if which == TRUE else 1, len(qwen.tables))
        ]

    layers, steps = len(qwen.tables), STEPS.total
    assert routed[: layers * steps] == chosen(TRUE)
    assert guessed[: (layers - 1) * steps] == chosen(PREDICTED)
    assert guessed[(layers - 1) * steps :] != chosen(PREDICTED)  # the random routers' own
    # Without a cache the hits are the predictions that came true.
    timed = qwen.tables[:, STEPS.warm_up : STEPS.warm_up + STEPS.timed]
    recall = describe_tables(timed, TOP_K)["recall"]
    assert rows["trace"]["hit_rate"] == pytest.approx(sum(recall) / layers, abs=1e-4)


@pytest.mark.parametrize("name", ["tiny-qwen3-nvfp4", "tiny-gpt-oss-mxfp4"])
def test_coded_experts_give_the_tokens_of_their_float32_values(name: str) -> None:
    bench = bench_of(name)
    want = _eager_tokens(bench, CONTEXT)
    layout = bench.store.layouts[0]
    assert not layout.format.is_plain
    (rows,) = measure_arms(bench, ["cache_25"], "compiled", CONTEXT, ("trace", "router"))
    for routing, row in rows.items():
        assert row["tokens"] == want[routing]
        assert (
            row["demand_bytes"] > 0 and row["demand_bytes"] * STEPS.timed % layout.record_bytes == 0
        )


def test_arms_that_share_a_graph_measure_what_they_would_alone(qwen: Bench) -> None:
    names = ["on_demand", "cache_25", "cache_50"]
    sizes = {"experts": EXPERTS * 2, "top_k": TOP_K}
    groups = sharing_groups([*names, "resident", "specmoe_25"], "graph", **sizes)
    assert groups == [names, ["resident"], ["specmoe_25"]], "all resident, nothing is planned"

    def figures(row: dict[str, Any]) -> list[Any]:
        return [row[name] for name in ("arm", "slots", "hit_rate", "missed_bytes", "tokens")]

    shared = list(measure_arms(qwen, names, "graph", CONTEXT, ("trace",)))
    assert {rows["trace"]["slots_allocated"] for rows in shared} == {EXPERTS}
    for name, rows in zip(names, shared, strict=True):
        (alone,) = measure_arms(qwen, [name], "eager", CONTEXT, ("trace",))
        assert alone["trace"]["slots_allocated"] == alone["trace"]["slots"]
        assert figures(rows["trace"]) == figures(alone["trace"])
    rates = [rows["trace"]["hit_rate"] for rows in shared]
    assert rates[0] == 0.0 < rates[1] < rates[2] < 1


def test_an_arm_with_less_than_two_k_slots_has_a_graph_of_its_own(qwen: Bench) -> None:
    names = ["specmoe_50", "specmoe_10"]
    sizes = {"experts": EXPERTS * 2, "top_k": TOP_K}
    assert sharing_groups(names, "graph", **sizes) == [["specmoe_50"], ["specmoe_10"]]
    for rows in measure_arms(qwen, names, "graph", CONTEXT, ("trace",)):
        assert "cannot share a graph" in rows["trace"]["not_run"]
    (rows,) = measure_arms(qwen, ["specmoe_10"], "graph", CONTEXT, ("trace",))
    assert rows["trace"]["slots"] == rows["trace"]["slots_allocated"] < 2 * TOP_K
    assert rows["trace"]["tokens"] == _eager_tokens(qwen, CONTEXT)["trace"]


def test_a_dry_run_writes_rows_resumes_and_reports(tmp_path: Path) -> None:
    trace, out = tmp_path / "trace.safetensors", tmp_path / "dry.json"
    made_trace().save(trace)
    command = ["--dry", "--lowering", "eager", "--models", "tiny-gpt-oss", "--modes", "graph"]
    command += ["--out", str(out), "--trace", str(trace), "--routings", "trace"]
    command += ["--arms", "resident", "specmoe_25", "commit_25"]
    assert gpu_full_size.main([*command, "--only", "arms", "--budget-s", "0"]) == 0
    assert json.loads(out.read_text())["rows"] == {}
    assert gpu_full_size.main([*command, "--only", "arms", "report"]) == 2  # it exists
    assert gpu_full_size.main([*command, "--resume"]) == 0
    data = json.loads(out.read_text())
    rows = {row["arm"]: row for row in data["rows"].values()}
    assert rows["commit_25"]["policy"] == "commit"
    assert rows["commit_25"]["missed_bytes"] > 0
    assert rows["resident"]["hit_rate"] == 1.0
    assert rows["specmoe_25"]["tokens"] == rows["resident"]["tokens"]
    assert rows["specmoe_25"]["missed_bytes"] > 0
    assert rows["accelerate"]["scaled"] == "from 1 and 3 layers to 2"
    assert all(check["differing_tokens"] == 0 for check in data["checks"])
    report = out.with_suffix(".md").read_text()
    assert "no figure here means anything" in report
    assert "trace-driven routing" in report
    kept = tmp_path / "dry.tiny-gpt-oss.specmoe_25.graph.json.gz"
    names = {event["name"] for event in read_trace(kept)}
    assert "specmoe/L1/prefetch" in names
    assert kept.with_suffix("").with_suffix(".png").stat().st_size > 5000


def test_pieces_measure_the_rows_asked_for_and_no_others(tmp_path: Path) -> None:
    out, trace = tmp_path / "dry.json", tmp_path / "trace.safetensors"
    made_trace().save(trace)
    command = ["--out", str(out), "--dry", "--resume", "--lowering", "eager", "--trace", str(trace)]
    command += ["--only", "arms", "--models", "tiny-qwen3", "--pieces"]
    assert gpu_full_size.main([*command, "40:eager:trace,router:cache_25"]) == 0
    rows = json.loads(out.read_text())["rows"]
    first = [f"tiny-qwen3|40|{routing}|cache_25|eager" for routing in ("trace", "router")]
    assert list(rows) == first
    # What there is stays; what is new is added, in the order asked for.
    more = ["32:eager:router:cache_10", "40:eager:trace:cache_25,cache_50"]
    assert gpu_full_size.main([*command, *more]) == 0
    again = json.loads(out.read_text())["rows"]
    new = ["tiny-qwen3|32|router|cache_10|eager", "tiny-qwen3|40|trace|cache_50|eager"]
    assert list(again) == first + new
    assert {key: again[key] for key in first} == rows
    assert again[new[0]]["tpot_ms"]["p50"] > 0


def test_processes_that_name_one_file_measure_in_turn(
    qwen: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "turn"
    monkeypatch.setattr(qwen, "turns", file)
    asked, lock = threading.Event(), fcntl.flock

    def flock(held: Any, kind: int) -> None:
        if kind == fcntl.LOCK_EX and threading.current_thread() is start:
            asked.set()
        lock(held, kind)

    monkeypatch.setattr(turns.fcntl, "flock", flock)
    seen: list[Any] = []
    start = threading.Thread(
        target=lambda: seen.extend(measure_arms(qwen, ["cache_25"], "eager", 32, ("trace",)))
    )
    with turn(file):
        start.start()
        # It shares the lock while it prepares, and then wants it alone.
        assert asked.wait(PATIENCE_S)
        assert start.is_alive() and not seen
    start.join()
    assert seen[0]["trace"]["tpot_ms"]["p50"] > 0


def test_link_and_accelerate_are_measured_in_a_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, trace, asked = tmp_path / "turn", tmp_path / "made.trace.safetensors", []
    made_trace().save(trace)

    def in_turn(what: str, result: dict[str, Any]) -> Callable[..., dict[str, Any]]:
        def measure(*args: Any, **kwargs: Any) -> dict[str, Any]:
            with file.open("w") as other, pytest.raises(BlockingIOError):
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            asked.append(what)
            return result

        return measure

    row = {"arm": "accelerate", "mode": "eager", "context": 32, "tpot_ms": {"p50": 1.0}}
    monkeypatch.setattr(gpu_full_size, "measure_link", in_turn("link", {"copy_gbps": 1.0}))
    monkeypatch.setattr(gpu_full_size, "measure_accelerate", in_turn("accelerate", row))
    command = ["--out", str(tmp_path / "dry.json"), "--dry", "--lowering", "eager"]
    command += ["--trace", str(trace), "--turns", str(file), "--models", "tiny-qwen3"]
    command += ["--only", "arms", "accelerate", "--pieces", "32:eager:trace:cache_25"]
    assert gpu_full_size.main(command) == 0
    assert asked == ["link", "accelerate"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1024:graph:trace", "expected CONTEXT:MODE:ROUTINGS:ARMS"),
        ("1k:graph:trace:cache_10", "expected CONTEXT:MODE:ROUTINGS:ARMS"),
        ("1024:fast:trace:cache_10", "names the mode 'fast', expected one of graph, compiled"),
        ("1024:graph:both:cache_10", "names the routing 'both', expected one of trace, router"),
        ("1024:graph:trace:cache_7", "names the arm 'cache_7', expected one of resident"),
    ],
)
def test_a_wrong_piece_is_refused_with_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    out = tmp_path / "dry.json"
    with pytest.raises(SystemExit) as caught:
        gpu_full_size.main(["--out", str(out), "--dry", "--pieces", text])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.slow
def test_the_reference_models_trace_is_predicted_and_local() -> None:
    trace = record_reference(2, 64)
    assert trace.ids.shape == (8, 2, 64, 4)
    tables = map_trace(trace, layers=8, experts=32, top_k=4)
    about = describe_tables(tables, 4)
    assert 0.6 < about["recall_mean"] < 0.95
    assert 0.3 < about["previous_token_mean"] < 0.8


def test_rewound_cache_holds_the_first_tokens_again_in_sliding_windows_too() -> None:
    config = GptOssConfig(
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=4,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    )
    filled = FilledCache(config, CONTEXT, TOKENS, CPU, torch.float32)
    layers = filled.cache.layers
    before = [(layer.keys[:, :, :CONTEXT].clone(), layer.values.clone()) for layer in layers]
    for _ in range(TOKENS):
        filled.hold()
        for index in range(len(layers)):
            filled.cache.update(torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4), index)
    assert not torch.equal(layers[0].keys, before[0][0])
    filled.rewind()
    assert all(
        torch.equal(layer.keys[:, :, :CONTEXT], keys)
        and torch.equal(layer.values[:, :, :CONTEXT], values[:, :, :CONTEXT])
        for layer, (keys, values) in zip(layers, before, strict=True)
    )
