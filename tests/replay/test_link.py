"""The simulated link: who is served when, and how long it takes."""

from __future__ import annotations

import pytest
import torch

from specmoe_compile.errors import TransferError
from specmoe_compile.replay.link import Link, SimulatedLink
from specmoe_compile.runtime.transfer.base import CANCELLED, DONE, QUEUED, RUNNING

MB = torch.empty(1_000_000, dtype=torch.uint8, device="meta")
MS = 1e-3


def link_of(**kwargs: float | int | None) -> SimulatedLink:
    """A link that moves a record of 1 MB in 1 ms."""
    return SimulatedLink(Link(gbps=1.0, **kwargs), largest_record_bytes=1_000_000)


def requests(*experts: int) -> list[tuple[int, torch.Tensor]]:
    return [(expert, MB) for expert in experts]


def test_reads_in_progress_share_the_bandwidth() -> None:
    link = link_of(readers=2)
    reads = link.start(0, requests(0, 1)).reads
    link.advance(1.5 * MS)
    assert [read.state for read in reads.values()] == [RUNNING, RUNNING]
    link.advance(0.5 * MS)
    assert [read.state for read in reads.values()] == [DONE, DONE]
    assert link.now_s() == pytest.approx(2 * MS)
    assert link.busy_ms == pytest.approx(2.0)


def test_one_read_gets_no_more_than_its_most() -> None:
    link = link_of(one_read_gbps=0.25)
    link.wait_any(link.start(0, requests(0)).reads.values())
    assert link.now_s() == pytest.approx(4 * MS)
    # Two at once, each at its own most, since the link has room for four.
    reads = link.start(0, requests(1, 2)).reads
    link.wait_any((reads[2],))
    assert reads[1].state == DONE and link.now_s() == pytest.approx(8 * MS)


def test_latency_moves_nothing_and_overlaps_other_reads() -> None:
    link = link_of(latency_us=500, readers=2)
    first = link.start(0, requests(0)).reads[0]
    link.advance(1.0 * MS)
    second = link.start(0, requests(1)).reads[1]
    link.wait_any((first,))
    assert link.now_s() == pytest.approx(1.5 * MS), "the second one's latency took bandwidth"
    link.wait_any((second,))
    assert link.now_s() == pytest.approx(2.5 * MS)


def test_queued_reads_begin_as_readers_are_free() -> None:
    link = link_of(readers=1)
    reads = link.start(0, requests(0, 1)).reads
    link.advance(0.5 * MS)
    assert reads[1].state == QUEUED
    link.wait_any((reads[1],))
    assert reads[0].finished_s == reads[1].started_s == pytest.approx(1 * MS)
    assert link.now_s() == pytest.approx(2 * MS)


def test_demand_goes_before_guesses_that_wait() -> None:
    link = link_of(readers=1)
    guesses = link.start(1, requests(0, 1), speculative=True).reads
    demand = link.start(0, requests(5)).reads[5]
    link.wait_any((guesses[1],))
    assert guesses[0].finished_s == pytest.approx(1 * MS), "a read that began is not interrupted"
    assert demand.finished_s == pytest.approx(2 * MS)
    assert guesses[1].finished_s == pytest.approx(3 * MS)


def test_a_promoted_guess_begins_at_once_where_a_reader_is_free() -> None:
    link = link_of(readers=2)
    link._queue.max_guesses = 1
    reads = link.start(1, requests(0, 1), speculative=True).reads
    assert reads[1].state == QUEUED
    assert link.promote(reads[1])
    assert reads[1].state == RUNNING and not reads[1].speculative


def test_cancel_takes_back_what_has_not_begun() -> None:
    link = link_of(readers=1)
    ticket = link.start(1, requests(0, 1, 2), speculative=True)
    assert link.cancel(ticket, (0, 1)) == [1]
    link.wait_any((ticket.reads[2],))
    assert ticket.reads[1].state == CANCELLED
    assert link.now_s() == pytest.approx(2 * MS)


def test_waiting_for_what_nobody_started_is_an_error() -> None:
    link = link_of(readers=1)
    ticket = link.start(1, requests(0, 1))
    other = link_of()
    with pytest.raises(TransferError, match="nobody started"):
        other.wait_any(ticket.reads.values())


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"gbps": 0.0}, "gbps=0.0"),
        ({"gbps": float("inf")}, "gbps=inf"),
        ({"gbps": 1.0, "one_read_gbps": -1.0}, "one_read_gbps=-1.0"),
        ({"gbps": 1.0, "latency_us": float("nan")}, "latency_us=nan"),
        ({"gbps": 1.0, "readers": 0}, "readers=0"),
    ],
)
def test_impossible_links_are_refused(values: dict[str, float], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        Link(**values)
