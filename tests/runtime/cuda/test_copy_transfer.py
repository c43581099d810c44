"""The copy transfer: demanded records first, guesses a few at a time, cancelled without a trace."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from specmoe_compile.errors import SpecMoEError
from specmoe_compile.options import CompileOptions, SessionOptions
from specmoe_compile.runtime.cuda.decode_copy import GUESSES_IN_FLIGHT, CopyDecoder
from specmoe_compile.runtime.cuda.rates import TransferRates, measure_rates
from specmoe_compile.runtime.session import Session
from tests.helpers import greedy, prompts, tiny_qwen3_moe
from tests.runtime.cuda.device_models import decide_trials, on_device
from tests.runtime.cuda.order_checker import unordered_pairs
from tests.runtime.cuda.stream_model import StreamModel
from tests.runtime.test_session import make_session

COPY = SessionOptions(transfer="copy", auto_off=False)
NEVER = 10**9


@pytest.fixture(scope="module")
def plain() -> Any:
    return tiny_qwen3_moe(layers=2)


@pytest.fixture
def opened(plain: Any, request: pytest.FixtureRequest) -> Iterator[tuple[Session, Any]]:
    """A session with the copy transfer, and its streams."""
    streams = StreamModel(**getattr(request, "param", {}))
    _, session = on_device(plain, streams, slots=4)
    with session:
        session.configure(COPY)
        yield session, streams


def routing(*experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, ids and weights of one token."""
    generator = torch.Generator().manual_seed(sum(experts))
    ids = torch.tensor([experts])
    return torch.randn(1, 64, generator=generator), ids, torch.full(ids.shape, 0.5)


def step(session: Session, layer: int, *experts: int) -> torch.Tensor:
    return session.experts(layer, *routing(*experts))


def copies(streams: StreamModel, stream: str) -> int:
    return sum(op.stream == stream for op in streams.ops)


def expected(plain: Any, layer: int, *experts: int) -> torch.Tensor:
    with torch.no_grad():
        return plain.model.layers[layer].mlp.experts(*routing(*experts))  # type: ignore[no-any-return]


def test_outputs_are_those_of_the_module_whatever_was_guessed(
    plain: Any, opened: tuple[Session, StreamModel]
) -> None:
    session, streams = opened
    _, ids, weights = routing(1, 2, 6)
    for experts in ((0, 1), (2, 3), (6, 7), (1, 5)):
        session.start_prefetch(1, ids, weights)
        for layer in (0, 1):
            torch.testing.assert_close(
                step(session, layer, *experts), expected(plain, layer, *experts)
            )
    streams.finish()
    assert not unordered_pairs(streams.ops)
    assert session.stats.total.prefetches > 0


@pytest.mark.parametrize("opened", [{"patience": NEVER}], indirect=True)
def test_guesses_that_have_not_started_are_cancelled_and_leave_no_trace(
    opened: tuple[Session, StreamModel],
) -> None:
    session, _ = opened
    step(session, 1, 0, 1)
    decoder: Any = session.engine._decoder
    before = list(decoder._table.slot_of[1])
    session.start_prefetch(1, *routing(4, 5)[1:])
    assert list(decoder._table.slot_of[1]) == before, "the host does not have the guess yet"
    decoder._streams._patience = 1  # from now on the host sees what has ended
    step(session, 1, 0, 1)
    layer = session.stats.layers[1]
    assert (layer.prefetches, layer.cancelled_prefetches) == (0, 2)
    assert list(decoder._table.slot_of[1]) == before


class Journal:
    """Events in the order of issue; the host sees them as reached when told so."""

    capturing = False

    def __init__(self) -> None:
        self.issued: list[str] = []
        self.ended: set[int] = set()
        self._stream = "compute"

    def record(self, stream: str) -> Any:
        self.issued.append(stream)
        return SimpleNamespace(number=len(self.issued) - 1, stream=stream)

    def reached(self, event: Any) -> bool:
        return event.stream == "compute" or event.number in self.ended

    def wait(self, stream: str, event: Any) -> None:
        pass

    def synchronize(self, event: Any) -> None:
        pass

    def on(self, stream: str) -> Any:
        return StreamModel(late=False).on(stream)

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    def to_device(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        return tensor.clone()

    def end(self, stream: str) -> None:
        """End all that was issued on a stream."""
        self.ended |= {n for n, name in enumerate(self.issued) if name == stream}

    def count(self, stream: str) -> int:
        return self.issued.count(stream)


@pytest.fixture
def journal(plain: Any) -> Iterator[tuple[CopyDecoder, Journal, Session]]:
    streams: Any = Journal()
    _, session = on_device(plain, streams, slots=7)
    with session:
        session.configure(COPY)
        yield session.engine._decoder, streams, session  # type: ignore[misc]


def test_few_guesses_are_on_the_link_at_once(
    journal: tuple[CopyDecoder, Journal, Session],
) -> None:
    decoder, streams, _ = journal
    decoder.prefetch(1, torch.tensor([[3, 4, 5, 6, 7]]))
    assert streams.count("prefetch") == GUESSES_IN_FLIGHT
    decoder.issue_guesses()
    assert streams.count("prefetch") == GUESSES_IN_FLIGHT
    streams.end("prefetch")
    decoder.issue_guesses()
    assert streams.count("prefetch") == 2 * GUESSES_IN_FLIGHT


def test_a_guess_brings_no_more_records_than_it_may(
    journal: tuple[CopyDecoder, Journal, Session],
) -> None:
    decoder, streams, session = journal
    decoder.demand(1, torch.tensor([[3]]))
    streams.end("demand")
    decoder.prefetch(1, torch.tensor([[3, 4, 5, 6]]), 2)
    for _ in range(3):
        streams.end("prefetch")
        decoder.issue_guesses()
    assert streams.count("prefetch") == 2, "3 is there and costs nothing"
    assert session.stats.layers[1].prefetches == 2


def test_no_guess_starts_while_a_demanded_record_is_on_the_link(
    journal: tuple[CopyDecoder, Journal, Session],
) -> None:
    decoder, streams, _ = journal
    decoder.demand(0, torch.tensor([[0, 1]]))
    assert streams.count("demand") == 2
    decoder.prefetch(1, torch.tensor([[3, 4]]))
    assert streams.count("prefetch") == 0
    streams.end("demand")
    decoder.issue_guesses()
    assert streams.count("prefetch") == 2


def test_a_demand_keeps_what_is_on_its_way_and_cancels_the_rest(
    journal: tuple[CopyDecoder, Journal, Session],
) -> None:
    decoder, streams, session = journal
    decoder.prefetch(1, torch.tensor([[3, 4, 5, 6]]))
    plan = decoder.demand(1, torch.tensor([[3, 5]]))
    layer = session.stats.layers[1]
    assert (layer.prefetches, layer.late_prefetches) == (2, 1)
    assert (layer.hits, layer.misses, layer.cancelled_prefetches) == (1, 1, 2)
    assert streams.count("demand") == 1, "5 is fetched at once, 6 not at all"
    assert (plan.present < 0).all()
    assert (plan.late >= 0).all()
    assert [arrival.stream for arrival in plan.arrivals] == ["prefetch", "demand"]


def test_the_correction_waits_for_its_own_misses_only(
    journal: tuple[CopyDecoder, Journal, Session],
) -> None:
    decoder, streams, _ = journal
    decoder.demand(1, torch.tensor([[0, 1]]))
    streams.end("demand")
    decoder.prefetch(1, torch.tensor([[3, 4]]))
    plan = decoder.demand(1, torch.tensor([[0, 2]]))
    assert [arrival.stream for arrival in plan.arrivals] == ["demand"]
    assert plan.present[0, 0] >= 0, "what has arrived runs at once"


RATES = TransferRates(record_bytes=4096, records=4, copy_gbps=20.0, gather_gbps=10.0)


@pytest.mark.parametrize(
    ("rates", "captures", "expected"),
    [
        (RATES, False, "copy"),
        (RATES, True, "gather"),
        (TransferRates(record_bytes=4096, records=4, copy_gbps=9, gather_gbps=9), False, "gather"),
    ],
)
def test_auto_measures_once_and_takes_the_faster(
    plain: Any, rates: TransferRates, captures: bool, expected: str
) -> None:
    measured: list[int] = []

    def measure() -> TransferRates:
        measured.append(1)
        return rates

    model, session = on_device(plain, StreamModel(), slots=4, measure=measure)
    with session:
        for _ in range(2):
            session.configure(SessionOptions(mode="reduce-overhead" if captures else "default"))
            assert session.engine.transfer == expected
        assert len(measured) == (0 if captures else 1)
    del model  # a session is closed with its model


def test_switching_keeps_results_and_statistics(plain: Any) -> None:
    streams = StreamModel()
    _, session = on_device(plain, streams, slots=4)
    with session:
        for transfer in ("gather", "copy", "gather"):
            session.configure(SessionOptions(transfer=transfer))  # type: ignore[arg-type]
            torch.testing.assert_close(step(session, 0, 1, 2), expected(plain, 0, 1, 2))
        assert session.stats.layers[0].misses == 6, "each starts with empty slots"
        session.reset_stats()
        assert session.stats.total.misses == 0
    streams.finish()
    assert not unordered_pairs(streams.ops)


def test_copy_is_refused_where_graphs_are_captured(
    opened: tuple[Session, StreamModel],
) -> None:
    session, streams = opened
    streams.capturing = True
    with pytest.raises(SpecMoEError, match="transfer='copy' reads expert ids on the host"):
        step(session, 0, 0, 1)
    session.configure(SessionOptions(mode="reduce-overhead"))
    step(session, 0, 0, 1)
    streams.capturing = False
    with pytest.raises(SpecMoEError, match="captured with transfer='gather'"):
        session.configure(COPY)
    session.configure(SessionOptions())
    assert session.engine.transfer == "gather"


def test_options_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="transfer='dma' is not valid: choose auto or copy or"):
        CompileOptions(transfer="dma")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="transfer='copy' reads expert ids on the host"):
        CompileOptions.from_kwargs({"transfer": "copy"}, "reduce-overhead")
    with (
        make_session("half") as session,
        pytest.raises(ValueError, match="for experts that are computed on a GPU"),
    ):
        session.configure(COPY)


def test_rates_count_the_bytes_of_the_records_over_the_median_time() -> None:
    source, target = torch.ones(8, 4096, dtype=torch.uint8), torch.zeros(2, 4096, dtype=torch.uint8)
    # The first run of each is not timed; then copies take 1 ms, gathers 4 ms.
    now, ticks = 0.0, iter([0.0, 0.0, *[0.0, 1e-3, 0.0, 4e-3] * 7])

    def clock() -> float:
        nonlocal now
        now += next(ticks, 0.0)
        return now

    rates = measure_rates(source, target, synchronize=lambda: None, clock=clock)
    assert torch.equal(target, source[:2])
    assert rates.records == 2
    assert rates.copy_gbps == pytest.approx(2 * 4096 / 1e9 / 1e-3)
    assert rates.gather_gbps == pytest.approx(2 * 4096 / 1e9 / 4e-3)
    assert rates.faster == "copy"


@pytest.mark.parametrize(
    ("configs", "times"),
    [
        ([SessionOptions(), SessionOptions(transfer="gather")], 1),
        ([SessionOptions(mode="reduce-overhead")], 0),
        ([COPY], 0),
    ],
)
def test_one_hint_says_that_a_gpu_wants_graphs(
    configs: list[SessionOptions], times: int, plain: Any, caplog: pytest.LogCaptureFixture
) -> None:
    _, session = on_device(plain, StreamModel(), slots=4)
    with session:
        for config in configs:
            session.configure(config)
    assert caplog.text.count("without CUDA graphs") == times


@pytest.mark.slow
def test_compiled_steps_leave_out_what_the_host_finds_slower(
    plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decide_trials(monkeypatch, predicts=False)
    ids = prompts(1, 5)
    expected = greedy(plain, ids, 8)
    model, session = on_device(plain, StreamModel(late=False), slots=4)
    with session:
        options = {"prefetch": True, "transfer": "copy"}
        compiled = torch.compile(model, backend="specmoe", options=options)
        assert torch.equal(greedy(compiled, ids, 2), expected[:, :7])
        session.start_prefetch = None  # type: ignore[assignment,method-assign]
        assert torch.equal(greedy(compiled, ids, 8), expected)


def test_a_graph_knows_that_the_answer_of_a_device_is_on_the_host() -> None:
    with FakeTensorMode():
        ids = torch.empty(1, 2, dtype=torch.int64, device="cuda")
        answer = torch.ops.specmoe.plan_step(ids, 0, [0, 1], [0, 1])
    assert (answer.device.type, answer.dtype, answer.shape) == ("cpu", torch.bool, (2,))
