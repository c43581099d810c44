"""A server that is killed in the middle of an answer starts again on the same store and port."""

from __future__ import annotations

import hashlib
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.serve.conftest import NAME, PATIENCE_S, Process, begin_long, connect

openai = pytest.importorskip("openai")
PROMPT = "BEGIN AGAIN"
_CUT = {"APIConnectionError", "RemoteProtocolError", "ReadError"}
"""How a client hears of a connection that is gone; which one depends on its HTTP library."""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _interrupted(server: Process, how: int) -> BaseException:
    """Signal the server after a stream's first chunk; returns what the client then sees."""
    stream = begin_long(connect(server))
    server.process.send_signal(how)
    with pytest.raises(Exception) as seen:
        for _ in stream:
            pass
    return seen.value


@pytest.mark.slow
def test_a_server_that_was_killed_starts_again(
    checkpoint: Path, tmp_path: Path, expected: Any
) -> None:
    store, port = tmp_path / "store", str(_free_port())

    server = Process(checkpoint, store, "--port", port)
    written = _digests(store)
    assert written
    seen = _interrupted(server, signal.SIGKILL)
    assert type(seen).__name__ in _CUT, repr(seen)
    assert server.process.wait(PATIENCE_S) == -signal.SIGKILL
    assert _digests(store) == written

    server = Process(checkpoint, store, "--port", port)
    seen = _interrupted(server, signal.SIGTERM)
    assert isinstance(seen, openai.APIError) and "shutting down" in str(seen), repr(seen)
    assert server.process.wait(PATIENCE_S) == 0, server.log()
    assert "Traceback" not in server.log(), server.log()
    assert _digests(store) == written

    server = Process(checkpoint, store, "--port", port)
    answer = connect(server).completions.create(
        model=NAME, prompt=PROMPT, max_tokens=12, temperature=0
    )
    assert answer.choices[0].text == expected(PROMPT, 12)
    assert server.end(signal.SIGINT) == 0, server.log()
    assert "Traceback" not in server.log(), server.log()
