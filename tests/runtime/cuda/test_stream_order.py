"""Rewritten graphs give the plain model's tokens and have no unordered pair; planted bugs have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
import torch

from specmoe_compile.kernels.plan_cache.op import MAX_CHOICES
from specmoe_compile.options import SessionOptions
from specmoe_compile.runtime.cuda import decoders
from specmoe_compile.runtime.cuda.decode_gather import GatherDecoder, _Fetch
from specmoe_compile.runtime.cuda.vectors import DeviceVectors
from tests.helpers import tiny_qwen3_moe
from tests.runtime.cuda.device_models import decide_trials
from tests.runtime.cuda.order_checker import unordered_pairs
from tests.runtime.cuda.recorded import Prompt, Recorder
from tests.runtime.cuda.stream_model import StreamModel

GATHER, COPY = SessionOptions(transfer="gather"), SessionOptions(transfer="copy")
DECODE, PREFILL = Prompt(), Prompt(length=20, new_tokens=2)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """In place of the suite's: what `recorder` has compiled stays."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def plain() -> Any:
    return tiny_qwen3_moe()


@pytest.fixture(scope="module")
def recorder(plain: Any) -> Iterator[Recorder]:
    """One model with the default rewrites; sessions differ, its graphs do not."""
    yield Recorder(plain)
    torch._dynamo.reset()


def check(
    recorder: Recorder, plain: Any, prompt: Prompt, config: SessionOptions, **session: Any
) -> None:
    """Generate under late, poisoned streams; compare tokens, and look for unordered pairs."""
    what = (config.transfer, session)
    streams = StreamModel()
    with recorder.session(streams, config=config, **session) as opened:
        tokens = recorder.run(prompt, opened)
        assert opened.engine.transfer == config.transfer
    assert torch.equal(tokens, prompt.generate(plain)), what
    assert {"compute", "demand"} <= {op.stream for op in streams.ops}, what
    assert any(op.name == "aten.mm.default" for op in streams.ops), "the graph's own ops are there"
    assert not unordered_pairs(streams.ops), what


@pytest.mark.usefixtures("prompts_left_to_the_model")
def test_decode_steps_have_no_unordered_pair(plain: Any, recorder: Recorder) -> None:
    for config in (GATHER, COPY):
        for slots, policy in ((2, "lru"), (3, "lfu"), (4, "lru"), (7, "adaptive")):
            check(recorder, plain, DECODE, config, slots=slots, cache_policy=policy)
    assert recorder.prefetches > 0


def test_prefill_has_no_unordered_pair(plain: Any, recorder: Recorder) -> None:
    for config in (GATHER, COPY):
        check(recorder, plain, PREFILL, config)


def test_batches_in_a_static_cache_have_no_unordered_pair(plain: Any) -> None:
    recorder = Recorder(plain)
    prompt = Prompt(batch=3, static=True)
    for config in (GATHER, COPY):
        for slots in (3, 7):  # with 3 they do not fit, and pass by the slots
            check(recorder, plain, prompt, config, slots=slots)


@pytest.mark.usefixtures("prompts_left_to_the_model")
@pytest.mark.parametrize("options", [{"lookahead": 2}, {"prefetch": False}])
def test_other_rewrites_have_no_unordered_pair(options: dict[str, Any], plain: Any) -> None:
    recorder = Recorder(plain, **options)
    for transfer in ("gather", "copy"):
        config = SessionOptions(transfer=transfer, **options)  # type: ignore[arg-type]
        check(recorder, plain, Prompt(new_tokens=2, static=True), config)
    assert (recorder.prefetches > 0) == options.get("prefetch", True)


@pytest.mark.usefixtures("prompts_left_to_the_model")
def test_default_vectors_leave_no_unordered_pair(recorder: Recorder) -> None:
    weak: dict[str, Any] = {"policy": "default_vector", "default_vector_threshold": 0.45}
    tokens: list[torch.Tensor] = []
    # The first one may compile, and learns default vectors meanwhile; the others start alike.
    for transfer, late in (("gather", True), ("gather", True), ("gather", False), ("copy", True)):
        config = SessionOptions(transfer=transfer, **weak)  # type: ignore[arg-type]
        streams = StreamModel(late=late)
        with recorder.session(streams, config=config, slots=2) as opened:
            tokens.append(recorder.run(DECODE, opened))
            assert opened.stats.total.skipped_experts > 0
        assert not unordered_pairs(streams.ops)
    # What `gather` skips does not depend on time; what `copy` skips does.
    assert torch.equal(tokens[1], tokens[2])


@pytest.mark.usefixtures("prompts_left_to_the_model")
def test_committed_generation_has_no_unordered_pair(recorder: Recorder) -> None:
    tokens = []
    # The first one may compile, and learns default vectors meanwhile; the others start alike.
    for transfer, late in (("gather", True), ("gather", True), ("gather", False), ("copy", True)):
        streams = StreamModel(late=late)
        config = SessionOptions(policy="commit", transfer=transfer)  # type: ignore[arg-type]
        with recorder.session(streams, config=config, slots=5) as opened:
            tokens.append(recorder.run(DECODE, opened))
            assert opened.stats.total.skipped_experts > 0
        assert not unordered_pairs(streams.ops)
    # What is executed depends on no time and on no transfer.
    assert torch.equal(tokens[1], tokens[2])
    assert torch.equal(tokens[1], tokens[3])


@pytest.mark.usefixtures("prompts_left_to_the_model")
@pytest.mark.parametrize("pays", [pytest.param(True, marks=pytest.mark.slow), False])
def test_branches_of_copied_steps_have_no_unordered_pair(
    pays: bool, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decide_trials(monkeypatch, predicts=pays)
    recorder = Recorder(plain, transfer="copy")
    blended: list[int] = []
    blend = DeviceVectors.blend

    def counted(vectors: DeviceVectors, layer: int, ids: Any, *others: Any) -> torch.Tensor:
        blended.append(len(ids))
        return blend(vectors, layer, ids, *others)

    monkeypatch.setattr(DeviceVectors, "blend", counted)
    check(recorder, plain, Prompt(static=True), COPY, slots=3)
    assert recorder.branches > 0
    assert (1 in blended) == pays, "tokens of one step"


def dropping(waiter: str, source: str) -> Callable[[str, str], bool]:
    return lambda one, other: (one, other) == (waiter, source)


MISSING_WAITS = {
    "demanded records are gathered before they are planned": (DECODE, "demand", "compute"),
    "predicted records are gathered before they are planned": (DECODE, "prefetch", "compute"),
    "the correction does not wait for its demanded records": (DECODE, "compute", "demand"),
    "the correction does not wait for predicted records": (DECODE, "compute", "prefetch"),
    "a prefill buffer is refilled before its last reader": (PREFILL, "demand", "compute"),
    "a prefill layer is computed before its copy ended": (PREFILL, "compute", "demand"),
}


def test_every_missing_wait_is_seen(recorder: Recorder) -> None:
    for bug, (prompt, waiter, source) in MISSING_WAITS.items():
        with recorder.session(StreamModel(), config=GATHER) as opened:
            recorder.run(prompt, opened)
            assert (waiter, source) in recorder.streams.waits, bug
            assert not unordered_pairs(recorder.streams.ops), bug
            recorder.streams.restart(dropping(waiter, source))
            recorder.run(prompt, opened)
            pairs = unordered_pairs(recorder.streams.ops)
            assert any({one.stream, other.stream} == {waiter, source} for one, other in pairs), bug


class PlansAside(GatherDecoder):
    """Plans on the side stream: then the gather needs no wait, but its slots have readers."""

    def _fetch(
        self, stream: Literal["demand", "prefetch"], layer: int, ids: Any, most: int = MAX_CHOICES
    ) -> _Fetch:
        streams: Any = self._streams
        with streams.at_once(stream):
            plan = self._plan(layer, ids, speculative=stream == "prefetch", max_records=most)
        with streams.on(stream):
            torch.ops.specmoe_kernels.gather_experts(
                [self._records[layer]], [self._cache.places[layer]], *plan[2:]
            )
        return _Fetch(streams.record(stream), plan, ids.numel())


@pytest.mark.usefixtures("prompts_left_to_the_model")
def test_a_slot_that_is_refilled_before_its_last_reader_is_seen(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoders, "GatherDecoder", PlansAside)
    with recorder.session(StreamModel(), config=GATHER) as opened:
        recorder.run(DECODE, opened)
        pairs = unordered_pairs(recorder.streams.ops)
    readers = ("specmoe_kernels.run_resident_experts", "specmoe_kernels.correct_experts")
    assert any(
        one.name == "specmoe_kernels.gather_experts.default" and other.name.startswith(readers)
        for one, other in pairs
    )


@pytest.mark.usefixtures("prompts_left_to_the_model")
def test_a_host_that_does_not_wait_for_its_ids_is_seen(recorder: Recorder) -> None:
    with recorder.session(StreamModel(), config=COPY) as opened:
        right = recorder.run(DECODE, opened)
        recorder.streams.restart(dropping("host", "compute"))
        assert not torch.equal(recorder.run(DECODE, opened), right)
