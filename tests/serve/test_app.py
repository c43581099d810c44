"""The endpoints, without a server around them."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi")

from specmoe_compile.serve.app import make_app
from specmoe_compile.serve.metrics import Metrics


class Tokenizer:
    """Notes which thread reads a prompt; finds it too long."""

    chat_template = "{{ messages }}"

    def __init__(self) -> None:
        self.threads: set[int] = set()

    def __call__(self, text: str) -> Any:
        self.threads.add(threading.get_ident())
        return SimpleNamespace(input_ids=[1] * 100)

    def apply_chat_template(self, messages: Any, **settings: Any) -> Any:
        return {"input_ids": self("").input_ids}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("completions", {"prompt": "A"}),
        ("chat/completions", {"messages": [{"role": "user", "content": "A"}]}),
    ],
)
def test_a_long_prompt_is_not_read_in_the_loops_thread(path: str, body: dict[str, Any]) -> None:
    """Others' streams stood still for as long as a prompt of megabytes is read."""
    tokenizer = Tokenizer()
    engine: Any = SimpleNamespace(tokenizer=tokenizer, max_context=64)
    app = make_app(engine, Metrics(), name="m", api_key=None, loopback_only=True)

    async def ask() -> tuple[httpx.Response, int]:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post(f"/v1/{path}", json=body), threading.get_ident()

    answer, loops_thread = asyncio.run(ask())
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert len(tokenizer.threads) == 1 and loops_thread not in tokenizer.threads
