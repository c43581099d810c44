"""The endpoints: OpenAI's completions and chat, models, health, metrics."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from specmoe_compile.serve.answers import Answer, ChatAnswer, CompletionAnswer
from specmoe_compile.serve.engine import Engine, Finished, Job, Piece
from specmoe_compile.serve.errors import RequestRefused
from specmoe_compile.serve.guards import Guards
from specmoe_compile.serve.metrics import CONTENT_TYPE, Metrics
from specmoe_compile.serve.prompts import chat_job, completion_job
from specmoe_compile.serve.requests import ChatRequest, CompletionRequest, parse
from specmoe_compile.serve.stream import Events, EventStream


def make_app(
    engine: Engine, metrics: Metrics, *, name: str, api_key: str | None, loopback_only: bool
) -> Any:
    """Build the ASGI app around an engine.

    Args:
        engine: runs the jobs.
        metrics: counts them.
        name: of the model, as clients say it.
        api_key: see `Guards`.
        loopback_only: see `Guards`.
    """
    app = FastAPI(title="specmoe", docs_url=None, redoc_url=None, openapi_url=None)
    started = int(time.time())
    card = {"id": name, "object": "model", "created": started, "owned_by": "specmoe"}
    endpoints = _Endpoints(engine, metrics, name)

    _answer_errors(app, metrics)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": name, "queue": engine.queue_length}

    @app.get("/metrics")
    async def read_metrics() -> Response:
        return Response(metrics.text(engine.queue_length), media_type=CONTENT_TYPE)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{model_name:path}")
    async def model(model_name: str) -> dict[str, Any]:
        endpoints.check_model(model_name)
        return card

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        asked = parse(CompletionRequest, await _body(request))
        endpoints.check_model(asked.model)
        job = await _apart(completion_job, asked, engine)
        return await endpoints.answer(
            request, asked, job, CompletionAnswer(name, choices=job.choices)
        )

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        asked = parse(ChatRequest, await _body(request))
        endpoints.check_model(asked.model)
        job = await _apart(chat_job, asked, engine)
        answer = ChatAnswer(
            name,
            choices=job.choices,
            tokenizer=engine.tokenizer,
            prompt=job.prompts[0],
            tools=asked.tools,
        )
        return await endpoints.answer(request, asked, job, answer)

    return Guards(app, api_key=api_key, loopback_only=loopback_only)


def _answer_errors(app: FastAPI, metrics: Metrics) -> None:
    """Let every error be an answer in OpenAI's form."""

    @app.exception_handler(RequestRefused)
    async def refused(request: Request, error: RequestRefused) -> JSONResponse:
        metrics.requests.labels(_route(request), error.status).inc()
        return JSONResponse(error.body(), error.status, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def not_found(request: Request, error: HTTPException) -> JSONResponse:
        known = RequestRefused(
            error.status_code, f"{request.method} {request.url.path}: {error.detail}."
        )
        return JSONResponse(known.body(), known.status, headers=error.headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        metrics.requests.labels(_route(request), 500).inc()
        known = RequestRefused(
            500, f"The server failed: {type(error).__name__}. Its log says more."
        )
        return JSONResponse(known.body(), known.status)


def _route(request: Request) -> str:
    """The endpoint's own path, so that what clients make up is no label."""
    return str(getattr(request.scope.get("route"), "path", "other"))


async def _apart(make_job: Callable[[Any, Any, int], Job], asked: Any, engine: Engine) -> Job:
    """Make a job in another thread: reading a prompt of megabytes takes a minute.

    Meanwhile other streams go on; tokenizers let go of the interpreter.
    """
    return await run_in_threadpool(make_job, asked, engine.tokenizer, engine.max_context)


async def _body(request: Request) -> Any:
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise RequestRefused(400, "The body is not valid JSON.") from error
    except ClientDisconnect as error:
        raise RequestRefused(400, "The client went away before its body's end.") from error


class _Endpoints:
    """What completions and chat do alike."""

    def __init__(self, engine: Engine, metrics: Metrics, name: str) -> None:
        self._engine = engine
        self._metrics = metrics
        self._name = name

    def check_model(self, asked: str | None) -> None:
        """Refuse a model that is not the one that is served."""
        if asked is not None and asked != self._name:
            raise RequestRefused(
                404,
                f"The model {asked!r} is not served here: {self._name!r} is.",
                param="model",
                code="model_not_found",
            )

    async def answer(self, request: Request, asked: Any, job: Job, answer: Answer) -> Response:
        """Run a job and give its answer, in one piece or streamed."""
        if not asked.stream:
            job.text_every_s = math.inf
        events = Events(request, self._engine, job)
        try:
            # Awaited here, so that a failure is a status and not an event in a stream.
            event = await events.next()
            if asked.stream:
                return self._stream(request, asked, events, event, answer)
            while event is not None:
                self._note(event)
                answer.take(event)
                event = await events.next()
        except BaseException:
            events.close()
            raise
        events.close()
        self._metrics.requests.labels(_route(request), 200).inc()
        return JSONResponse(answer.whole())

    def _stream(
        self, request: Request, asked: Any, events: Events, first: Any, answer: Answer
    ) -> EventStream:
        return EventStream(
            events,
            first,
            answer,
            usage=asked.stream_options is not None and asked.stream_options.include_usage,
            on_event=self._note,
            on_end=lambda status: self._metrics.requests.labels(_route(request), status).inc(),
        )

    def _note(self, event: Piece | Finished) -> None:
        if isinstance(event, Finished):
            self._metrics.prompt_tokens.inc(event.prompt_tokens)
            self._metrics.cached_tokens.inc(event.cached_tokens)
