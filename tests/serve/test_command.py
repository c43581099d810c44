"""What `specmoe serve` refuses: one sentence, status 2, before a model is loaded."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

import specmoe_compile
from tests.cli.test_main import complaint


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model is a failure of the test."""

    def load(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(specmoe_compile, "from_pretrained", load)
    monkeypatch.delenv("SPECMOE_API_KEY", raising=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_another_host_demands_a_key(capsys: pytest.CaptureFixture[str], host: str) -> None:
    said = complaint(capsys, "serve", "model", "--device", "cpu", "--host", host)
    assert said == f"specmoe: --host {host} lets other machines in: give --api-key (or" + (
        " SPECMOE_API_KEY) too."
    )


def test_an_empty_key_is_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = ("serve", "model", "--device", "cpu", "--host", "0.0.0.0")
    assert "--api-key is empty" in complaint(capsys, *call, "--api-key=")
    monkeypatch.setenv("SPECMOE_API_KEY", "")
    assert "lets other machines in" in complaint(capsys, *call)


@pytest.mark.parametrize("key", ["ключ", "a b", "a\n"])
def test_a_key_that_no_client_can_send(capsys: pytest.CaptureFixture[str], key: str) -> None:
    said = complaint(capsys, "serve", "model", "--device", "cpu", "--api-key", key)
    assert "choose another one" in said and key not in said


def test_more_context_than_the_models(capsys: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    call = ("serve", str(checkpoint), "--device", "cpu", "--port", "0", "--max-context", "100000")
    said = complaint(capsys, *call)
    assert "--max-context 100000 is more than this model's 256 positions: give at most 256" in said


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        said = complaint(capsys, "serve", "model", "--device", "cpu", "--port", port)
    assert "Address already in use; try another --port" in said
