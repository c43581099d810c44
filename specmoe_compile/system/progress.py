"""Say what takes longer than two seconds, with the time that it has taken so far.

Code that may take long wraps it in `phase("compiling decode")`. A phase that takes less than two
seconds says nothing. Others are told to the logger of this module (level INFO), and to every
listener: after two seconds, each second from then on, and when they end. A phase inside another is
told by itself; the outer one is silent meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TextIO

from specmoe_compile.system.sizes import format_bytes

logger = logging.getLogger(__name__)

QUIET_S = 2.0
_TICK_S = 1.0
_LINE_EVERY_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What is told of a phase.

    Attributes:
        what: a few words, such as "compiling decode".
        elapsed_s: since it began.
        ended: whether this is the last that is told of it.
        done_bytes: how far it is; 0 where that is not known.
        total_bytes: of how much; 0 where that is not known.
    """

    what: str
    elapsed_s: float
    ended: bool
    done_bytes: int = 0
    total_bytes: int = 0

    def __str__(self) -> str:
        amount = ""
        if self.total_bytes:
            amount = f", {format_bytes(self.done_bytes)} of {format_bytes(self.total_bytes)}"
        return f"{self.what}{' took' if self.ended else ':'} {self.elapsed_s:.0f} s{amount}"


Listener = Callable[[Progress], None]

_listeners: list[Listener] = []
_listening = threading.Lock()


def on_progress(listener: Listener) -> Callable[[], None]:
    """Let a function be told what takes long, from now on; returns a function that ends that.

    It is called with a `Progress`, from a thread of its own while work is under way, and from the
    thread that works when it ends; an exception that it raises is logged.
    """
    with _listening:
        _listeners.append(listener)

    def remove() -> None:
        with _listening, contextlib.suppress(ValueError):
            _listeners.remove(listener)

    return remove


class Phase:
    """Work under way; `update` says how far it is."""

    def __init__(self, what: str, total_bytes: int = 0) -> None:
        """Begin now."""
        self.what = what
        self.total_bytes = total_bytes
        self.done_bytes = 0
        self._started_s = time.monotonic()
        self._inner = 0
        self._ended = threading.Event()
        self._telling = threading.Lock()
        self._told = False

    def update(self, more_bytes: int) -> None:
        """Count work that is done."""
        self.done_bytes += more_bytes

    def watch(self) -> None:
        """Tell of the phase until it ends; body of its thread."""
        wait_s = QUIET_S
        while not self._ended.wait(wait_s):
            wait_s = _TICK_S
            with self._telling:
                if self._inner == 0 and not self._ended.is_set():
                    if not self._told:
                        logger.info("%s ...", self.what)
                    self._told = True
                    self._tell(ended=False)

    def end(self) -> None:
        """Tell for the last time, if it was told of at all."""
        self._ended.set()
        with self._telling:
            if self._told:
                logger.info("%s took %.1f s", self.what, time.monotonic() - self._started_s)
                self._tell(ended=True)

    def enter_inner(self, change: int) -> None:
        """Count the phases inside this one."""
        self._inner += change

    def _tell(self, *, ended: bool) -> None:
        told = Progress(
            what=self.what,
            elapsed_s=time.monotonic() - self._started_s,
            ended=ended,
            done_bytes=self.done_bytes,
            total_bytes=self.total_bytes,
        )
        for listener in tuple(_listeners):
            try:
                listener(told)
            except Exception:
                logger.exception("a listener to progress failed")


_open = threading.local()


@contextlib.contextmanager
def phase(what: str, total_bytes: int = 0) -> Iterator[Phase]:
    """Tell of the work inside, if it takes longer than two seconds.

    Args:
        what: a few words, such as "compiling decode".
        total_bytes: how much `Phase.update` will count; 0 if nothing is counted.
    """
    work = Phase(what, total_bytes)
    outer: Phase | None = getattr(_open, "phase", None)
    if outer is not None:
        outer.enter_inner(1)
    _open.phase = work
    threading.Thread(target=work.watch, name="specmoe-progress", daemon=True).start()
    try:
        yield work
    finally:
        work.end()
        _open.phase = outer
        if outer is not None:
            outer.enter_inner(-1)


class ProgressLines:
    """A listener that writes: one line that changes on a terminal, plain lines elsewhere."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """Write to `stream`, standard error by default."""
        self._stream = stream
        self._shown = False
        self._next_line_s: dict[str, float] = {}

    def __call__(self, progress: Progress) -> None:
        stream = sys.stderr if self._stream is None else self._stream
        if stream.isatty():
            end = "\n" if progress.ended else ""
            stream.write(f"\r\x1b[Kspecmoe: {progress}{end}")
            self._shown = not progress.ended
        elif progress.ended:
            self._next_line_s.pop(progress.what, None)
            stream.write(f"specmoe: {progress}\n")
        elif progress.elapsed_s >= self._next_line_s.get(progress.what, 0.0):
            self._next_line_s[progress.what] = progress.elapsed_s + _LINE_EVERY_S
            stream.write(f"specmoe: {progress}\n")
        stream.flush()


_lines = ProgressLines()
_lines_users = 0


@contextlib.contextmanager
def progress_lines(*, enabled: bool = True) -> Iterator[None]:
    """Write what takes long to standard error; a second call inside another adds nothing."""
    global _lines_users
    if not enabled:
        yield
        return
    with _listening:
        _lines_users += 1
        if _lines_users == 1:
            _listeners.append(_lines)
    try:
        yield
    finally:
        with _listening:
            _lines_users -= 1
            if _lines_users == 0:
                _listeners.remove(_lines)


@contextlib.contextmanager
def progress_bar(total_bytes: int, what: str, *, enabled: bool) -> Iterator[Phase]:
    """A phase that counts bytes, shown on standard error if `enabled`."""
    with progress_lines(enabled=enabled), phase(what, total_bytes) as work:
        yield work
