"""Layer steps in parts that run in C++: exact whatever was guessed, booked, and without Python."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import specmoe_compile
from specmoe_compile.options import SessionOptions
from specmoe_compile.runtime.cache.statistics import LayerStats
from specmoe_compile.runtime.cpu.engine import CpuEngine, open_session
from specmoe_compile.runtime.session import Session
from specmoe_compile.runtime.store.disk import DiskStore
from tests.helpers import prompts, tiny_qwen3_moe
from tests.runtime.fakes import K, L, token_batch
from tests.runtime.split_path import predict
from tests.runtime.test_session import CACHES, LAYERS, make_session

pytestmark = pytest.mark.usefixtures("tiny_experts")

OPS = torch.ops.specmoe
KINDS = ("right", "wrong", "random", "wide", "empty")
Batch = tuple[Tensor, Tensor, Tensor]


def on_disk(folder: Path, cache: str, options: SessionOptions, **kwargs: Any) -> Session:
    """A session whose records are all verified: C++ may read them."""
    store = DiskStore.open(folder, verify_reads=False)
    session = open_session(LAYERS, store, expert_cache_bytes=CACHES[cache], top_k=K, **kwargs)
    session.configure(options)
    return session


def in_parts(session: Session, layer: int, batch: Batch, ticket: Tensor) -> Tensor:
    x, ids, weights = batch
    state = OPS.wait_prefetch(ticket, ids, session.handle, layer)
    partial = OPS.run_resident_experts(x, ids, weights, state, session.handle, layer, [])
    return OPS.correct_experts(partial, x, ids, weights, state, session.handle, layer)


def start(session: Session, layer: int, guess: tuple[Tensor, Tensor]) -> Tensor:
    return OPS.start_prefetch(*guess, session.handle, layer, [])


def check_tables(session: Session) -> None:
    """Slots and experts point at each other."""
    assert isinstance(session.engine, CpuEngine)
    cache = session.engine.cache
    assert cache is not None
    for slot_of, expert_of in zip(cache.slot_of, cache.expert_of, strict=True):
        there = {(e, s) for e, s in enumerate(slot_of) if s >= 0}
        assert there == {(e, s) for s, e in enumerate(expert_of) if e >= 0}


@pytest.mark.parametrize("auto_off", [False, True])
@pytest.mark.parametrize("policy", ["lru", "adaptive"])
@pytest.mark.parametrize("cache", ["one_token", "half", "all"])
def test_whatever_is_guessed_tokens_are_exact_and_reads_are_booked(
    store_folder: Path, cache: str, policy: Any, auto_off: bool
) -> None:
    generator = random.Random(cache)
    options = SessionOptions(auto_off=auto_off)
    wanted = 0
    with (
        on_disk(store_folder, cache, options, cache_policy=policy) as session,
        make_session("in_place") as plain,
    ):
        for seed in range(300):
            layer = seed % L
            batch = token_batch(seed, generator.choice([1, 1, 1, 2, 3, 20]))
            kind = generator.choice([*KINDS, None])
            if kind is None:
                got = OPS.experts(*batch, session.handle, layer)
            else:
                ticket = start(session, layer, predict(kind, batch, generator))
                if generator.random() < 0.2:  # the guess of a step that never comes
                    continue
                if generator.random() < 0.1:
                    ticket = torch.full((1,), 12345)  # nobody's
                got = in_parts(session, layer, batch, ticket)
            wanted += len(set(batch[1].flatten().tolist()))
            assert torch.equal(got, plain.experts(layer, *batch)), f"{kind} in step {seed}"
        total = session.stats.total
        assert total.native_steps > 80
        assert total.hits + total.misses == wanted
        assert total.prefetches > 20 or cache == "all"
        assert total.speculative_bytes >= (
            total.useful_speculative_bytes + total.wasted_speculative_bytes
        )
        assert total.needed > 0 and total.predicted > 0
        check_tables(session)


def test_a_right_guess_is_a_hit_and_a_wrong_one_is_not(store_folder: Path) -> None:
    options = SessionOptions(auto_off=False)
    with on_disk(store_folder, "half", options) as session:
        batch = token_batch(3, 1)
        ticket = start(session, 0, (batch[1], batch[2]))
        in_parts(session, 0, batch, ticket)
        first = session.stats.layers[0]
        assert (first.hits, first.misses, first.prefetches) == (K, 0, K)
        assert first.useful_speculative_bytes == first.speculative_bytes > 0
        assert (first.needed, first.recalled) == (K, K)
        other = token_batch(4, 1)
        wrong = predict("wrong", other, random.Random(0))
        in_parts(session, 1, other, start(session, 1, wrong))
        second = session.stats.layers[1]
        assert (second.hits, second.misses, second.recalled) == (0, K, 0)


def test_a_guess_stays_within_its_budget(store_folder: Path) -> None:
    record = LAYERS[0].layout.record_bytes
    options = SessionOptions(auto_off=False, prefetch_budget_bytes=record)
    with on_disk(store_folder, "half", options) as session:
        _, ids, weights = token_batch(3, 1)
        start(session, 0, (ids, weights))
        assert session.stats.layers[0].prefetches == 1


def test_light_misses_get_default_vectors(store_folder: Path) -> None:
    options = SessionOptions(policy="default_vector", default_vector_threshold=0.4, auto_off=False)
    x, _, _ = token_batch(0, 1)
    ids, weights = torch.tensor([[1, 2]]), torch.tensor([[0.7, 0.3]])
    with on_disk(store_folder, "half", options) as session, make_session("in_place") as plain:
        session.default_vectors.tables[0][2] = 1.5
        session.default_vectors.frozen = True
        ticket = start(session, 0, (ids[:, :1], weights[:, :1]))
        got = in_parts(session, 0, (x, ids, weights), ticket)
        one = plain.experts(0, x, ids[:, :1], weights[:, :1])
        torch.testing.assert_close(got, one + 0.3 * 1.5)
        total = session.stats.total
        assert (total.skipped_experts, total.native_steps, total.misses) == (1, 1, 0)
        # There by now, it is computed.
        OPS.experts(x, torch.tensor([[2, 3]]), weights, session.handle, 0)
        got = in_parts(session, 0, (x, ids, weights), ticket)
        torch.testing.assert_close(got, plain.experts(0, x, ids, weights))


def test_default_vectors_are_learned_and_blended_as_in_python(store_folder: Path) -> None:
    options = SessionOptions(auto_off=False)
    with (
        on_disk(store_folder, "half", options) as one,
        on_disk(store_folder, "half", options) as other,
    ):
        for seed in range(120):
            layer, batch = seed % L, token_batch(seed, 1)
            OPS.experts(*batch, one.handle, layer)
            OPS.experts_python(*batch, other.handle, layer)
        mine, theirs = one.default_vectors, other.default_vectors
        assert one.stats.total.native_steps == 120 and other.stats.total.native_steps == 0
        assert sum(int(counts.sum()) for counts in mine.counts) > 10
        for layer in range(L):
            assert torch.equal(mine.counts[layer], theirs.counts[layer])
            torch.testing.assert_close(mine.tables[layer], theirs.tables[layer])
        x, ids, weights = token_batch(1, 3)
        got = OPS.blend_default_vectors(ids, weights, x, one.handle, 0)
        torch.testing.assert_close(got, mine.blend(0, ids, weights, x))
        mine.frozen = True
        before = mine.tables[0].clone()
        for seed in range(60):
            OPS.experts(*token_batch(seed, 1), one.handle, 0)
        assert torch.equal(mine.tables[0], before)


def test_between_the_parts_of_a_step_python_may_take_another(store_folder: Path) -> None:
    options = SessionOptions(auto_off=False)
    with on_disk(store_folder, "half", options) as session, make_session("in_place") as plain:
        for seed in range(40):
            x, ids, weights = token_batch(seed, 1)
            ticket = start(session, 0, (ids, weights))
            state = OPS.wait_prefetch(ticket, ids, session.handle, 0)
            session.experts(seed % L, *token_batch(seed + 1, 20))  # a prefill
            partial = OPS.run_resident_experts(x, ids, weights, state, session.handle, 0, [])
            session.experts(seed % L, *token_batch(seed + 2, 1))
            got = OPS.correct_experts(partial, x, ids, weights, state, session.handle, 0)
            assert torch.equal(got, plain.experts(0, x, ids, weights))
        check_tables(session)


def test_options_of_python_leave_steps_in_parts_to_it(store_folder: Path) -> None:
    with on_disk(store_folder, "half", SessionOptions(policy="commit")) as session:
        batch = token_batch(0, 1)
        in_parts(session, 0, batch, start(session, 0, (batch[1], batch[2])))
        assert session.stats.total.native_steps == 0
        OPS.experts(*batch, session.handle, 1)
        assert session.stats.total.native_steps == 1


def test_plan_step_follows_the_options(store_folder: Path) -> None:
    ids = torch.zeros(1, K, dtype=torch.int64)
    edges = [0, 1, 1, 2]
    for options, want in (
        (SessionOptions(auto_off=False), [True, True, True]),
        (SessionOptions(auto_off=False, skip_layers=(1,)), [False, True, True]),
        (SessionOptions(), [True, True, True]),  # the first steps of a trial
    ):
        with on_disk(store_folder, "half", options) as session:
            assert OPS.plan_step(ids, session.handle, [0, 1, 2], edges).tolist() == want


@torch.no_grad()
def test_a_decode_step_with_misses_and_guesses_calls_no_python(
    python_calls: Counter[str], tmp_path: Path
) -> None:
    model = tiny_qwen3_moe(layers=3)
    ids = prompts(1, 1)
    want = model(ids).logits
    specmoe_compile.offload(
        model, store="disk", store_dir=tmp_path / "store", device="cpu", progress=False,
        expert_cache="50%",
    )  # fmt: skip
    try:
        options = {"prefetch": True, "auto_off": False}
        compiled = torch.compile(model, backend="specmoe", options=options)
        for token in range(60):  # every record has been read once, and verified
            compiled(torch.tensor([[token]]))
        compiled(ids)
        python_calls.clear()
        before = specmoe_compile.stats(model).total
        for token in range(20):
            compiled(torch.tensor([[token + 7]]))
        got = compiled(ids).logits
        after = specmoe_compile.stats(model).total
    finally:
        specmoe_compile.close(model)
    assert python_calls["body"] == 0
    assert after.native_steps == before.native_steps + 21 * 3
    assert after.misses > before.misses and after.prefetches > before.prefetches
    assert after.predicted > before.predicted
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_counters_have_the_names_of_the_statistics() -> None:
    from specmoe_compile.runtime.cpu.native.steps import _COUNTERS

    names = set(LayerStats().as_dict()) | {"stall_ns"}
    assert set(_COUNTERS) <= names
    assert np.unique(_COUNTERS).size == len(_COUNTERS) == 17
