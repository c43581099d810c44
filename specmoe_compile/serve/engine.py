"""The loop that owns the model: one generation at a time, a bounded queue, cancelling.

`generate` runs in one thread, which CUDA graphs need (their pool belongs to a thread). What it
yields goes to the server's event loop through callbacks.
"""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from specmoe_compile.hf.compiled_calls import cache_argument
from specmoe_compile.serve.errors import RequestRefused
from specmoe_compile.serve.kept_cache import KeptCache
from specmoe_compile.serve.text import StopStrings, TextPieces

logger = logging.getLogger(__name__)

TEXT_EVERY_S = 0.04
"""Shortest time between two texts of a stream. What the server does for a text holds decoding up:
threads share an interpreter, on a small machine cores too. 25 texts a second read as one flow."""
_RETRY_AFTER_S = 1.0  # before any request has told how long one takes


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of one choice that is final now."""

    choice: int
    text: str


@dataclass(frozen=True, slots=True)
class Finished:
    """One choice has ended: "stop" or "length"."""

    choice: int
    reason: str
    prompt_tokens: int
    cached_tokens: int
    tokens: tuple[int, ...]

    @property
    def completion_tokens(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class Failed:
    """The whole job ended by an error."""

    error: BaseException


Event = Piece | Finished | Failed | None
"""What a job says; None is the end."""


@dataclass(slots=True, eq=False)
class Job:
    """One request.

    Attributes:
        prompts: token ids of each prompt.
        choices: answers per prompt.
        max_tokens: most tokens of an answer.
        sampling: arguments of `generate`.
        stops: stop strings.
        seed: of sampling; None draws one.
        on_event: called from the engine's thread with each event.
        text_every_s: shortest time between two texts of a choice; infinity: one text, at its end.
        cancelled: set by anyone to end the job before its next token. A plain attribute: it is
            read for each token.
    """

    prompts: list[list[int]]
    choices: int
    max_tokens: int
    sampling: dict[str, Any]
    stops: tuple[str, ...]
    seed: int | None
    on_event: Callable[[Event], None]
    text_every_s: float = TEXT_EVERY_S
    cancelled: bool = False


class _Ended(Exception):
    """Raised from the streamer to leave `generate`: a stop string, or the client is gone."""


class _Streamer(BaseStreamer):
    """The streamer of one answer: text to the client, tokens to the kept cache.

    Decoding waits while `put` runs, after a token that has swept the processor's caches. So a token
    is noted and no more, unless a text is due or a stop string may end with it.
    """

    def __init__(self, engine: Engine, job: Job, choice: int) -> None:
        self._job = job
        self._choice = choice
        self._on_token = engine.on_token
        self._note_seconds = engine.on_first_token
        self._pieces = TextPieces(engine.tokenizer)
        self._stops = StopStrings(job.stops)
        self._resumed_s = time.perf_counter()
        self._due_s = 0.0 if math.isfinite(job.text_every_s) else math.inf
        self._read_tokens = 0
        self._unshown = ""
        self._prompt_seen = False
        self.tokens: list[int] = []
        self.stopped = False

    def put(self, value: Any) -> None:
        """Take the prompt (first call) or one token, [1] int64 in host memory."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        now_s = time.perf_counter()
        self._note_seconds(now_s - self._resumed_s)
        self._note_seconds = self._on_token
        self._resumed_s = now_s
        self.tokens += value.tolist()
        if self._job.cancelled:
            raise _Ended
        due = now_s >= self._due_s
        if due or self._job.stops:  # a stop string is seen at its last token
            self._read()
            if (due and self._unshown) or self.stopped:
                self._show()
                self._due_s = now_s + self._job.text_every_s
            if self.stopped:
                raise _Ended

    def end(self) -> None:
        """`generate` is done; whether what was held back is shown is for `finish`."""

    def finish(self) -> None:
        """Show what is left."""
        self._read()
        if not self.stopped:
            text, self.stopped = self._stops.add(self._pieces.rest())
            self._unshown += text if self.stopped else text + self._stops.rest()
        self._show()

    def _read(self) -> None:
        text, self.stopped = self._stops.add(self._pieces.add(self.tokens[self._read_tokens :]))
        self._read_tokens = len(self.tokens)
        self._unshown += text

    def _show(self) -> None:
        if self._unshown:
            self._job.on_event(Piece(self._choice, self._unshown))
            self._unshown = ""


class Engine:
    """Owns a compiled model and its cache of keys and values; runs jobs one after the other."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_context: int,
        max_queue: int,
        threads: int | None = None,
        on_first_token: Callable[[float], object] = lambda seconds: None,
        on_token: Callable[[float], object] = lambda seconds: None,
        on_job: Callable[[], None] = lambda: None,
    ) -> None:
        """Start the thread.

        Args:
            model: compiled model of `specmoe_compile`.
            tokenizer: its tokenizer.
            max_context: most tokens of prompt and answer.
            max_queue: jobs that may wait beside the running one.
            threads: PyTorch's threads; None is its own choice.
            on_first_token: called with the seconds of an answer's first token, from the engine's
                thread.
            on_token: likewise, of each token after it.
            on_job: called after each job, from the engine's thread.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.max_context = max_context
        self.on_first_token = on_first_token
        self.on_token = on_token
        self._on_job = on_job
        self._max_queue = max_queue
        self._threads = threads
        inner = getattr(model, "_orig_mod", model)
        self._inner = inner
        self._kept = KeptCache(inner.config, max_context)
        self._end_tokens = _end_tokens(inner)
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._recent_s: deque[float] = deque(maxlen=16)
        self._stopping = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._loop, name="specmoe-serve", daemon=True)
        self._thread.start()

    @property
    def queue_length(self) -> int:
        """Jobs that wait."""
        with self._changed:
            return len(self._waiting)

    def submit(self, job: Job) -> None:
        """Put a job in the queue.

        Raises:
            RequestRefused: the queue is full (429, with Retry-After), or the server stops (503).
        """
        with self._changed:
            if self._stopping:
                raise RequestRefused(503, "The server is shutting down.")
            if len(self._waiting) >= self._max_queue + (self._running is None):
                each_s = sum(self._recent_s) / len(self._recent_s) if self._recent_s else 0.0
                wait_s = max(_RETRY_AFTER_S, each_s)
                raise RequestRefused(
                    429,
                    f"{len(self._waiting)} requests wait already, the most that this server lets:"
                    f" try again in {wait_s:.0f} s, or start it with a larger --max-queue.",
                    code="queue_full",
                    headers={"Retry-After": f"{wait_s:.0f}"},
                )
            self._waiting.append(job)
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """End a job: at once if it waits, before its next token if it runs."""
        job.cancelled = True
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
                job.on_event(None)

    def stop(self) -> None:
        """Take no more jobs and cancel what runs and waits. Returns at once."""
        with self._changed:
            self._stopping = True
            jobs = [*self._waiting, *([self._running] if self._running else [])]
            self._changed.notify_all()
        for job in jobs:
            self.cancel(job)

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread to end; whether it did."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def run(self, job: Job) -> None:
        """Submit a job and wait for its end; raises what it failed with."""
        events: queue.Queue[Event] = queue.Queue()
        job.on_event = events.put
        self.submit(job)
        while (event := events.get()) is not None:
            if isinstance(event, Failed):
                raise event.error

    def _loop(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)  # of this thread
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopping)
                if self._stopping and not self._waiting:
                    return
                job = self._running = self._waiting.popleft()
            started_s = time.perf_counter()
            try:
                self._run_job(job)
            except Exception as error:
                self._kept.forget()
                if not isinstance(error, RequestRefused):
                    logger.exception("A request failed.")
                job.on_event(Failed(error))
            finally:
                with self._changed:
                    self._running = None
                    self._recent_s.append(time.perf_counter() - started_s)
                self._on_job()
                job.on_event(None)

    def _run_job(self, job: Job) -> None:
        seed = secrets.randbits(63) if job.seed is None else job.seed
        answers = [prompt for prompt in job.prompts for _ in range(job.choices)]
        for choice, prompt in enumerate(answers):
            if job.cancelled:
                return
            torch.manual_seed(seed + choice % job.choices)
            self._answer(job, choice, prompt)

    def _answer(self, job: Job, choice: int, prompt: list[int]) -> None:
        streamer = _Streamer(self, job, choice)
        ids = torch.tensor([prompt], device=self._inner.device)
        cache = self._kept.take(prompt)
        with contextlib.suppress(_Ended):
            self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=job.max_tokens,
                streamer=streamer,
                pad_token_id=_pad_token(self.tokenizer, self._end_tokens),
                **cache_argument(self._inner, cache),
                **job.sampling,
            )
        self._kept.note([*prompt, *streamer.tokens[:-1]])
        if job.cancelled:
            return
        if not streamer.stopped:
            streamer.finish()
        ended = streamer.stopped or (streamer.tokens and streamer.tokens[-1] in self._end_tokens)
        job.on_event(
            Finished(
                choice,
                "stop" if ended else "length",
                prompt_tokens=len(prompt),
                cached_tokens=self._kept.reused_tokens,
                tokens=tuple(streamer.tokens),
            )
        )


def _end_tokens(model: Any) -> frozenset[int]:
    end = model.generation_config.eos_token_id
    return frozenset(end if isinstance(end, (list, tuple)) else () if end is None else (end,))


def _pad_token(tokenizer: Any, end_tokens: frozenset[int]) -> int | None:
    pad: int | None = tokenizer.pad_token_id
    return pad if pad is not None else next(iter(sorted(end_tokens)), None)
