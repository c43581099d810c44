"""What stands before the endpoints: the key, the kind and size of a body, the host's name.

Plain ASGI, so that a body is never read past its limit and a client that goes away is seen.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import re
from typing import Any

from specmoe_compile.serve.errors import RequestRefused

MAX_BODY_BYTES = 8 << 20
_OPEN_PATHS = ("/health",)


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Guards:
    """ASGI middleware. Refuses before anything is parsed."""

    def __init__(self, app: Any, *, api_key: str | None, loopback_only: bool) -> None:
        """Wrap an app.

        Args:
            app: ASGI app.
            api_key: what `Authorization: Bearer` must say; None asks for none.
            loopback_only: take requests that name this machine alone. A web page can send requests
                to a loopback server under a name of its own; without a key this is what keeps it
                out.
        """
        self._app = app
        self._api_key = api_key
        self._loopback_only = loopback_only

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        try:
            self._check(scope, headers)
        except RequestRefused as refused:
            await send_refusal(send, refused)
            return
        await self._app(scope, _Limited(receive), send)

    def _check(self, scope: Any, headers: dict[str, str]) -> None:
        host = re.sub(r":\d*$", "", headers.get("host", "")).lower()
        if self._loopback_only and not is_loopback(host):
            raise RequestRefused(
                403,
                f"The request is for host {host!r}, and this server answers to localhost alone: use"
                " its address, or start it with --host and --api-key.",
            )
        if self._api_key is not None and scope["path"] not in _OPEN_PATHS:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            known = hmac.compare_digest(key.strip().encode(), self._api_key.encode())
            if not known or scheme.lower() != "bearer":
                raise RequestRefused(
                    401,
                    "The API key is missing or wrong: send 'Authorization: Bearer KEY'.",
                    code="invalid_api_key",
                )
        if scope["method"] == "POST":
            kind = headers.get("content-type", "").split(";")[0].strip().lower()
            if kind != "application/json":
                raise RequestRefused(
                    415, f"The body is {kind or 'of no kind'!r}: send application/json."
                )
            length = headers.get("content-length", "0")
            if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
                raise too_large()


class _Limited:
    """`receive` of ASGI that stops a body which is longer than it said, or said nothing."""

    def __init__(self, receive: Any) -> None:
        self._receive = receive
        self._seen = 0

    async def __call__(self) -> Any:
        message = await self._receive()
        if message["type"] == "http.request":
            self._seen += len(message.get("body", b""))
            if self._seen > MAX_BODY_BYTES:
                raise too_large()
        return message


def too_large() -> RequestRefused:
    """The refusal of a body that is too long."""
    return RequestRefused(413, f"The body is longer than {MAX_BODY_BYTES >> 20} MiB.")


async def send_refusal(send: Any, refused: RequestRefused) -> None:
    """Answer with an error."""
    body = json.dumps(refused.body()).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        **{name.lower(): value for name, value in refused.headers.items()},
    }
    await send(
        {
            "type": "http.response.start",
            "status": refused.status,
            "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": body})
