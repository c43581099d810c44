"""What is not even HTTP is refused in OpenAI's form too, before there is a request to answer."""

from __future__ import annotations

import json
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from specmoe_compile.serve.errors import RequestRefused

# Not httptools, which takes headers of any length and answers HTTP/1.0 in chunks.
_Base: Any = H11Protocol


class Protocol(_Base):  # type: ignore[misc]
    """uvicorn's protocol with another body of its 400."""

    def send_400_response(self, msg: str) -> None:
        """Refuse what could not be parsed, and close the connection.

        An answer that has begun (its request's body was malformed) is cut off: a second status
        line in it would be read as text.
        """
        cycle = getattr(self, "cycle", None)
        if cycle is None or cycle.response_complete or not cycle.response_started:
            refused = RequestRefused(400, "The request is not valid HTTP/1.1.")
            body = json.dumps(refused.body()).encode()
            self.transport.write(
                b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
                b"connection: close\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
            )
        self.transport.close()
