"""Ranges name layer and phase, for Nsight and for torch.profiler, and cost nothing while off."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from specmoe_compile.options import SessionOptions
from specmoe_compile.runtime.session import Session
from specmoe_compile.system import nvtx
from tests.helpers import tiny_qwen3_moe
from tests.runtime.cuda.device_models import on_device
from tests.runtime.cuda.stream_model import StreamModel
from tests.runtime.fakes import token_batch
from tests.runtime.test_session import make_session

PHASES = {
    "cpu": ["L1/prefetch", "L1/wait", "L1/fetch", "L1/resident", "L1/correct"],
    "gather": ["L1/prefetch", "L1/wait", "L1/fetch", "L1/resident", "L1/correct"],
    "copy": ["L1/prefetch", "L1/wait", "L1/ids", "L1/fetch", "L1/resident", "L1/correct"],
}


@pytest.fixture(autouse=True)
def _off_again() -> Iterator[None]:
    yield
    nvtx.enable(False)


@pytest.fixture(params=PHASES)
def session(request: pytest.FixtureRequest) -> Iterator[tuple[str, Any]]:
    """A session of each kind that has run nothing."""
    if request.param == "cpu":
        with make_session("half") as on_cpu:
            yield request.param, on_cpu
    else:
        _, opened = on_device(tiny_qwen3_moe(layers=2), StreamModel(), slots=4)
        with opened:
            yield request.param, opened


def configure(name: str, session: Session, *, on: bool) -> None:
    transfer: Any = "auto" if name == "cpu" else name
    session.configure(SessionOptions(nvtx=on, transfer=transfer))


def one_layer(name: str, session: Session) -> None:
    """The ops of a layer that is predicted from the one before."""
    if name == "cpu":
        x, ids, weights = token_batch(0, 1)
    else:
        x, ids, weights = torch.randn(1, 64), torch.tensor([[0, 1]]), torch.ones(1, 2)
    session.blend_default_vectors(0, ids, weights, x)
    ticket = session.start_prefetch(1, ids[:, :1], weights[:, :1])
    state = session.wait_prefetch(ticket, 1, ids)
    partial = session.run_resident_experts(1, x, ids, weights, state)
    session.correct_experts(1, partial, x, ids, weights, state)


def test_ranges_are_shared_and_empty_while_off() -> None:
    assert not nvtx.enabled()
    assert nvtx.layer_range(0, "wait") is nvtx.layer_range(1, "prefetch")


def test_sessions_mark_their_phases(
    session: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = pytest.importorskip("nvtx")
    marked: list[str] = []
    annotate, start, end = library.annotate, library.start_range, library.end_range

    def record(message: str) -> object:
        marked.append(message)
        return annotate(message)

    def record_start(message: str) -> object:
        marked.append(f"begin {message}")
        return start(message)

    def record_end(number: Any) -> None:
        marked.append("end")
        end(number)

    monkeypatch.setattr(library, "annotate", record)
    monkeypatch.setattr(library, "start_range", record_start)
    monkeypatch.setattr(library, "end_range", record_end)
    configure(*session, on=True)
    one_layer(*session)
    assert marked[:3] == ["specmoe/L0/blend", "begin specmoe/L0/lookahead", "end"]
    assert marked[3:] == [f"specmoe/{phase}" for phase in PHASES[session[0]]]


def test_torch_profiler_shows_them_without_nvtx(session: tuple[str, Any]) -> None:
    configure(*session, on=False)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        one_layer(*session)
    assert not nvtx.enabled()
    names = {event.name for event in recorded.events()}
    assert {f"specmoe/{phase}" for phase in ["L0/blend", *PHASES[session[0]]]} <= names


def test_both_can_be_on() -> None:
    pytest.importorskip("nvtx")
    nvtx.enable()
    with profile(activities=[ProfilerActivity.CPU]) as recorded, nvtx.layer_range(3, "wait"):
        pass
    assert "specmoe/L3/wait" in {event.name for event in recorded.events()}


def test_nsight_turns_them_on() -> None:
    pytest.importorskip("nvtx")
    code = "from specmoe_compile.system import nvtx; print(nvtx.enabled())"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("NSYS")}
    for extra, expected in (({}, "False"), ({"NSYS_PROFILING_SESSION_ID": "1"}, "True")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**environment, **extra},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == expected
