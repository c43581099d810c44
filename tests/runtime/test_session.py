"""The session's demand path: exact whatever the cache holds, never stuck, honest about failure."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from specmoe_compile.errors import SpecMoEError, StoreError, TransferError
from specmoe_compile.options import MAX_DECODE_TOKENS
from specmoe_compile.runtime.cpu.cached_residency import CachedResidency
from specmoe_compile.runtime.cpu.engine import open_session
from specmoe_compile.runtime.session import Session, get_session
from specmoe_compile.runtime.transfer.base import DONE, Read
from tests.helpers import PATIENCE_S
from tests.runtime.fakes import (
    INTERMEDIATE,
    E,
    H,
    K,
    L,
    SlowStore,
    experts_layer,
    let_waits_last,
    qwen_experts,
    ram_store,
    random_delays,
    reference,
    token_batch,
)

MODULES = [qwen_experts(seed=layer) for layer in range(L)]
LAYERS = [experts_layer(index, module) for index, module in enumerate(MODULES)]
RECORD = LAYERS[0].layout.record_bytes
CACHES = {
    "in_place": None,
    "double_buffers": 0,
    "one_token": K * L * RECORD,
    "half": (E // 2) * L * RECORD,
    "all": E * L * RECORD,
}


def make_session(cache: str, *, store: Any = None, **kwargs: Any) -> Session:
    if store is None:
        store = ram_store(LAYERS)
        if cache != "in_place":
            store = SlowStore(store, delay_s=random_delays(0))
    return open_session(LAYERS, store, expert_cache_bytes=CACHES[cache], top_k=K, **kwargs)


def poison(session: Session) -> None:
    """Fill every slot with NaNs before another expert is read into it."""
    residency = session.engine.residency
    assert isinstance(residency, CachedResidency)
    residency.set_poison(True)


@pytest.fixture
def session() -> Iterator[Session]:
    with make_session("half") as opened:
        yield opened


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("tokens", [1, 2, 5, MAX_DECODE_TOKENS + 1, 64])
def test_experts_equal_hugging_face_bit_for_bit(cache: str, tokens: int) -> None:
    with make_session(cache) as session:
        for seed in range(4):
            for layer, module in enumerate(MODULES):
                x, ids, weights = token_batch(seed, tokens)
                out = session.experts(layer, x, ids, weights)
                assert out.shape == (tokens, H)
                assert out.stride() == (H, 1)
                assert torch.equal(out, reference(module, x, ids, weights))


@pytest.mark.parametrize("policy", ["lru", "lfu", "adaptive"])
def test_result_does_not_depend_on_what_the_cache_holds(policy: Any) -> None:
    with make_session("half", cache_policy=policy) as session, make_session("in_place") as plain:
        poison(session)
        for seed in range(60):
            layer, tokens = seed % L, 1 + (seed * 7) % 20
            batch = token_batch(seed, tokens)
            assert torch.equal(session.experts(layer, *batch), plain.experts(layer, *batch))


def test_int32_ids_are_accepted(session: Session) -> None:
    x, ids, weights = token_batch(0, 3)
    expected = session.experts(0, x, ids, weights)
    assert torch.equal(session.experts(0, x, ids.int(), weights), expected)


def test_token_may_name_an_expert_twice(session: Session) -> None:
    x, _, weights = token_batch(0, 1)
    ids = torch.tensor([[3, 3]])
    expected = reference(MODULES[0], x, ids, weights)
    assert torch.allclose(session.experts(0, x, ids, weights), expected, atol=1e-6)


def test_no_tokens_give_no_rows(session: Session) -> None:
    out = session.experts(0, torch.empty(0, H), torch.empty(0, K).long(), torch.empty(0, K))
    assert out.shape == (0, H)


def test_expert_out_of_range_is_refused(session: Session) -> None:
    x, _, weights = token_batch(0, 1)
    with pytest.raises(SpecMoEError, match=r"experts 0..7"):
        session.experts(0, x, torch.tensor([[1, E]]), weights)
    with pytest.raises(SpecMoEError, match=r"-1"):
        session.experts(0, x.repeat(2, 1), torch.tensor([[1, 2], [0, -1]]), weights.repeat(2, 1))


def test_cache_smaller_than_a_token_is_refused_with_numbers() -> None:
    bytes_needed = K * L * RECORD
    with pytest.raises(ValueError, match=rf"at least {bytes_needed} bytes"):
        open_session(LAYERS, ram_store(LAYERS), expert_cache_bytes=bytes_needed - 1, top_k=K)


def test_store_of_another_model_is_refused() -> None:
    other = [experts_layer(0, qwen_experts(intermediate=INTERMEDIATE * 2))]
    with pytest.raises(ValueError, match="another model"):
        open_session(LAYERS, ram_store(other), expert_cache_bytes=None, top_k=K)


def test_disk_store_needs_a_cache() -> None:
    with pytest.raises(ValueError, match="needs an expert cache"):
        open_session(LAYERS, SlowStore(ram_store(LAYERS)), expert_cache_bytes=None, top_k=K)


def test_repeated_tokens_hit_and_read_nothing(session: Session) -> None:
    batch = token_batch(0, 1)
    session.experts(0, *batch)
    session.experts(0, *batch)
    layer = session.stats.layers[0]
    assert (layer.misses, layer.hits, layer.demand_bytes) == (K, K, K * RECORD)
    assert session.store.reads.count((0, int(batch[1][0, 0]))) == 1  # type: ignore[attr-defined]


def test_double_buffers_keep_nothing_between_tokens() -> None:
    with make_session("double_buffers") as session:
        batch = token_batch(0, 1)
        for _ in range(3):
            for layer in range(L):
                session.experts(layer, *batch)
        assert session.stats.total.hits == 0
        assert session.stats.total.misses == 3 * L * K


def test_prefill_leaves_the_slots_of_decode_alone(session: Session) -> None:
    decode = [token_batch(seed, 1) for seed in (0, 1)]
    while session.engine.cache.slot(0, int(decode[1][1][0, 0])) < 0:  # type: ignore[union-attr]
        for batch in decode:
            session.experts(0, *batch)
    # Fill the free slots, so that a prefill could only evict.
    for seed in range(20):
        session.experts(0, *token_batch(seed, 1))
    held = [e for e in range(E) if session.engine.cache.slot(0, e) >= 0]  # type: ignore[union-attr]
    session.experts(0, *token_batch(5, 40))
    assert [e for e in range(E) if session.engine.cache.slot(0, e) >= 0] == held  # type: ignore[union-attr]


def test_handle_is_the_lowest_free_number_and_dies_with_its_session() -> None:
    first, second = make_session("half"), make_session("half")
    assert first.handle < second.handle
    assert get_session(first.handle) is first
    first.close()
    first.close()
    with pytest.raises(SpecMoEError, match="closed"):
        get_session(first.handle)
    with pytest.raises(SpecMoEError, match="closed"):
        first.experts(0, *token_batch(0, 1))
    with make_session("half") as third:
        assert third.handle == first.handle
        assert get_session(second.handle) is second
    second.close()


def test_close_ends_threads_and_store() -> None:
    before = set(threading.enumerate())
    with make_session("half") as session:
        own = set(threading.enumerate()) - before
        assert len(own) == 4
    assert not any(thread.is_alive() for thread in own)
    assert session.store.closed  # type: ignore[attr-defined]


def test_forgotten_session_closes_itself() -> None:
    before = set(threading.enumerate())
    session = make_session("half")
    own = set(threading.enumerate()) - before
    handle, store = session.handle, session.store
    session.experts(0, *token_batch(0, 1))
    del session
    gc.collect()
    assert len(own) == 4 and not any(thread.is_alive() for thread in own)
    assert store.closed  # type: ignore[attr-defined]
    with pytest.raises(SpecMoEError):
        get_session(handle)


def test_reader_error_reaches_the_caller_and_a_later_call_works(session: Session) -> None:
    batch = token_batch(0, 1)
    bad = int(batch[1][0, 1])

    def fail(layer: int, expert: int) -> None:
        if expert == bad:
            raise StoreError("the disk is on fire")

    session.store.before_read = fail  # type: ignore[attr-defined]
    for _ in range(2):
        with pytest.raises(TransferError, match="on fire") as caught:
            in_time(lambda: session.experts(0, *batch))
        assert isinstance(caught.value.__cause__, StoreError)
    session.store.before_read = lambda layer, expert: None  # type: ignore[attr-defined]
    out = in_time(lambda: session.experts(0, *batch))
    assert torch.equal(out, reference(MODULES[0], *batch))


@pytest.mark.parametrize("cache", ["double_buffers", "one_token", "half"])
def test_random_reader_errors_never_hang_or_corrupt(cache: str) -> None:
    with make_session(cache) as session:
        poison(session)
        count = iter(range(1_000_000))

        def fail(layer: int, expert: int) -> None:
            if next(count) % 5 == 3:
                raise StoreError("unreadable")

        session.store.before_read = fail  # type: ignore[attr-defined]
        failures = 0
        for seed in range(80):
            layer, batch = seed % L, token_batch(seed, 1 + (seed * 5) % 24)
            try:
                out = in_time(lambda b=batch, i=layer: session.experts(i, *b))
            except TransferError:
                failures += 1
                continue
            assert torch.equal(out, reference(MODULES[layer], *batch))
        assert 0 < failures < 80


def test_close_wakes_a_waiting_caller() -> None:
    session = make_session("half", store=SlowStore(ram_store(LAYERS)))
    transfer: Any = session.engine.transfer
    hold, waiting, wait_any = threading.Event(), threading.Event(), transfer.wait_any
    session.store.before_read = lambda layer, expert: hold.wait(PATIENCE_S)  # type: ignore[attr-defined]

    def wait(awaited: Any) -> Any:
        waiting.set()
        return wait_any(awaited)

    def close() -> None:
        waiting.wait(PATIENCE_S)
        session.close()

    transfer.wait_any = wait
    closing = threading.Thread(target=close)
    closing.start()
    # It has asked for its reads already, which are cancelled, or is just about to ask for more.
    with pytest.raises(TransferError, match=r"cancelled|closed"):
        in_time(lambda: session.experts(0, *token_batch(0, 1)))
    hold.set()  # no read ended before: it is closing that woke the caller
    closing.join()
    session.close()


def test_second_caller_waits_for_the_first(session: Session) -> None:
    batches = [token_batch(seed, 1) for seed in range(8)]
    expected = [reference(MODULES[0], *batch) for batch in batches]
    failures: list[int] = []

    def call(index: int) -> None:
        for _ in range(20):
            if not torch.equal(session.experts(0, *batches[index]), expected[index]):
                failures.append(index)

    threads = [threading.Thread(target=call, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not failures
    assert not any(thread.is_alive() for thread in threads)


def test_all_misses_of_a_layer_are_read_at_once() -> None:
    with make_session("half", store=SlowStore(ram_store(LAYERS))) as session:
        together = threading.Barrier(K, timeout=PATIENCE_S)
        session.store.before_read = lambda layer, expert: together.wait()  # type: ignore[attr-defined]
        in_time(lambda: session.experts(0, *token_batch(0, 1)))


def test_stall_is_the_time_spent_waiting() -> None:
    with make_session("half", store=SlowStore(ram_store(LAYERS))) as session:
        let_waits_last(session, 0.05)
        session.experts(0, *token_batch(0, 1))
        first = session.stats.layers[0]
        assert first.stall_ms == 50.0
        assert first.stall_bytes == first.demand_bytes == K * RECORD
        session.experts(0, *token_batch(0, 1))
        stats = session.stats
        assert stats.layers[0].stall_ms == stats.total.stall_ms == 50.0, "hits wait for nothing"
        assert stats.read_busy_ms == 50.0


def in_time(call: Any, seconds: float = PATIENCE_S) -> Any:
    """Return what `call` returns or raises; fail when it takes longer."""
    result: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            result.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    started_s = time.monotonic()
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"hangs for {time.monotonic() - started_s:.0f} s"
    if errors:
        raise errors[0]
    return result[0]


def test_bytes_that_come_while_the_caller_computes_are_not_waited_for() -> None:
    with make_session("half") as session:
        residency: Any = session.engine.residency
        residency._stalls.extend([(0.0, 1.0), (2.0, 3.0)])
        read = Read(0, 0, torch.empty(800, dtype=torch.uint8), speculative=False)
        read.state, read.started_s, read.finished_s = DONE, 0.5, 2.5
        assert residency._stalled_bytes(read) == 400
