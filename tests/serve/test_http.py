"""Whatever bytes arrive: an answer of 4xx in OpenAI's form, no traceback, and a living server."""

from __future__ import annotations

import contextlib
import json
import socket

import httpx
import pytest

from specmoe_compile.serve.guards import MAX_BODY_BYTES
from tests.serve.conftest import PATIENCE_S, Process

POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
GET = b"GET /v1/models HTTP/1.1\r\n"
ENDLESS = (GET + b"Host: localhost\r\nX: ").ljust((64 << 10) + 1, b"x")
"""One byte more than may be there before a header has ended: none is left unread, which would reset
the connection before its answer is read."""

REFUSED = {
    "no HTTP": (400, b"hello\r\n\r\n"),
    "TLS": (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"),
    "a length that is no number": (400, POST + b"Content-Length: ten\r\n\r\n{}"),
    "two lengths": (400, POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}"),
    "a chunk without a size": (400, POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n"),
    "no JSON": (400, POST + b"Content-Length: 2\r\n\r\n{]"),
    "no UTF-8": (400, POST + b'Content-Length: 14\r\n\r\n{"prompt":"\xe9"}'),
    "nothing": (400, POST + b"Content-Length: 0\r\n\r\n"),
    "a body too long": (413, POST + b"Content-Length: %d\r\n\r\n" % (MAX_BODY_BYTES + 1)),
    "a header without end": (400, ENDLESS),
    "another host": (403, GET + b"Host: evil.example\r\n\r\n"),
    "a host that begins well": (403, GET + b"Host: localhost.evil.example\r\n\r\n"),
    "another method": (405, b"PUT /v1/completions HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    "no such model": (404, b"GET /v1/models/%FF%00 HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    "no such path": (404, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
}


def _connect(server: Process) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=PATIENCE_S)


def _answer(server: Process, request: bytes) -> tuple[int, bytes]:
    """Status and body of what a request gets."""
    with _connect(server) as link:
        link.sendall(request)
        answer = b""
        while (end := answer.find(b"\r\n\r\n")) < 0:
            answer += (part := link.recv(65536))
            assert part, answer
        head, body = answer[:end].lower(), answer[end + 4 :]
        length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
        while len(body) < length:
            body += (part := link.recv(65536))
            assert part, answer
    return int(head.split()[1]), body


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_malformed_is_refused_in_openais_form(server: Process, name: str) -> None:
    status, request = REFUSED[name]
    got, body = _answer(server, request)
    assert got == status, body
    error = json.loads(body)["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["message"].endswith(".")


@pytest.mark.parametrize("host", ["LOCALHOST:1", "[::1]", "[::1]:80", "127.0.0.1"])
def test_every_name_of_this_machine_is_known(server: Process, host: str) -> None:
    assert _answer(server, GET + f"Host: {host}\r\n\r\n".encode())[0] == 200


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_failure(server: Process) -> None:
    for _ in range(3):
        with _connect(server) as link:
            link.sendall(POST + b"Content-Length: 100\r\n\r\n{")
        with _connect(server) as link, contextlib.suppress(OSError):
            link.sendall(POST + b"Content-Length: 100\r\n\r\n{")
            link.shutdown(socket.SHUT_WR)
            link.recv(1)
    assert httpx.get(f"{server.url}/health", timeout=PATIENCE_S).status_code == 200
    assert "Traceback" not in server.log()


def test_http_1_0_has_no_chunks(server: Process) -> None:
    """Its streams end with their connection."""
    body = b'{"prompt": "A", "max_tokens": 3, "stream": true}'
    request = POST.replace(b"HTTP/1.1", b"HTTP/1.0") + b"Content-Length: %d\r\n\r\n" % len(body)
    with _connect(server) as link:
        link.sendall(request + body)
        answer = b"".join(iter(lambda: link.recv(65536), b""))
    head, _, events = answer.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert all(event.startswith(b"data: ") for event in events.split(b"\n\n")[:-1])
    assert events.endswith(b"data: [DONE]\n\n")
