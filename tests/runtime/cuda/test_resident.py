"""Layers with a slot for every expert: filled once, and then nothing is planned or fetched."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from specmoe_compile.bench.cuda_graphs import fetched_from
from specmoe_compile.errors import SpecMoEError, TransferError
from specmoe_compile.options import SessionOptions
from specmoe_compile.runtime.cuda.opening import open_session as open_cuda_session
from specmoe_compile.runtime.cuda.resident import FOLLOWED
from specmoe_compile.runtime.experts.module import ExpertsLayer
from specmoe_compile.runtime.session import RoutingObserver, Session
from tests.helpers import tiny_qwen3_moe
from tests.runtime.cuda.order_checker import unordered_pairs
from tests.runtime.cuda.recorded import Prompt, Recorder
from tests.runtime.cuda.stream_model import StreamModel
from tests.runtime.cuda.test_disk_supply import Disk
from tests.runtime.cuda.test_split_experts import SPLIT, part_of
from tests.runtime.cuda.test_split_experts import reference as part_reference
from tests.runtime.fakes import E, K, L, experts_layer, qwen_experts, ram_store, reference
from tests.runtime.fakes import token_batch as batch_of
from tests.runtime.split_path import predict, step
from tests.runtime.test_session import LAYERS, MODULES, RECORD

FEW, MANY = 4, E
"""Experts of the two kinds of layers of a model whose layers differ."""
MIXED_MODULES = [qwen_experts(experts=n, seed=n) for n in (MANY, FEW, MANY)]
MIXED = [experts_layer(index, module) for index, module in enumerate(MIXED_MODULES)]


def opened(
    streams: Any, layers: Sequence[ExpertsLayer] = LAYERS, *, slots: int = E, **kwargs: Any
) -> Session:
    store = ram_store(layers)
    return open_cuda_session(
        layers,
        store,
        device=torch.device("cpu"),
        expert_cache_bytes=slots * sum(layout.record_bytes for layout in store.layouts),
        top_k=K,
        streams=streams,
        **kwargs,
    )


def launches(streams: StreamModel) -> Counter[str]:
    """Ops that would be kernels or copies, by name; views and what holds values are none."""
    views = ("view", "reshape", "as_strided", "slice", "select", "expand", "empty", "detach")
    names = [op.name.removesuffix(".default") for op in streams.ops]
    return Counter(name for name in names if not any(view in name for view in views))


def test_a_step_of_one_token_is_the_experts_and_nothing_else() -> None:
    streams = StreamModel()
    with opened(streams) as session:
        for layer in range(L):
            session.experts(layer, *batch_of(layer, 1))
        streams.restart()
        for layer in range(L):
            session.experts(layer, *batch_of(layer, 1))
        assert launches(streams) == {
            "specmoe_kernels.run_experts_decode": L,
            "aten.add_.Tensor": 1,  # counts the step, of all layers
        }


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("tokens", [1, 3, 16, 40])
def test_outputs_are_the_modules_and_every_use_is_a_hit(tokens: int, late: bool) -> None:
    streams = StreamModel(late=late)
    with opened(streams) as session:
        assert not session.engine.fetches and session.engine.resident_layers == frozenset(range(L))
        used = 0
        for seed in range(3):
            for layer, module in enumerate(MODULES):
                batch = batch_of(seed, tokens)
                out = session.experts(layer, *batch)
                torch.testing.assert_close(out, reference(module, *batch))
                used += len(batch[1].unique())
        stats = session.stats
    streams.finish()
    assert not unordered_pairs(streams.ops)
    total, decodes = stats.total, tokens <= 16
    assert (total.steps, total.hits) == ((3 * L, used) if decodes else (0, 0))
    assert (total.misses, total.demand_bytes, total.prefetches) == (0, 0, 0)
    assert total.filled_bytes == stats.store_bytes == stats.fast_tier_bytes
    assert stats.eviction == (FOLLOWED,) * L
    assert "all experts are there" in str(stats)


@pytest.mark.parametrize("slots", [E // 2, E])
def test_experts_that_all_have_slots_are_fetched_from_nowhere(slots: int) -> None:
    """Commands choose CUDA graphs by that: from disk no graph can fetch."""
    with opened(StreamModel(), slots=slots) as session:
        model = nn.Module()
        model.__dict__["_specmoe_session"] = session.handle
        assert fetched_from(model) == (None if slots == E else "ram")


def test_steps_are_counted_whichever_layers_they_run() -> None:
    with opened(StreamModel()) as session:
        for layer in (0, 1, 2, 0, 1, 2, 1, 1, 0, 2, 0):
            session.experts(layer, *batch_of(0, 1))
        counted = [(layer.steps, layer.hits) for layer in session.stats.layers]
        assert counted == [(4, 4 * K), (4, 4 * K), (3, 3 * K)]
        session.experts(1, *batch_of(0, 1))
        session.reset_stats()
        total = session.stats.total
        assert (total.steps, total.hits, total.filled_bytes) == (0, 0, 0)


class Captures(StreamModel):
    """Says that a graph is captured, on demand."""

    capturing = False


def test_a_captured_step_counts_its_own_layers_only() -> None:
    """A replay adds what the capture wrote down: not what ran in front of it."""
    streams = Captures()
    with opened(streams) as session:
        session.experts(0, *batch_of(0, 1))
        session.experts(1, *batch_of(0, 1))  # a step that went no further
        streams.capturing = True
        streams.restart()
        for layer in range(L):
            session.experts(layer, *batch_of(1, 1))
        (added,) = [op for op in streams.ops if op.name.startswith("aten.add_")]
        assert sum(end - begin for begin, end in added.writes) >= L * 8
        streams.capturing = False
        counted = [layer.steps for layer in session.stats.layers]
    assert counted == [2, 2, 1], "what ran before, and the capture's own count, run once here"


def test_a_split_layer_is_exact_and_its_guesses_fetch_nothing() -> None:
    streams, generator = StreamModel(), random.Random(0)
    with opened(streams) as session:
        for policy in ("exact", "default_vector", "commit"):
            session.configure(SessionOptions(policy=policy))  # type: ignore[arg-type]
            for number, kind in enumerate(("right", "wrong", "wide", "empty")):
                batch = batch_of(number, 1 + number % 3)
                guess = predict(kind, batch, generator)
                out = step(session, 1, batch, session.start_prefetch(1, *guess))  # type: ignore[arg-type]
                streams.finish()
                torch.testing.assert_close(out, reference(MODULES[1], *batch))
        total = session.stats.total
    assert (total.misses, total.prefetches, total.skipped_experts) == (0, 0, 0)
    assert not unordered_pairs(streams.ops)


@pytest.mark.parametrize("transfer", ["gather", "copy"])
def test_layers_with_fewer_experts_are_resident_beside_others(transfer: Any) -> None:
    streams = StreamModel()
    with opened(streams, MIXED, slots=FEW) as session:
        session.configure(SessionOptions(transfer=transfer))
        assert session.engine.fetches and session.engine.resident_layers == {1}
        for number in range(12):
            tokens, layer = (1, 2, 40)[number % 3], (0, 1, 2, 1)[number % 4]
            experts = (MANY, FEW, MANY)[layer]
            batch = batch_of(number, tokens, experts=experts)
            if number % 2 and tokens < 40:
                out = step(session, layer, batch, session.start_prefetch(layer, *batch[1:]))  # type: ignore[arg-type]
            else:
                out = session.experts(layer, *batch)
            streams.finish()
            torch.testing.assert_close(out, reference(MIXED_MODULES[layer], *batch))
        stats = session.stats
    assert not unordered_pairs(streams.ops)
    filled = [layer.filled_bytes for layer in stats.layers]
    assert filled == [0, FEW * RECORD, 0]
    assert stats.layers[1].misses == stats.layers[1].prefetches == 0 < stats.layers[1].hits
    assert stats.layers[0].misses > 0
    assert [name == FOLLOWED for name in stats.eviction] == [False, True, False]


def test_prompts_pass_through_buffers_for_other_layers_only() -> None:
    streams = StreamModel()
    with opened(streams, MIXED, slots=FEW) as session:
        streams.restart()
        for layer, experts in enumerate((MANY, FEW, MANY)):
            session.experts(layer, *batch_of(layer, 40, experts=experts))
        streams.finish()
        copied = [op for op in streams.ops if op.name.startswith("aten.copy_")]
        on_demand = [op for op in copied if op.stream == "demand"]
        assert len(on_demand) == 2, "layer 2 follows layer 0 ahead of layer 1's step"
        assert session.engine.stats().fast_tier_bytes == (3 * FEW + K + 2 * MANY) * RECORD


def test_a_rank_computes_its_own_experts() -> None:
    streams, generator = StreamModel(), random.Random(2)
    with opened(streams, SPLIT) as session:
        needed = 0
        for number in range(15):
            tokens, layer = (1, 1, 2, 4, 40)[number % 5], number % L
            batch = part_of(batch_of(number, tokens), generator)
            if number % 2:
                ticket = session.start_prefetch(layer, *batch[1:])
                out = step(session, layer, batch, ticket)  # type: ignore[arg-type]
            else:
                out = session.experts(layer, *batch)
            streams.finish()
            torch.testing.assert_close(out, part_reference(batch, layer))
            if tokens <= 16:
                needed += len({e for e in batch[1].reshape(-1).tolist() if e != E})
        total = session.stats.total
    assert (total.hits, total.misses) == (needed, 0)
    assert not unordered_pairs(streams.ops)


@pytest.mark.parametrize("layers", [range(L), (0, L - 1)], ids=["all", "some"])
def test_a_rank_that_is_told_the_slots_plans_nothing(layers: Sequence[int]) -> None:
    streams, generator = StreamModel(), random.Random(3)
    with opened(streams, SPLIT) as session:
        assert session.engine.foreign_ids == dict.fromkeys(range(L), E)
        needed = 0
        for number in range(4):
            streams.restart()
            counted: dict[int, torch.Tensor] = {}
            for layer in layers:
                x, ids, weights = part_of(batch_of(7 * number + layer, 1), generator)
                counted[layer] = torch.where(ids == E, -1, ids)
                due = counted if layer == layers[-1] else {}
                out = session.run_own_experts(layer, x, counted[layer], weights, due)
                torch.testing.assert_close(out, part_reference((x, ids, weights), layer))
                needed += int((ids != E).sum())
            found = launches(streams)
            assert found["specmoe_kernels.run_experts_decode"] == len(layers)
            assert "specmoe_kernels.plan_cache" not in found
            if len(layers) == L:
                assert sum(found.values()) == L + 5, "a few launches count for all layers"
        stats = session.stats
    assert (stats.total.hits, stats.total.misses) == (needed, 0)
    assert [layer.steps for layer in stats.layers] == [4 * (n in layers) for n in range(L)]
    assert not unordered_pairs(streams.ops)


def test_whoever_watches_a_rank_sees_its_ids() -> None:
    seen: list[torch.Tensor] = []

    class Watching(RoutingObserver):
        def routed(self, layer: int, ids: Any, weights: Any, *, split: bool) -> None:
            seen.append(ids)

    with opened(StreamModel(), SPLIT) as session:
        session.observer = Watching()
        x, ids, weights = part_of(batch_of(1, 1), random.Random(1))
        session.run_own_experts(0, x, torch.where(ids == E, -1, ids), weights, {})
    assert torch.equal(seen[0], ids)


@pytest.mark.usefixtures("prompts_left_to_the_model")
def test_a_compiled_rank_gives_the_plain_models_tokens() -> None:
    """A rank of one, whose graph marks others' experts all the same."""
    plain = tiny_qwen3_moe()
    recorder = Recorder(plain)
    prompt, streams = Prompt(batch=1, static=True), StreamModel()
    with recorder.session(streams, slots=8, config=SessionOptions(), is_slice=True) as session:
        tokens = recorder.run(prompt, session)
        assert sorted(session.engine.foreign_ids) == list(range(len(session.layers)))
        total, layers = session.stats.total, len(session.layers)
    torch._dynamo.reset()
    assert torch.equal(tokens, prompt.generate(plain))
    found = Counter(op.name for op in streams.ops)
    assert found["specmoe_kernels.run_experts_decode.default"] == layers * prompt.new_tokens
    assert found["specmoe_kernels.plan_cache.default"] == layers, "of the prompt's few tokens"
    steps = layers * prompt.new_tokens
    assert (total.steps, total.misses) == (steps, 0) and total.hits > 0
    assert not unordered_pairs(streams.ops)


def test_experts_with_a_norm_of_their_own() -> None:
    module = qwen_experts(seed=3)
    module.has_post_expert_norm = True  # type: ignore[assignment]
    module.post_expert_norm = torch.nn.RMSNorm(32).requires_grad_(False)
    module.post_expert_norm.weight.copy_(torch.linspace(0.5, 2.0, 32))
    layer, streams = experts_layer(0, module), StreamModel()
    layer = replace(layer, layout=LAYERS[0].layout)
    x, ids, weights = batch_of(5, 2)
    with opened(streams, [layer]) as session:
        out = session.experts(0, x, ids, weights)
        split = step(session, 0, (x, ids, weights), 0)
    plain = qwen_experts(seed=3)
    each = [reference(plain, x, ids[:, k : k + 1], torch.ones(2, 1)) for k in range(K)]
    normed = torch.stack([module.post_expert_norm(y) for y in each], dim=1)
    expected = (normed * weights.unsqueeze(-1)).sum(dim=1)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(split, expected)


def test_emptying_the_slots_keeps_experts_that_never_leave() -> None:
    streams, batch = StreamModel(), batch_of(1, 3)
    with opened(streams) as session:
        session.engine.forget_slots()  # type: ignore[attr-defined]
        torch.testing.assert_close(session.experts(0, *batch), reference(MODULES[0], *batch))
        assert session.stats.total.misses == 0


def test_a_step_that_does_not_wait_for_its_experts_is_seen() -> None:
    streams = StreamModel(drops=lambda waiter, source: (waiter, source) == ("compute", "demand"))
    with opened(streams) as session:
        out = session.experts(0, *batch_of(0, 1))
        assert bool(out.isnan().any())
        streams.finish()
    assert unordered_pairs(streams.ops)


def test_experts_on_disk_are_read_once_and_may_be_captured() -> None:
    disk = Disk(slots=E)
    with disk.session as session:
        reads = sorted(disk.store.reads)
        assert reads == [(layer, e) for layer in range(L) for e in range(E)]
        session.configure(SessionOptions(mode="reduce-overhead"))
        for tokens in (1, 2, 40):
            for layer in range(L):
                disk.check_layer(layer, batch_of(layer, tokens))
        disk.streams.finish()
        assert len(disk.store.reads) == len(reads)
        total = session.stats.total
        assert (total.steps, total.misses) == (2 * L, 0)
        assert session.engine.transfer == "none"
    assert not unordered_pairs(disk.streams.ops)
    with Disk(slots=E - 1).session as part, pytest.raises(SpecMoEError, match="'100%'"):
        part.configure(SessionOptions(mode="reduce-overhead"))


def test_a_record_that_cannot_be_read_is_an_error_of_opening(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(layer: int, expert: int) -> None:
        if (layer, expert) == (1, 5):
            raise OSError("broken")

    make = Disk.__init__.__globals__["SlowStore"]

    def failing(*args: Any, **kwargs: Any) -> Any:
        store = make(*args, **kwargs)
        store.before_read = fail
        return store

    monkeypatch.setitem(Disk.__init__.__globals__, "SlowStore", failing)
    with pytest.raises(TransferError, match="expert 5"):
        Disk(slots=E)


@pytest.mark.usefixtures("prompts_left_to_the_model")
def test_a_model_predicts_nothing_and_gives_the_plain_models_tokens() -> None:
    torch.manual_seed(0)
    plain = tiny_qwen3_moe()
    recorder = Recorder(plain)
    prompt, streams = Prompt(batch=1, static=True), StreamModel()
    with recorder.session(streams, slots=8, config=SessionOptions()) as session:
        tokens = recorder.run(prompt, session)
        total, layers = session.stats.total, len(session.layers)
    torch._dynamo.reset()
    assert torch.equal(tokens, prompt.generate(plain))
    assert recorder.prefetches == recorder.branches == 0
    assert total.steps == layers * prompt.new_tokens
    assert total.misses == total.prefetches == 0
    assert not unordered_pairs(streams.ops)
