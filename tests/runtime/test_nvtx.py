"""NVTX ranges name layer and phase, and cost nothing while they are off."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from specmoe_compile.runtime import nvtx
from specmoe_compile.runtime.speculation import SpeculationConfig
from tests.runtime.fakes import token_batch
from tests.runtime.test_session import make_session


@pytest.fixture(autouse=True)
def _off_again() -> Iterator[None]:
    yield
    nvtx.enable(False)


def test_ranges_are_shared_and_empty_while_off() -> None:
    assert not nvtx.enabled()
    assert nvtx.layer_range(0, "wait") is nvtx.layer_range(1, "prefetch")


def test_session_marks_its_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    library = pytest.importorskip("nvtx")
    marked: list[str] = []
    annotate = library.annotate

    def record(message: str) -> object:
        marked.append(message)
        return annotate(message)

    monkeypatch.setattr(library, "annotate", record)
    with make_session("half") as session:
        session.configure(SpeculationConfig(nvtx=True))
        x, ids, weights = token_batch(0, 1)
        session.experts(2, x, ids, weights)
        state = session.wait_prefetch(session.start_prefetch(1, ids, weights), 1, ids)
        partial = session.run_resident_experts(1, x, ids, weights, state)
        session.correct_experts(1, partial, x, ids, weights, state)
    phases = ["L2/experts", "L1/prefetch", "L1/wait", "L1/resident", "L1/correct"]
    assert marked == [f"specmoe/{phase}" for phase in phases]
