"""Layer steps that one op in C++ takes: the numbers and counters of Python's, and no Python."""

from __future__ import annotations

import os
import random
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import specmoe_compile
import specmoe_compile.ops
from specmoe_compile.errors import SpecMoEError
from specmoe_compile.options import MAX_DECODE_TOKENS, SessionOptions
from specmoe_compile.runtime.cache.statistics import LayerStats
from specmoe_compile.runtime.cpu import experts as runner_module
from specmoe_compile.runtime.cpu.engine import open_session
from specmoe_compile.runtime.session import Session
from specmoe_compile.runtime.store.disk import DiskStore
from specmoe_compile.runtime.store.slice import SliceStore
from tests.helpers import prompts, tiny_qwen3_moe
from tests.runtime.fakes import E, K, L, ModuleSource, experts_layer, qwen_experts, token_batch
from tests.runtime.split_path import predict, step
from tests.runtime.test_session import CACHES, LAYERS, make_session

pytestmark = pytest.mark.usefixtures("tiny_experts")

experts = torch.ops.specmoe.experts


def on_disk(folder: Path, cache: str, **kwargs: Any) -> Session:
    store = DiskStore.open(folder)
    return open_session(LAYERS, store, expert_cache_bytes=CACHES[cache], top_k=K, **kwargs)


def by_python(session: Session, layer: int, batch: tuple[Tensor, ...]) -> Tensor:
    return torch.ops.specmoe.experts_python(*batch, session.handle, layer)


def native_steps(session: Session) -> int:
    return session.stats.total.native_steps


def assert_same_tables(one: Session, other: Session, when: str) -> None:
    for name in ("slot_of", "expert_of", "last_use", "clock"):
        tables = [getattr(session.engine.cache, name) for session in (one, other)]
        assert tables[0] == tables[1], f"{name} in {when}"


def assert_same_counters(stats: LayerStats, expected: LayerStats) -> None:
    for name in ("steps", "hits", "misses", "demand_bytes"):
        assert getattr(stats, name) == getattr(expected, name)


@pytest.mark.parametrize("is_native", [True, False])
def test_a_lone_row_of_a_prompt_compiles_no_kernel_where_steps_need_none(
    is_native: bool, store_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(runner_module, "one_token_kernel_or_none", lambda *_: asked.append(1))
    if not is_native:
        monkeypatch.setattr(runner_module, "native_layer_or_none", lambda *_: None)
    x, _, weights = token_batch(0, 3 * MAX_DECODE_TOKENS)
    ids = torch.zeros(len(x), K, dtype=torch.int64)
    ids[:, 1] = torch.arange(len(x)) % 2 + 1
    ids[7, 1] = 3
    with on_disk(store_folder, "half") as session, make_session("in_place") as plain:
        got = experts(x, ids, weights, session.handle, 0)
        assert asked == [] if is_native else asked
        want = experts(x, ids, weights, plain.handle, 0)
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("policy", ["lru", "lfu", "adaptive"])
@pytest.mark.parametrize("cache", ["one_token", "half", "all"])
def test_tokens_tables_and_counters_are_those_of_python(
    store_folder: Path, cache: str, policy: Any
) -> None:
    generator = random.Random(cache)
    with (
        on_disk(store_folder, cache, cache_policy=policy) as one,
        on_disk(store_folder, cache, cache_policy=policy) as other,
    ):
        for seed in range(150):
            number = seed % L
            batch = token_batch(seed, generator.choice([1, 1, 1, 2, 5, 16, 20]))
            got = experts(*batch, one.handle, number)
            assert torch.equal(got, by_python(other, number, batch))
            assert_same_tables(one, other, f"step {seed}")
        stats, expected = (s.stats.total for s in (one, other))
        assert stats.native_steps > 20 and expected.native_steps == 0
        assert_same_counters(stats, expected)
        assert one.stats.read_busy_ms > 0
        assert "in C++" in str(one.stats)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_computes_its_own_part_as_python_does(store_folder: Path, rank: int) -> None:
    layers = [replace(layer, num_experts=E // 2, is_slice=True) for layer in LAYERS]
    generator = random.Random(rank)

    def opened() -> Session:
        store = SliceStore(DiskStore.open(store_folder), rank, 2)
        return open_session(layers, store, expert_cache_bytes=CACHES["one_token"], top_k=K)

    whole = make_session("in_place")
    with whole, opened() as one, opened() as other:
        for seed in range(150):
            number = seed % L
            x, ids, weights = token_batch(seed, generator.choice([1, 1, 2, 5]))
            own = ids // (E // 2) == rank
            if seed % 7 == 0:
                own[:] = False
            local = torch.where(own, ids % (E // 2), E // 2)
            batch = (x, local, torch.where(own, weights, 0.0))
            got = experts(*batch, one.handle, number)
            assert torch.equal(got, by_python(other, number, batch))
            torch.testing.assert_close(got, whole.experts(number, x, ids, batch[2]))
            assert_same_tables(one, other, f"step {seed}")
        stats, expected = (s.stats.total for s in (one, other))
        assert stats.native_steps > 100 and expected.native_steps == 0
        assert_same_counters(stats, expected)
        with pytest.raises(SpecMoEError):
            experts(x[:1], torch.tensor([[E // 2 + 1, 0]]), weights[:1], one.handle, 0)


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("top_k", [1, 4, 5, 8, 16])
@pytest.mark.parametrize("hidden", [40, 64, 192])
def test_the_sum_is_that_of_torch_to_the_bit(
    dtype: torch.dtype, weights_dtype: torch.dtype, top_k: int, hidden: int
) -> None:
    module = qwen_experts(experts=16, hidden=hidden, intermediate=24).to(dtype)
    layers = [experts_layer(0, module)]
    from specmoe_compile.runtime.store.ram import RamStore

    store = RamStore.from_source(ModuleSource(layers, top_k), progress=False)
    with open_session(layers, store, expert_cache_bytes=None, top_k=top_k) as session:
        for tokens in (1, 3, 16):
            torch.manual_seed(tokens)
            x = torch.randn(tokens, hidden).to(dtype)
            ids = torch.stack([torch.randperm(16)[:top_k] for _ in range(tokens)])
            weights = torch.rand(tokens, top_k).to(weights_dtype)
            for chosen in (ids, ids.int()):
                before = native_steps(session)
                got = experts(x, chosen, weights, session.handle, 0)
                assert torch.equal(got, by_python(session, 0, (x, chosen, weights)))
                halves = dtype != torch.float32 and weights_dtype != torch.float32
                mixes = halves and dtype != weights_dtype
                takes = not mixes and (hidden % 64 == 0 or top_k <= 4)
                assert native_steps(session) == before + takes


def test_steps_between_guesses_are_exact_and_booked(store_folder: Path) -> None:
    generator = random.Random(0)
    with on_disk(store_folder, "half") as session, make_session("in_place") as plain:
        session.configure(SessionOptions(auto_off=False))
        for seed in range(200):
            number = seed % L
            batch = token_batch(seed, generator.choice([1, 1, 2]))
            expected = plain.experts(number, *batch)
            if generator.random() < 0.7:
                assert torch.equal(experts(*batch, session.handle, number), expected)
                continue
            ticket = session.start_prefetch(number, *predict("random", batch, generator))
            if generator.random() < 0.5:  # the guess of a step that never comes
                assert torch.equal(step(session, number, batch, ticket), expected)
        total = session.stats.total
        assert total.native_steps > 10
        assert total.speculative_bytes >= (
            total.useful_speculative_bytes + total.wasted_speculative_bytes
        )


def test_what_has_to_be_seen_is_pythons() -> None:
    class Observer:
        seen = 0

        def routed(self, layer: int, ids: Tensor, weights: Tensor, *, split: bool) -> None:
            self.seen += 1

        def predicted(self, layer: int, ids: Tensor, weights: Tensor) -> None: ...

    batch = token_batch(0, 1)
    with make_session("in_place") as session:
        observer = session.observer = Observer()
        experts(*batch, session.handle, 0)
        assert observer.seen == 1 and native_steps(session) == 0
        session.observer = None
        experts(*batch, session.handle, 0)
        assert observer.seen == 1 and native_steps(session) == 1
        session.configure(SessionOptions(predictor="previous_token"))
        experts(*batch, session.handle, 0)
        assert native_steps(session) == 1


def test_errors_are_pythons(store_folder: Path) -> None:
    x, ids, weights = token_batch(0, 1)
    with on_disk(store_folder, "half") as session:
        handle = session.handle
        with pytest.raises(SpecMoEError, match=f"experts 0..{E - 1}"):
            experts(x, ids + E, weights, handle, 0)
        for expert in range(E):  # verified
            experts(x, torch.tensor([[expert, (expert + 1) % E]]), weights, handle, 0)
        before = native_steps(session)
        experts(x, torch.tensor([[0, 1]]), weights, handle, 0)
        experts(x, torch.tensor([[4, 5]]), weights, handle, 0)
        assert native_steps(session) == before + 2
        os.truncate(store_folder / "experts.bin", 0)
        with pytest.raises(SpecMoEError, match="truncated"):
            for expert in range(E):
                experts(x, torch.tensor([[expert, (expert + 1) % E]]), weights, handle, 0)
    with pytest.raises(SpecMoEError, match="closed"):
        experts(x, ids, weights, handle, 0)


def test_two_threads_take_turns_step_by_step(store_folder: Path) -> None:
    batches = [token_batch(seed, 1) for seed in range(60)]
    with on_disk(store_folder, "one_token") as session, make_session("in_place") as plain:
        want = [plain.experts(i % L, *batch) for i, batch in enumerate(batches)]
        wrong: list[int] = []

        def run(op: Any) -> None:
            for i, batch in enumerate(batches):
                if not torch.equal(op(*batch, session.handle, i % L), want[i]):
                    wrong.append(i)

        threads = [
            threading.Thread(target=run, args=(op,))
            for op in (experts, torch.ops.specmoe.experts_python, experts)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert native_steps(session) > 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_goes_on(store_folder: Path) -> None:
    batches = [token_batch(seed, 1) for seed in range(40)]
    with on_disk(store_folder, "one_token") as session, make_session("in_place") as plain:
        want = [plain.experts(i % L, *batch) for i, batch in enumerate(batches)]
        for i, batch in enumerate(batches):
            experts(*batch, session.handle, i % L)
        before = native_steps(session)
        child = os.fork()
        if child == 0:
            good = all(
                torch.equal(experts(*batch, session.handle, i % L), want[i])
                for i, batch in enumerate(batches)
            )
            os._exit(0 if good and native_steps(session) > before else 1)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        experts(*batches[0], session.handle, 0)


@torch.no_grad()
def test_a_decode_step_of_resident_experts_calls_no_python(python_calls: Counter[str]) -> None:
    model = tiny_qwen3_moe(layers=2)
    ids = prompts(1, 1)
    want = model(ids).logits
    specmoe_compile.offload(model, store="ram", device="cpu", progress=False)
    try:
        compiled = torch.compile(model, backend="specmoe")
        compiled(ids)
        python_calls.clear()
        steps = specmoe_compile.stats(model).total.native_steps
        for _ in range(5):
            got = compiled(ids).logits
        assert python_calls["body"] == 0
        assert specmoe_compile.stats(model).total.native_steps == steps + 5 * 2
    finally:
        specmoe_compile.close(model)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_steps_that_bypass_the_slots_are_exact_and_taken_by_cpp(store_folder: Path) -> None:
    """Two experts are wanted all the time, the others now and then: those are not kept in slots.

    What the places besides the slots still hold is not read again.
    """
    generator = random.Random(1)
    with (
        on_disk(store_folder, "one_token", cache_policy="adaptive") as session,
        on_disk(store_folder, "one_token", cache_policy="adaptive") as other,
        make_session("in_place") as plain,
    ):
        cache: Any = session.engine.cache
        before = bypassed = 0
        for seed in range(400):
            number = seed % L
            x, _, weights = token_batch(seed, 1)
            often = generator.random() < 0.7
            ids = torch.tensor([[0, 1] if often else [0, generator.randrange(2, E)]])
            got = experts(x, ids, weights, session.handle, number)
            assert torch.equal(got, plain.experts(number, x, ids, weights))
            assert torch.equal(got, by_python(other, number, (x, ids, weights)))
            took, before = native_steps(session) - before, native_steps(session)
            bypassed += took and any(cache.slot(number, e) < 0 for e in ids[0].tolist())
            for name in ("layer_of", "expert_of", "last_use", "is_busy", "clock"):
                tables = [
                    getattr(one.engine.residency.staging.places, name)  # type: ignore[attr-defined]
                    for one in (session, other)
                ]
                assert tables[0] == tables[1], name
        stats = session.stats.total
        assert_same_counters(stats, other.stats.total)
        assert bypassed > 40
        assert 20 < stats.misses < bypassed, "some were read again, some were not"
