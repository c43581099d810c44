"""Running the server: a socket that is free, a model that is compiled, an end that is clean."""

from __future__ import annotations

import logging
import re
import signal
import socket
import threading
import time
from types import FrameType
from typing import Any

import uvicorn

from specmoe_compile.serve.engine import Engine, Job
from specmoe_compile.serve.guards import is_loopback
from specmoe_compile.serve.http import Protocol

logger = logging.getLogger(__name__)

_WARM_PROMPTS = ((24, 0), (40, 1), (64, 1), (9, 2), (12, 3), (19, 3))
"""Prompts that are read before the server is ready: tokens, and which beginning they have. Of two
lengths: the first is compiled as it is, with the second the length becomes a variable. The third
goes on where the second ended, as a chat's next turn does: a prompt behind a cache that holds
something has a mask, and so a graph of its own. Then again with few tokens, which are compiled
where many are not. Those that run as the model is (`hf.prompts`) are soon over.
"""
_GRACE_S = 10
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def bind(host: str, port: int) -> socket.socket:
    """Take the address before a model is loaded for it; raises `OSError` where it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise OSError(
            error.errno, f"cannot listen on {host}:{port}: {error.strerror}; try another --port"
        ) from error
    except OverflowError as error:
        bound.close()
        raise ValueError(f"--port {port} is not a port: give 0 to 65535.") from error
    return bound


def check_exposure(host: str, api_key: str | None) -> None:
    """Raise `ValueError` where everybody could use the server, or nobody could say the key."""
    if api_key and not re.fullmatch(r"[!-~]+", api_key):
        raise ValueError(
            "The API key holds a space or a character that is not ASCII, which clients cannot send"
            " in a header: choose another one."
        )
    if not is_loopback(host) and not api_key:
        raise ValueError(
            f"--host {host} lets other machines in: give --api-key (or SPECMOE_API_KEY) too."
        )


def warm_up(engine: Engine) -> None:
    """Compile prefill and decode, in the engine's own thread, by generating for nobody."""
    vocabulary = max(2, len(engine.tokenizer))
    for length, beginning in _WARM_PROMPTS:
        fitting = max(1, min(length, engine.max_context - 4))
        prompt = [1 + (7 * at + beginning) % (vocabulary - 1) for at in range(fitting)]
        engine.run(
            Job(
                prompts=[prompt],
                choices=1,
                max_tokens=min(3, engine.max_context - fitting),
                sampling={"do_sample": False, "min_new_tokens": 3},
                stops=(),
                seed=0,
                on_event=lambda event: None,
            )
        )


class Server(uvicorn.Server):
    """uvicorn that cancels generations on the first signal, so that it need not wait for them."""

    def __init__(self, app: Any, engine: Engine, ready: str) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=Protocol,
                ws="none",
                log_level="warning",
                timeout_graceful_shutdown=_GRACE_S,
                lifespan="off",
            )
        )
        self._engine = engine
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            logger.info(self._ready)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not here: a signal may come while this thread holds the engine's lock.
        threading.Thread(target=self._engine.stop).start()
        super().handle_exit(sig, frame)


def _ended_already(number: int, frame: FrameType | None) -> None:
    """A signal that has been answered."""


def serve(app: Any, engine: Engine, bound: socket.socket, *, started_s: float) -> None:
    """Answer requests until a signal; the engine has ended when this returns.

    Args:
        app: of `make_app`.
        engine: its engine.
        bound: of `bind`.
        started_s: `time.perf_counter` at the command's start, for the time to ready.
    """
    host, port = bound.getsockname()[:2]
    where = f"[{host}]" if ":" in host else host
    ready = f"Ready after {time.perf_counter() - started_s:.1f} s: http://{where}:{port}/v1"
    # uvicorn raises its signals again when it has ended, for whoever handled them before it.
    before = {number: signal.signal(number, _ended_already) for number in _SIGNALS}
    try:
        Server(app, engine, ready).run(sockets=[bound])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        engine.stop()
        if not engine.join(_GRACE_S):
            logger.warning("The running generation did not end within %d s.", _GRACE_S)
