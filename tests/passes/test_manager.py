"""The manager: order, reports, identity, trace, idempotence, the FX graph cache."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

from specmoe_compile.options import CompileOptions, GraphOptions
from specmoe_compile.passes import manager
from specmoe_compile.passes.identity import source_hash
from specmoe_compile.passes.manager import PASSES, SpeculationPass, run_passes
from specmoe_compile.passes.pass_config import PassConfig
from tests.passes.graphs import OPS, calls, inputs, norm, plain_block, route, trace, use_session


def test_passes_run_in_their_order_and_report() -> None:
    report = run_passes(trace(plain_block), PassConfig(), check_each=True)
    assert [done.name for done in report.passes] == [run.__name__ for run in PASSES]
    assert report.matches == {
        "find_moe_layers": 3,
        "choose_predictions": 2,
        "insert_default_vectors": 2,
        "insert_lookahead_router": 2,
        "insert_expert_prefetch": 2,
        "insert_predictor": 0,
        "split_expert_execution": 3,
        "replace_top_k": 0,
        "merge_products": 0,
        "replace_sums": 0,
        "mask_foreign_experts": 0,
        "guard_speculation": 0,
    }
    assert report.reason is None
    assert all(done.elapsed_ms > 0 for done in report.passes)
    assert report.elapsed_ms >= sum(done.elapsed_ms for done in report.passes)
    assert report.nodes_after > report.nodes_before
    assert "MoE layer 0 is not predicted: it is the first MoE layer" in str(report)


def test_twice_is_once() -> None:
    gm = trace(plain_block)
    run_passes(gm, PassConfig())
    before = str(gm.graph)
    again = run_passes(gm, PassConfig())
    assert again.reason == "it was rewritten before" and not again.passes
    assert str(gm.graph) == before


def test_prefetch_off_leaves_the_graph() -> None:
    gm = trace(plain_block)
    before = str(gm.graph)
    report = run_passes(gm, PassConfig(prefetch=False))
    assert report.reason == "option prefetch is off"
    assert str(gm.graph) == before


def test_graph_without_experts_is_left() -> None:
    gm = trace(lambda r, gate, layer: r + gate.sum())
    before = str(gm.graph)
    assert run_passes(gm, PassConfig()).reason == "it dispatches no experts"
    assert str(gm.graph) == before


def test_nothing_to_predict_leaves_every_dispatch_node() -> None:
    gm = trace(plain_block)
    before = str(gm.graph)
    report = run_passes(gm, PassConfig(skip_layers=(1, 2)), check_each=True)
    assert report.reason == "no MoE layer can be predicted"
    assert str(gm.graph) == before
    assert list(report.skipped) == [0, 1, 2]


def test_unused_clones_are_removed(monkeypatch: Any) -> None:
    use_session(monkeypatch)
    gm = trace(plain_block)
    want = gm(*inputs())
    run_passes(gm, PassConfig())
    gm.recompile()
    assert all(node.users or node.op == "output" or node.is_impure() for node in gm.graph.nodes)
    assert len(calls(gm.graph, "start_prefetch")) == 2
    torch.testing.assert_close(gm(*inputs()), want, rtol=0, atol=0)


def test_clones_carry_no_eager_input_values() -> None:
    gm = trace(plain_block)
    for node in gm.graph.nodes:
        node.meta["eager_input_vals"] = ((), {})
    run_passes(gm, PassConfig())
    new = [n for n in gm.graph.nodes if n.op != "output" and "eager_input_vals" not in n.meta]
    old = [n for n in gm.graph.nodes if "eager_input_vals" in n.meta]
    assert len(new) > 20 and old
    assert all(set(n.meta) <= {"val", "tensor_meta", "nn_module_stack"} for n in new)


def test_before_and_after_are_traced(monkeypatch: Any) -> None:
    seen: dict[str, str] = {}

    def record(kind: str, *, metadata_fn: Any, payload_fn: Any) -> None:
        assert kind == "artifact"
        seen[metadata_fn()["name"]] = payload_fn()

    monkeypatch.setattr(manager, "trace_structured", record)
    run_passes(trace(plain_block), PassConfig())
    assert "start_prefetch" not in seen["specmoe_before_passes"]
    assert seen["specmoe_after_passes"].count("torch.ops.specmoe.start_prefetch") == 2


def test_log_names_skipped_layers(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="specmoe_compile.passes"):
        run_passes(trace(plain_block), PassConfig(skip_layers=(2,)))
    assert "insert_expert_prefetch: 1 in" in caplog.text
    assert "choose_predictions: MoE layer 2: option skip_layers names it" in caplog.text


def test_graph_that_cannot_be_predicted_is_warned_about(
    caplog: pytest.LogCaptureFixture,
) -> None:
    run_passes(trace(plain_block), PassConfig(skip_layers=(1, 2)))
    run_passes(trace(plain_block), PassConfig(max_tokens=1))
    assert "predicts no experts" not in caplog.text

    def no_residual(r: torch.Tensor, gate: torch.Tensor, layer: int) -> torch.Tensor:
        x = norm(r)
        return OPS.experts(x, *route(x, gate), 0, layer)

    run_passes(trace(no_residual, layers=2), PassConfig())
    assert "predicts no experts in this graph" in caplog.text
    assert "layer 1: no addition after its experts" in caplog.text


def another_value(options: GraphOptions, name: str) -> Any:
    """A valid value of an option that is not its own."""
    value, kind = getattr(options, name), get_type_hints(type(options))[name]
    if isinstance(value, bool):
        return not value
    if name == "predictor":
        return "residual"
    if name in ("prefetch", "products", "share_layers"):  # "auto" may come to the same as True
        return False
    if value in get_args(kind):
        return next(choice for choice in get_args(kind) if choice != value)
    if isinstance(value, tuple):
        return (1,)
    if isinstance(value, str):
        return f"{value} 2"
    return value / 2 if isinstance(value, float) else (value or 1) + 1


@pytest.mark.parametrize("name", [declared.name for declared in fields(PassConfig)])
def test_identity_depends_on_every_field(name: str) -> None:
    base = SpeculationPass(PassConfig())
    assert base.uuid() == SpeculationPass(PassConfig()).uuid()
    changed = PassConfig(**{name: another_value(PassConfig(), name)})
    assert SpeculationPass(changed).uuid() != base.uuid()


def test_identity_is_kept_by_a_copy_and_its_reports_are_not() -> None:
    base = SpeculationPass(PassConfig())
    base(trace(plain_block).graph)
    copy = pickle.loads(pickle.dumps(base))
    assert copy.uuid() == base.uuid() and copy.reports == [] and len(base.reports) == 1


@pytest.mark.parametrize("name", [declared.name for declared in fields(CompileOptions)])
def test_options_that_reach_the_passes_are_the_graph_s(name: str) -> None:
    base = CompileOptions(default_vectors="file")
    changed = replace(base, **{name: another_value(base, name)})
    of_graph = name in {declared.name for declared in fields(GraphOptions)}
    one, other = (SpeculationPass.from_options(options) for options in (base, changed))
    assert (one.uuid() != other.uuid()) == of_graph


def test_identity_covers_what_steers_a_rewrite(tmp_path: Path) -> None:
    package = Path(manager.__file__).parents[1]
    copied = tmp_path / package.name
    shutil.copytree(package, copied, ignore=shutil.ignore_patterns("__pycache__"))
    known = {source_hash(), source_hash(copied)}
    assert len(known) == 1
    steering = (
        "MAX_K = ",
        "MAX_SCORES = ",
        "FLOAT_DTYPES = ",
        "class Predictor:",
        "class GraphOptions",
        "_SCHEMAS = ",
        "def outline_experts",
        "class ExpertForm:",
    )
    for number, line in enumerate(steering):
        (path,) = (p for p in copied.rglob("*.py") if f"\n{line}" in p.read_text())
        path.write_text(f"{path.read_text()}\n# {number}")
        source_hash.cache_clear()
        assert source_hash(copied) not in known
        known.add(source_hash(copied))


def test_options_reach_the_passes() -> None:
    options = CompileOptions(lookahead=3, prefetch_width=6, skip_layers=(1,), control=True)
    assert SpeculationPass.from_options(options).config == PassConfig(
        prefetch=True,
        lookahead=3,
        prefetch_width=6,
        skip_layers=(1,),
        control=True,
        max_tokens=16,
    )
    automatic = CompileOptions(skip_layers="auto")
    assert SpeculationPass.from_options(automatic).config.skip_layers == ()


@pytest.mark.parametrize(
    "options", [{"lookahead": 0}, {"prefetch_width": 0}, {"skip_layers": (-1,)}, {"max_tokens": 0}]
)
def test_wrong_values_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        PassConfig(**options)


def _compile_in_a_process(factor: float) -> dict[str, int]:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.passes.compile_once", str(factor)],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def test_second_process_hits_the_graph_cache() -> None:
    """In the cache folder of all tests, where what Inductor asks a compiler first is known."""
    factor = 1.0 + int.from_bytes(os.urandom(4)) / 2**32  # in no graph before
    first, second = _compile_in_a_process(factor), _compile_in_a_process(factor)
    assert first == {"hits": 0, "misses": 1, "passes": 1, "prefetches": 2}
    assert second == {"hits": 1, "misses": 0, "passes": 0, "prefetches": 2}


def test_plain_model_is_not_predicted() -> None:
    options = CompileOptions()
    assert not SpeculationPass.from_options(options, offloaded=False).config.prefetch
