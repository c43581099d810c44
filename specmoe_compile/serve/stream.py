"""A job's events on their way from the engine's thread to the client.

Each text of a stream takes the interpreter from decoding for as long as it is handled here, with
code and data that the weights of a token have swept out of the processor's caches. So it wakes the
event loop once, and goes to the connection in one piece that is made of prepared bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from specmoe_compile.serve.answers import Answer, server_sent
from specmoe_compile.serve.engine import Engine, Event, Failed, Finished, Job, Piece
from specmoe_compile.serve.errors import RequestRefused


class Events:
    """The events of one job; ends the job when the client is gone or nobody reads on."""

    def __init__(self, request: Request, engine: Engine, job: Job) -> None:
        """Submit the job; raises `RequestRefused` where the engine does not take it."""
        self._engine = engine
        self._job = job
        self._loop = asyncio.get_running_loop()
        self._come: deque[Event] = deque()
        self._awaited: asyncio.Future[None] | None = None
        job.on_event = self._put
        engine.submit(job)
        self._watcher = asyncio.create_task(self._when_gone(request))

    async def next(self) -> Piece | Finished | None:
        """The next event, or None at the end; raises `RequestRefused` where the job failed."""
        while not self._come:
            self._awaited = self._loop.create_future()
            if not self._come:  # what came before this line woke nobody
                await self._awaited
        event = self._come.popleft()
        if isinstance(event, Failed):
            raise _failure(event.error)
        if event is None and self._job.cancelled:
            raise RequestRefused(503, "The server is shutting down, or the client is gone.")
        return event

    def close(self) -> None:
        """End the job, if it has not ended."""
        self._watcher.cancel()
        self._engine.cancel(self._job)

    def _put(self, event: Event) -> None:
        """From any thread."""
        self._come.append(event)
        if self._awaited is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server is gone
                self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        awaited, self._awaited = self._awaited, None
        if awaited is not None and not awaited.done():
            awaited.set_result(None)

    async def _when_gone(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._engine.cancel(self._job)


class EventStream(Response):
    """Server-sent events of one job, a text at a time."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: Events,
        first: Piece | Finished | None,
        answer: Answer,
        *,
        usage: bool,
        on_event: Callable[[Piece | Finished], None],
        on_end: Callable[[int], None],
    ) -> None:
        """Take over a job whose first event is there.

        Args:
            events: of the job.
            first: the first of them: a job that is refused is a status, and not an event.
            answer: says them.
            usage: whether a last chunk counts tokens.
            on_event: called with each.
            on_end: called with the status in the end.
        """
        super().__init__(headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._events = events
        self._first = first
        self._answer = answer
        self._usage = usage
        self._on_event = on_event
        self._on_end = on_end

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        status = 200
        last = b""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            event = self._first
            while event is not None:
                self._on_event(event)
                said = self._answer.said(event)
                if said:
                    await send({"type": "http.response.body", "body": said, "more_body": True})
                event = await self._events.next()
            if self._usage:
                last = self._answer.said_usage()
        except RequestRefused as error:
            status = error.status
            last = server_sent(error.body())
        finally:
            self._events.close()
            self._on_end(status)
        await send({"type": "http.response.body", "body": last + b"data: [DONE]\n\n"})


def _failure(error: BaseException) -> RequestRefused:
    if isinstance(error, RequestRefused):
        return error
    return RequestRefused(
        500, f"The generation failed: {type(error).__name__}. The server's log says more."
    )
