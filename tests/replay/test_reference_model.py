"""Replays against real runs of the widened reference model, whose routing is a trained one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import specmoe_compile
from benchmarks.end_to_end.run import held_out_prompts
from benchmarks.kit.places import RESULTS
from benchmarks.simulation.mapped_trace import SHAPES, mapped_trace
from specmoe_compile.hf.attach import session_of
from specmoe_compile.reference_model.widened import widened_model
from specmoe_compile.replay.engine import replay
from specmoe_compile.replay.recorder import TraceRecorder
from specmoe_compile.replay.steps import ReplaySteps
from specmoe_compile.replay.trace import RoutingTrace
from tests.helpers import greedy
from tests.replay.test_replay import COMPUTE, LINK, counts, setting

TRACE = RESULTS / "reference_trace.safetensors"


@pytest.fixture(scope="module")
def recorded() -> RoutingTrace:
    """The repository's trace of the reference model."""
    return RoutingTrace.load(TRACE)


@pytest.fixture(scope="module")
def widened(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return widened_model(tmp_path_factory.mktemp("widened"), 0.75)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "policy"), [("25%", "lru"), ("50%", "lfu"), (0, "lru")])
def test_hits_are_those_of_a_run_of_the_widened_model(
    size: str | int, policy: Any, widened: Path
) -> None:
    import torch

    model: Any = specmoe_compile.from_pretrained(
        widened,
        device="cpu",
        store="disk",
        store_dir=widened.parent / "store",
        expert_cache=size,
        cache_policy=policy,
        progress=False,
    )
    recorder = TraceRecorder(session_of(model))
    for prompt in held_out_prompts(2):
        greedy(model, torch.tensor([prompt]), 48, pad_token_id=0, eos_token_id=None)
    trace, stats = recorder.trace("widened"), session_of(model).stats
    specmoe_compile.close(model)
    done = replay(ReplaySteps(trace), setting(trace, size, policy), LINK, COMPUTE)
    assert counts(done, "demand_bytes") == counts(stats, "demand_bytes")
    assert (stats.total.hits > 0) == (size != 0)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_mapped_trace_has_the_shape_and_real_experts(shape: Any, recorded: RoutingTrace) -> None:
    steps = 24
    mapped = mapped_trace(recorded, shape, steps=steps)
    assert (mapped.layers, mapped.top_k) == (shape.layers, shape.top_k)
    assert set(mapped.num_experts) == {shape.experts}
    assert mapped.tokens == [1] * steps
    ids = mapped.tensors["ids"]
    # Every row uses K different experts, as many of each copy.
    assert ids.sort(dim=-1).values.diff(dim=-1).min() > 0
    copies = shape.experts // 32
    for copy in range(copies):
        inside = (ids >= 32 * copy) & (ids < 32 * (copy + 1))
        assert (inside.sum(dim=-1) == shape.top_k // copies).all()


def test_mapped_predictions_stay_with_the_rows_that_they_were_made_for(
    recorded: RoutingTrace,
) -> None:
    """Recall of the mapped trace is far above that of shuffled predictions, for each shape."""
    mapped = mapped_trace(recorded, SHAPES[0], steps=48)
    ids, guesses = mapped.tensors["ids"][:, 1:], mapped.tensors["predicted_ids"][:, 1:]

    def recall(predicted: Any) -> float:
        return float((ids.unsqueeze(-1) == predicted.unsqueeze(-2)).any(-1).float().mean())

    assert recall(guesses) > 0.5 > 0.35 > recall(guesses.roll(7, dims=0))


def test_mapping_refuses_shapes_that_do_not_fit(recorded: RoutingTrace) -> None:
    from dataclasses import replace

    with pytest.raises(ValueError, match="cannot be made of layers"):
        mapped_trace(recorded, replace(SHAPES[0], experts=100), steps=8)
    with pytest.raises(ValueError, match="100000 are needed"):
        mapped_trace(recorded, SHAPES[0], steps=100_000)
