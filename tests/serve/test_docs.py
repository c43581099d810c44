"""The commands of docs/serving.md work as they are written, against this folder's server."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.conftest import PATIENCE_S, Process

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
CURLS = [
    command.strip()
    for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    for command in re.split(r"\n(?=curl )|\n\n", block)
    if command.startswith("curl ")
]
(SNIPPET,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def _here(text: str, server: Process) -> str:
    assert "http://127.0.0.1:8000" in text
    return text.replace("http://127.0.0.1:8000", server.url)


def test_the_page_has_commands() -> None:
    assert len(CURLS) == 5


@pytest.mark.parametrize("command", CURLS)
def test_a_curl_command_works(server: Process, command: str) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl")
    out = subprocess.run(
        ["bash", "-c", _here(command.replace("curl ", "curl --fail --silent ", 1), server)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert out.returncode == 0, out.stdout + out.stderr
    if "stream" in command:
        assert out.stdout.count("data: {") > 2 and out.stdout.endswith("data: [DONE]\n\n")
    elif "metrics" in command:
        assert "specmoe_completion_tokens_total" in out.stdout
    else:
        assert '"object":' in out.stdout


def test_the_python_client_works(server: Process) -> None:
    pytest.importorskip("openai")
    out = subprocess.run(
        [sys.executable, "-c", _here(SNIPPET, server)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout
