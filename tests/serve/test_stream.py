"""Events that come from another thread arrive, each once and in order."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

pytest.importorskip("fastapi")

from specmoe_compile.serve.engine import Failed, Job, Piece
from specmoe_compile.serve.errors import RequestRefused
from specmoe_compile.serve.stream import Events
from tests.serve.conftest import PATIENCE_S


class Engine:
    """Says what it is given, from a thread of its own."""

    def __init__(self, events: list[Any]) -> None:
        self._events = events
        self.cancelled = 0

    def submit(self, job: Job) -> None:
        def say() -> None:
            for event in self._events:
                job.on_event(event)

        threading.Thread(target=say).start()

    def cancel(self, job: Job) -> None:
        self.cancelled += 1


class Request:
    """A client that stays until it is told to go."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()

    async def receive(self) -> dict[str, str]:
        await self.gone.wait()
        return {"type": "http.disconnect"}


def _job() -> Job:
    return Job([[1]], 1, 1, {}, (), 0, lambda event: None)


def test_no_event_is_lost_or_waits_for_the_next() -> None:
    said = [Piece(0, str(number)) for number in range(5000)]

    async def read() -> list[Any]:
        engine: Any = Engine([*said, None])
        request: Any = Request()
        events = Events(request, engine, _job())
        seen = []
        while (event := await asyncio.wait_for(events.next(), PATIENCE_S)) is not None:
            seen.append(event)
        events.close()
        return seen

    assert asyncio.run(read()) == said


def test_a_failure_is_raised_where_it_is_read() -> None:
    async def read() -> None:
        engine: Any = Engine([Piece(0, "A"), Failed(ValueError("no")), None])
        request: Any = Request()
        events = Events(request, engine, _job())
        assert await events.next() == Piece(0, "A")
        with pytest.raises(RequestRefused, match="generation failed: ValueError"):
            await events.next()
        events.close()

    asyncio.run(read())


def test_a_client_that_goes_ends_its_job() -> None:
    async def read() -> int:
        engine: Any = Engine([])
        request: Any = Request()
        events = Events(request, engine, _job())
        request.gone.set()
        while not engine.cancelled:
            await asyncio.sleep(0)
        events.close()
        return int(engine.cancelled)

    assert asyncio.run(read()) >= 1
