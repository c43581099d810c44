"""Reader threads: order, cancelling, errors and the end."""

from __future__ import annotations

import itertools
import linecache
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from specmoe_compile.errors import StoreError, TransferError
from specmoe_compile.runtime.store.disk import DiskStore
from specmoe_compile.runtime.store.writer import pack_records
from specmoe_compile.runtime.transfer import disk
from specmoe_compile.runtime.transfer.base import CANCELLED, DONE, QUEUED, RUNNING, Read, Ticket
from specmoe_compile.runtime.transfer.disk import DiskTransfer
from specmoe_compile.runtime.transfer.read_queue import ReadQueue
from specmoe_compile.system.aligned import aligned_empty
from tests.helpers import PATIENCE_S
from tests.runtime.fakes import (
    E,
    K,
    ModuleSource,
    SlowStore,
    experts_layer,
    qwen_experts,
    ram_store,
)

LAYERS = [experts_layer(index, qwen_experts(seed=index)) for index in range(2)]
RECORD = LAYERS[0].layout.record_bytes
RECORDS = ram_store(LAYERS)


def buffers(experts: list[int]) -> list[tuple[int, Tensor]]:
    return [(expert, torch.zeros(RECORD, dtype=torch.uint8)) for expert in experts]


def held(event: threading.Event, *experts: int) -> Callable[[int, int], None]:
    """What a store does before a read: those of these experts wait for the event; none: all do."""

    def before_read(layer: int, expert: int) -> None:
        if not experts or expert in experts:
            event.wait(PATIENCE_S)

    return before_read


@pytest.fixture
def store() -> SlowStore:
    return SlowStore(RECORDS)


@pytest.fixture
def transfer(store: SlowStore) -> Iterator[DiskTransfer]:
    """One reader, so that the order of reads is the order of service."""
    made = DiskTransfer(store, reader_threads=1)
    yield made
    made.close()


@pytest.fixture
def hold(store: SlowStore, transfer: DiskTransfer) -> Iterator[threading.Event]:
    """Keep the reader busy with expert 7 of layer 1 until the event is set."""
    event = threading.Event()
    store.before_read = held(event)
    transfer.start(1, buffers([7]))
    while not store.reads:
        time.sleep(0.001)
    yield event
    event.set()


def test_records_land_where_they_were_asked_for(store: SlowStore) -> None:
    transfer = DiskTransfer(store, reader_threads=3)
    requests = buffers(list(range(E)))
    ticket = transfer.start(1, requests)
    ticket.wait()
    assert ticket.done
    for expert, destination in requests:
        assert torch.equal(destination, RECORDS.record(1, expert))
    transfer.close()


def test_demand_goes_before_speculative(
    store: SlowStore, transfer: DiskTransfer, hold: threading.Event
) -> None:
    guess = transfer.start(0, buffers([0, 1]), speculative=True)
    demand = transfer.start(0, buffers([2, 3]))
    hold.set()
    guess.wait()
    demand.wait()
    assert store.reads == [(1, 7), (0, 2), (0, 3), (0, 0), (0, 1)]


def test_promoted_guess_is_read_once_and_among_demand(
    store: SlowStore, transfer: DiskTransfer, hold: threading.Event
) -> None:
    guess = transfer.start(0, buffers([0, 1]), speculative=True)
    transfer.start(0, buffers([2]))
    assert transfer.promote(guess.reads[1])
    assert not transfer.promote(guess.reads[1])
    hold.set()
    guess.wait()
    assert store.reads == [(1, 7), (0, 2), (0, 1), (0, 0)]


def test_cancel_takes_back_what_has_not_started(
    store: SlowStore, transfer: DiskTransfer, hold: threading.Event
) -> None:
    ticket = transfer.start(0, buffers([0, 1, 2]))
    assert transfer.cancel(ticket, (1,)) == [1]
    assert transfer.cancel(ticket, (1,)) == []
    hold.set()
    ticket.wait(0)
    ticket.wait(2)
    with pytest.raises(TransferError, match="cancelled"):
        ticket.wait(1)
    assert ticket.done
    assert (0, 1) not in store.reads
    assert transfer.cancel(ticket) == []


def test_few_guesses_are_in_progress_at_once(store: SlowStore) -> None:
    """Small records: as many as fit the limit; a demand read finds a free reader."""
    transfer = DiskTransfer(store, reader_threads=2)
    transfer._queue.max_guesses = 1
    event = threading.Event()
    store.before_read = held(event, 0, 1, 2, 3)
    guess = transfer.start(0, buffers([0, 1, 2]), speculative=True)
    demand = transfer.start(0, buffers([5, 6]))
    demand.wait()
    assert [read.state for read in guess.reads.values()].count(QUEUED) >= 2
    event.set()
    guess.wait()
    transfer.close()


def test_guesses_wait_until_one_demand_read_is_left(store: SlowStore) -> None:
    transfer = DiskTransfer(store, reader_threads=4)
    events = [threading.Event() for _ in range(E)]
    store.before_read = lambda layer, expert: events[expert].wait(PATIENCE_S) and None
    demand = transfer.start(0, buffers([0, 1]))
    guess = transfer.start(1, buffers([5]), speculative=True).reads[5]
    while len(store.reads) < 2:
        time.sleep(0.001)
    assert guess.state == QUEUED
    events[0].set()
    demand.wait(0)
    while guess.state == QUEUED:
        time.sleep(0.001)
    assert not demand.reads[1].final, "one demand read was left"
    for event in events:
        event.set()
    demand.wait()
    transfer.close()


def test_a_reader_that_asks_gets_no_guess_beside_two_demand_reads() -> None:
    queue = ReadQueue(readers=4, largest_record_bytes=RECORD)
    place = torch.empty(0, dtype=torch.uint8)
    demand = [Read(0, expert, place, speculative=False) for expert in range(2)]
    guess = Read(1, 5, place, speculative=True)
    queue.add([guess], speculative=True)
    queue.add(demand, speculative=False)
    assert [queue.begin_or_none(0.0) for _ in range(3)] == [*demand, None]
    assert queue.finish(demand[0], 1.0), "another may begin now"
    assert queue.begin_or_none(1.0) is guess


def test_promoted_guess_begins_on_an_idle_reader(store: SlowStore) -> None:
    """The first guess holds one reader and the place of guesses; the other reader is idle."""
    transfer = DiskTransfer(store, reader_threads=2)
    transfer._queue.max_guesses = 1
    event = threading.Event()
    store.before_read = held(event, 0)
    guess = transfer.start(0, buffers([0, 1]), speculative=True)
    while guess.reads[0].state == QUEUED:
        time.sleep(0.001)
    assert transfer.promote(guess.reads[1])
    guess.wait(1)
    assert guess.reads[0].state == RUNNING, "it had to wait for the guess before it"
    event.set()
    guess.wait()
    transfer.close()


def test_error_reaches_every_waiter_and_spares_the_others(
    store: SlowStore, transfer: DiskTransfer
) -> None:
    def fail(layer: int, expert: int) -> None:
        if expert == 1:
            raise StoreError("bad sector")

    store.before_read = fail
    ticket = transfer.start(0, buffers([0, 1, 2]))
    for _ in range(2):
        with pytest.raises(
            TransferError, match="expert 1 of MoE layer 0 failed: bad sector"
        ) as got:
            ticket.wait(1)
        assert isinstance(got.value.__cause__, StoreError)
    ticket.wait(0)
    ticket.wait(2)
    with pytest.raises(TransferError):
        ticket.wait()
    transfer.start(0, buffers([3])).wait()


def test_wait_any_returns_the_first_that_arrives(store: SlowStore) -> None:
    transfer = DiskTransfer(store, reader_threads=2)
    event = threading.Event()
    store.before_read = held(event, 0)
    reads = transfer.start(0, buffers([0, 1])).reads
    assert transfer.wait_any(reads.values()).expert == 1
    event.set()
    assert transfer.wait_any([reads[0]]).state == DONE
    transfer.close()


@pytest.fixture
def others() -> set[threading.Thread]:
    """Threads that are there before a transfer is: other tests' sessions have readers too."""
    return set(threading.enumerate())


def test_close_cancels_what_is_queued_and_ends_the_threads(
    others: set[threading.Thread], store: SlowStore, transfer: DiskTransfer, hold: threading.Event
) -> None:
    ticket = transfer.start(0, buffers([0]))
    readers = set(threading.enumerate()) - others
    closing = threading.Thread(target=transfer.close)
    closing.start()
    while ticket.reads[0].state == QUEUED:  # taken back at once, though a read is under way
        time.sleep(0.001)
    hold.set()
    closing.join()
    transfer.close()
    assert ticket.reads[0].state == CANCELLED
    assert readers and not any(thread.is_alive() for thread in readers)
    with pytest.raises(TransferError):
        ticket.wait()
    with pytest.raises(TransferError, match="closed"):
        transfer.start(0, buffers([1]))


def test_busy_time_is_the_time_in_which_something_is_read(
    store: SlowStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1.0]
    monkeypatch.setattr(DiskTransfer, "now_s", lambda self: clock[0])
    transfer = DiskTransfer(store, reader_threads=2)
    read = [threading.Event() for _ in range(3)]
    store.before_read = lambda layer, expert: read[expert].wait(PATIENCE_S) and None

    def begin(experts: list[int]) -> Ticket:
        ticket = transfer.start(0, buffers(experts))
        while any(started.state == QUEUED for started in ticket.reads.values()):
            time.sleep(0.001)
        return ticket

    assert transfer.busy_ms == 0.0
    both = begin([0, 1])
    for expert, now_s in ((0, 2.0), (1, 4.0)):
        clock[0] = now_s
        read[expert].set()
        both.wait(expert)
    clock[0] = 9.0
    assert transfer.busy_ms == 3000.0, "two at once count once, and a pause does not count"
    last = begin([2])
    clock[0] = 9.5
    assert transfer.busy_ms == 3500.0, "what is under way counts"
    read[2].set()
    last.wait()
    clock[0] = 20.0
    assert transfer.busy_ms == 3500.0
    transfer.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_reads_go_on_in_a_forked_process(
    store: SlowStore, transfer: DiskTransfer, hold: threading.Event
) -> None:
    """What a reader was busy with begins again there, and in the parent it goes on."""
    busy = transfer.start(1, buffers([7]))
    ((_, destination),) = requests = buffers([3])
    queued = transfer.start(0, requests)
    child = os.fork()
    if child == 0:
        signal.alarm(int(PATIENCE_S))
        hold.set()
        busy.wait()
        queued.wait()
        os._exit(0 if torch.equal(destination, RECORDS.record(0, 3)) else 3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not destination.any(), "the child's memory is its own"
    hold.set()
    queued.wait()
    assert torch.equal(destination, RECORDS.record(0, 3))


def test_needs_a_reader(store: SlowStore) -> None:
    with pytest.raises(ValueError, match="reader_threads=0"):
        DiskTransfer(store, reader_threads=0)


def test_reads_a_store_on_disk(tmp_path: Path) -> None:
    pack_records(ModuleSource(LAYERS, K), tmp_path / "store", progress=False)
    store = DiskStore.open(tmp_path / "store")
    transfer = DiskTransfer(store, reader_threads=4)
    bank = aligned_empty(E * RECORD).view(E, RECORD)
    transfer.start(1, [(expert, bank[expert]) for expert in range(E)]).wait()
    for expert in range(E):
        assert torch.equal(bank[expert], RECORDS.record(1, expert))
    transfer.close()
    store.close()


def test_ctrl_c_at_any_line_of_a_wait_is_ctrl_c_and_the_next_wait_works() -> None:
    """It must not release the readers' lock once more, nor hide behind an error of its own."""
    transfer = DiskTransfer(SlowStore(RECORDS, delay_s=lambda: 0.005), reader_threads=2)
    lines_left = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal lines_left
        if frame.f_code.co_filename not in (disk.__file__, threading.__file__):
            return None
        source = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        if event == "line" and not source.startswith("with "):  # where Python takes no signals
            lines_left -= 1
            if lines_left == 0:
                raise KeyboardInterrupt
        return trace

    for line in itertools.count(1):
        ticket, lines_left = transfer.start(0, buffers([3])), line
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            transfer.wait_any(ticket.reads.values())
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        ticket.wait()
        assert torch.equal(ticket.reads[3].destination, RECORDS.record(0, 3))
        if lines_left > 0:
            break
    assert line > 8
    transfer.close()
