"""What takes long says so, to standard error, a logger and listeners; what does not is silent."""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Iterator

import pytest

from specmoe_compile.system import progress
from specmoe_compile.system.progress import Progress, ProgressLines, on_progress, phase
from tests.helpers import PATIENCE_S


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Progress]]:
    """What a listener is told, two seconds being ten milliseconds."""
    monkeypatch.setattr(progress, "QUIET_S", 0.01)
    monkeypatch.setattr(progress, "_TICK_S", 0.01)
    found: list[Progress] = []
    remove = on_progress(found.append)
    yield found
    remove()


def wait_until(said: threading.Event) -> None:
    assert said.wait(PATIENCE_S), "nothing was told"


def told_of(what: str) -> threading.Event:
    """Set as soon as a listener is told of `what`."""
    said = threading.Event()

    def listen(told: Progress) -> None:
        if told.what == what:
            said.set()

    on_progress(listen)
    return said


@pytest.fixture(autouse=True)
def _listeners_of_this_test_only() -> Iterator[None]:
    before = list(progress._listeners)
    yield
    progress._listeners[:] = before


def test_long_work_is_told_of_while_it_runs_and_when_it_ends(
    told: list[Progress], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger=progress.logger.name)
    with phase("packing", 100) as work:
        work.update(40)
        wait_until(told_of("packing"))
    running, last = told[-2], told[-1]
    assert (running.what, running.ended) == ("packing", False)
    assert (running.done_bytes, running.total_bytes) == (40, 100)
    assert last.ended and last.elapsed_s >= running.elapsed_s > 0
    assert [t.ended for t in told].count(True) == 1
    assert caplog.messages[0] == "packing ..." and caplog.messages[-1].startswith("packing took")


def test_short_work_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "QUIET_S", PATIENCE_S)
    found: list[Progress] = []
    on_progress(found.append)
    with phase("short"):
        pass
    with pytest.raises(RuntimeError), phase("fails"):
        raise RuntimeError
    assert found == []


def test_a_phase_inside_another_is_told_alone(told: list[Progress]) -> None:
    with phase("outer"):
        wait_until(told_of("outer"))
        with phase("inner"):
            wait_until(told_of("inner"))
            told.clear()
            wait_until(told_of("inner"))
            assert {t.what for t in told} == {"inner"}
        told.clear()
        wait_until(told_of("outer"))
    assert {t.what for t in told} == {"outer"}


def test_a_listener_that_fails_stops_nothing(
    told: list[Progress], caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: Progress) -> None:
        raise ValueError("planted")

    remove = on_progress(fail)
    with phase("work"):
        wait_until(told_of("work"))
    remove()
    remove()  # a second time does nothing
    assert told[-1].ended
    assert "a listener to progress failed" in caplog.text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


EVENTS = [
    Progress(what="packing", elapsed_s=2.0, ended=False, done_bytes=1 << 30, total_bytes=4 << 30),
    Progress(what="packing", elapsed_s=3.0, ended=False, done_bytes=2 << 30, total_bytes=4 << 30),
    Progress(what="packing", elapsed_s=12.2, ended=False, done_bytes=3 << 30, total_bytes=4 << 30),
    Progress(what="packing", elapsed_s=14.0, ended=True, done_bytes=4 << 30, total_bytes=4 << 30),
]


def test_plain_lines_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    lines = ProgressLines(out)
    for event in EVENTS:
        lines(event)
    assert out.getvalue().splitlines() == [
        "specmoe: packing: 2 s, 1.0 GiB of 4.0 GiB",
        "specmoe: packing: 12 s, 3.0 GiB of 4.0 GiB",
        "specmoe: packing took 14 s, 4.0 GiB of 4.0 GiB",
    ]


def test_one_line_that_changes_on_a_terminal() -> None:
    out = Terminal()
    lines = ProgressLines(out)
    for event in EVENTS:
        lines(event)
    assert out.getvalue().count("\n") == 1
    assert out.getvalue().split("\r\x1b[K")[1:] == [
        "specmoe: packing: 2 s, 1.0 GiB of 4.0 GiB",
        "specmoe: packing: 3 s, 2.0 GiB of 4.0 GiB",
        "specmoe: packing: 12 s, 3.0 GiB of 4.0 GiB",
        "specmoe: packing took 14 s, 4.0 GiB of 4.0 GiB\n",
    ]


def test_nothing_goes_to_standard_output(
    told: list[Progress], capsys: pytest.CaptureFixture[str]
) -> None:
    with progress.progress_lines(), progress.progress_lines(), phase("compiling decode"):
        wait_until(told_of("compiling decode"))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines()[-1].startswith("specmoe: compiling decode took")
    lines = shown.err.splitlines()
    assert len(set(lines)) == len(lines) >= 2, "told once, though asked for twice"
    with progress.progress_lines(enabled=False), phase("compiling decode"):
        wait_until(told_of("compiling decode"))
    assert capsys.readouterr().err == ""
