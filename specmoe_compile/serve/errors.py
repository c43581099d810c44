"""What a client did wrong, in OpenAI's form of an error."""

from __future__ import annotations

from typing import Any


class RequestRefused(Exception):
    """A request that is answered with an error: status, one sentence, and which field it is about.

    Attributes:
        status: HTTP status, 4xx or 5xx.
        message: what was got, what was expected, what to do.
        param: the field of the request, or None.
        code: OpenAI's short name of the error, or None.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else kinds.get(self.status)
        return {
            "error": {
                "message": self.message,
                "type": kind or "invalid_request_error",
                "param": self.param,
                "code": self.code,
            }
        }
