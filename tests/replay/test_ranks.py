"""Replays of several ranks: each has its part of the experts, a link and a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from specmoe_compile.cli.main import run
from specmoe_compile.errors import UnsupportedModelError
from specmoe_compile.options import SessionOptions
from specmoe_compile.replay.engine import (
    ComputeTimes,
    RankGroup,
    Replay,
    ReplaySetting,
    replay,
)
from specmoe_compile.replay.link import Link
from specmoe_compile.replay.steps import ReplaySteps
from specmoe_compile.replay.trace import RoutingTrace

LAYERS, EXPERTS, TOP_K, STEPS, RECORD = 3, 16, 4, 40, 1_000_000
LINK = Link(gbps=1.0)
"""A record takes 1 ms."""
COMPUTE = ComputeTimes(layer_ms=0.1, expert_ms=0.01)


def trace_of(steps: int = STEPS) -> RoutingTrace:
    """Tokens that each choose K experts at random."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(steps, LAYERS, EXPERTS, generator=generator).topk(TOP_K).indices.short()
    return RoutingTrace(
        model="random",
        fingerprint="f",
        num_experts=(EXPERTS,) * LAYERS,
        record_bytes=(RECORD,) * LAYERS,
        top_k=TOP_K,
        setting={},
        tensors={
            "tokens": torch.ones(steps, dtype=torch.int32),
            "ids": ids,
            "weights": torch.full(ids.shape, 0.25),
            "split": torch.zeros(steps, LAYERS, dtype=torch.uint8),
            "predicted": torch.zeros(steps, LAYERS, dtype=torch.uint8),
            "predicted_ids": torch.zeros(steps, LAYERS, 0, dtype=torch.int16),
            "predicted_weights": torch.zeros(steps, LAYERS, 0),
            "step_ms": torch.zeros(steps),
            "stall_ms": torch.zeros(steps),
            "read_ms": torch.zeros(steps),
            "read_bytes": torch.zeros(steps, dtype=torch.int64),
        },
    )


def replayed(slots: int, ranks: RankGroup, predictor: str = "none", **options: Any) -> Replay:
    setting = ReplaySetting(
        cache_bytes=slots * LAYERS * RECORD,
        cache_policy="lru",
        predictor=predictor,
        speculation=SessionOptions(auto_off=False, **options),
    )
    return replay(ReplaySteps(trace_of()), setting, LINK, COMPUTE, ranks=ranks)


def total_ms(done: Replay) -> float:
    return sum(cost.ms for cost in done.steps)


@pytest.mark.parametrize("predictor", ["none", "perfect", "previous"])
def test_ranks_need_what_one_needs_and_read_it_through_more_links(predictor: str) -> None:
    one = replayed(4, RankGroup(), predictor)
    two = replayed(4, RankGroup(size=2), predictor)
    wanted = STEPS * LAYERS * TOP_K
    for done in (one, two):
        assert done.total.hits + done.total.misses == wanted
        assert sum(cost.hits + cost.misses for cost in done.steps) == wanted
    assert two.total.steps == 2 * one.total.steps
    assert two.total.hits > one.total.hits, "twice the slots in all"
    assert total_ms(two) < 0.75 * total_ms(one)


def test_without_a_cache_every_rank_waits_for_the_one_with_most_misses() -> None:
    one, two = (replayed(0, RankGroup(size=size)) for size in (1, 2))
    ids = trace_of().tensors["ids"].long()
    most = torch.stack([(ids < 8).sum(-1), (ids >= 8).sum(-1)]).amax(0).sum()
    # A record per ms; computing is 0.1 ms and what experts take behind the last arrival.
    assert one.total.misses == two.total.misses == ids.numel()
    for done, records in ((one, ids.numel()), (two, int(most))):
        expected = records + STEPS * LAYERS * 0.1
        assert total_ms(done) == pytest.approx(expected, rel=0.02)


def test_a_sum_over_the_ranks_costs_its_time_in_every_layer() -> None:
    free = replayed(8, RankGroup(size=2))
    slow = replayed(8, RankGroup(size=2, all_reduce_us=500))
    assert total_ms(slow) - total_ms(free) == pytest.approx(STEPS * LAYERS * 0.5)


def test_experts_that_do_not_divide_and_times_below_zero_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="16 experts cannot be split evenly over 3"):
        replayed(4, RankGroup(size=3))
    with pytest.raises(ValueError, match="all_reduce_us=-1"):
        RankGroup(size=2, all_reduce_us=-1)


def test_the_command_says_that_it_simulated_ranks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace.safetensors"
    trace_of().save(path)
    machine = ["--link-gbps", "1", "--compute-ms", "1", "--policy", "lru"]
    arguments = ["replay", str(path), *machine, "--expert-cache", "50%", "--ranks", "2"]
    assert run([*arguments, "--all-reduce-us", "20"]) == 0
    out = capsys.readouterr().out
    assert "replayed on simulated time, not measured" in out
    assert "2 ranks, each with such a link, 20 us per sum" in out
    assert run([*arguments[:-1], "5"]) == 2
    assert "16 experts cannot be split evenly over 5 ranks" in capsys.readouterr().err
