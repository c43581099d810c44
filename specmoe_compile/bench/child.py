"""A Python process of our own that tells events, and how it says why it ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from specmoe_compile.bench.memory_cap import MemoryCap
from specmoe_compile.errors import SpecMoEError
from specmoe_compile.system.sizes import format_bytes

USER_ERROR_STATUS = 2

Hears = Callable[[dict[str, Any]], None]


class ArmFailedError(SpecMoEError):
    """A worker process ended without a result; the message says why."""


class ArmInputError(ValueError):
    """A worker process refused its job; the message is its own."""


class ChildPython:
    """This Python, running `arguments` inside a memory cap; killed by `close` if it still runs.

    It is told things by lines on its standard input, and tells events by JSON objects, one per
    line, on its standard output. The end of its standard input, which comes with the end of this
    process too, is its sign to stop.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        cap: MemoryCap | None = None,
        on_event: Hears | None = None,
        environment: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Start the process.

        Args:
            arguments: of the Python interpreter.
            cap: memory limit that it starts in.
            on_event: hears every event.
            environment: on top of this process's.
            timeout_s: longest wait for an event or for the end, after which it is killed; None
                waits for ever.
        """
        self._cap = cap
        self._on_event = on_event
        self._timeout_s = timeout_s
        self._timed_out = False
        command = [sys.executable, *arguments]
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                command if cap is None else cap.wrap(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                env={**os.environ, **(environment or {})},
            )
        except BaseException:
            self._errors.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, line: str) -> None:
        """Write a line to its standard input.

        Raises:
            ArmFailedError, ArmInputError: it has ended; the message says why.
        """
        assert self._process.stdin is not None, "standard input is a pipe"
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._raise_why()

    def wait_for(self, event: str) -> None:
        """Wait until it tells `event`.

        Raises:
            ArmFailedError, ArmInputError: it ended, or was killed for its silence, before.
        """
        with self._bounded():
            for told in self._events():
                if told["event"] == event:
                    return
        self._raise_why()

    def finish(self) -> None:
        """Close its standard input and wait for a good end.

        Raises:
            ArmFailedError: it was killed, or ended with a status other than 0 and 2.
            ArmInputError: it ended with status 2, which is for what a caller can correct.
        """
        self._close_input()
        with self._bounded():
            for _ in self._events():
                pass
            status = self._process.wait()
        if status != 0 or self._timed_out:
            self._raise_why()

    def close(self) -> None:
        """Kill it if it still runs, and let go of what belongs to it."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._close_input()
        assert self._process.stdout is not None, "standard output is a pipe"
        self._process.stdout.close()
        self._errors.close()

    def _close_input(self) -> None:
        assert self._process.stdin is not None, "standard input is a pipe"
        # What was not read before it ended is of no use to anybody.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def _events(self) -> Iterator[dict[str, Any]]:
        assert self._process.stdout is not None, "standard output is a pipe"
        # Not `for line in stdout`: the rest is read later, by another call.
        while line := self._process.stdout.readline():
            if not line.startswith("{"):
                continue
            # A library may print lines of its own that look like ours.
            with contextlib.suppress(json.JSONDecodeError):
                told = json.loads(line)
                if "event" not in told:
                    continue
                if self._on_event is not None:
                    self._on_event(told)
                yield told

    @contextlib.contextmanager
    def _bounded(self) -> Iterator[None]:
        """Kill the process if what is in here takes too long."""
        if self._timeout_s is None:
            yield
            return

        def kill() -> None:
            self._timed_out = True
            self._process.kill()

        timer = threading.Timer(self._timeout_s, kill)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _raise_why(self) -> None:
        """Raise one sentence for a process that ended, or just told its last event.

        Raises:
            ArmFailedError, ArmInputError: always.
        """
        self._close_input()
        with self._bounded():
            status = self._process.wait()
        self._errors.seek(0)
        text = self._errors.read()
        if self._timed_out:
            raise ArmFailedError(f"It gave no answer within {self._timeout_s:g} s and was ended.")
        if status == USER_ERROR_STATUS:
            raise ArmInputError(_last_line(text, status))
        if self._cap is not None and self._cap.was_killed():
            limit = format_bytes(self._cap.limit_bytes)
            raise ArmFailedError(f"It needed more than the memory cap of {limit}.")
        if status < 0:
            raise ArmFailedError(f"The process was ended by {signal.Signals(-status).name}.")
        raise ArmFailedError(_last_line(text, status))


def run_python(
    arguments: Sequence[str],
    *,
    cap: MemoryCap | None = None,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run this Python with `arguments`, inside `cap`, and wait for a good end.

    Raises:
        ArmFailedError, ArmInputError: as `ChildPython.finish`.
    """
    child = ChildPython(arguments, cap=cap, environment=environment)
    with contextlib.closing(child):
        child.finish()


def _last_line(errors: str, status: int) -> str:
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    if not lines:
        return f"The process ended with status {status} and no message."
    return lines[-1].removeprefix("specmoe: ")
