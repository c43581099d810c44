"""A real server process in front of a tiny checkpoint."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.reference_model.tokenizer import build_tokenizer
from tests.helpers import save_tiny

TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MAX_CONTEXT = 192
NAME = "tiny"
PATIENCE_S = 1800.0
"""Nothing here is about speed: a wait ends a test that hangs, however busy the machine is."""
LONG: dict[str, Any] = {"prompt": ["LONG"] * 16, "n": 8, "max_tokens": 180}
"""A request that is under way for minutes, so that what a test does meanwhile is in the middle of
it. It must be cancelled."""
LONG_TOKENS = 16 * 8 * 180


class Process:
    """`specmoe serve` in a process of its own."""

    def __init__(self, checkpoint: Path, store: Path, *options: str, wait: bool = True) -> None:
        command = [sys.executable, "-m", "specmoe_compile.cli.main", "serve", str(checkpoint)]
        command += ["--device", "cpu", "--store", "disk", "--store-dir", str(store)]
        command += ["--port", "0", "--served-name", NAME, "--max-context", str(MAX_CONTEXT)]
        self.process = subprocess.Popen(
            [*command, *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONUNBUFFERED": "1",
                "TORCH_LOGS": "recompiles",
            },
        )
        self.lines: list[str] = []
        self.url = ""
        self._ready = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        if wait:
            assert self._ready.wait(PATIENCE_S), self.log()
            assert self.url, self.log()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            found = re.search(r"Ready after .* s: (http://\S+)/v1", line)
            if found:
                self.url = found[1]
                self._ready.set()
        self._ready.set()

    def log(self) -> str:
        """Standard error so far."""
        return "".join(self.lines)

    def compiled_late(self) -> list[str]:
        """What was compiled again after the server said that it was ready."""
        ready = next(at for at, line in enumerate(self.lines) if "Ready after" in line)
        return [line for line in self.lines[ready:] if "Recompiling" in line]

    def end(self, how: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        try:
            return self.process.wait(PATIENCE_S)
        finally:
            self.process.kill()


def connect(server: Process, api_key: str = "none") -> Any:
    """The real OpenAI client of a server."""
    openai = pytest.importorskip("openai")
    return openai.OpenAI(
        base_url=f"{server.url}/v1", api_key=api_key, max_retries=0, timeout=PATIENCE_S
    )


def begin_long(client: Any) -> Any:
    """The stream of a `LONG` request that is under way."""
    stream = client.completions.create(model=NAME, stream=True, **LONG)
    next(iter(stream))
    return stream


@pytest.fixture(scope="package")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with a byte tokenizer and a chat template."""
    folder = save_tiny(tmp_path_factory.mktemp("served"), vocab_size=256)
    tokenizer = build_tokenizer(256)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="package")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """One server for all tests of this folder; it compiles nothing late and ends cleanly.

    Its graphs run as they are. The slow tests' servers are lowered by Inductor.
    """
    options = ("--max-queue", "64", "-O", "lowering=eager")
    process = Process(checkpoint, tmp_path_factory.mktemp("serve") / "store", *options)
    yield process
    assert process.end() == 0, process.log()
    assert "Traceback" not in process.log(), process.log()
    assert not process.compiled_late(), process.log()


@pytest.fixture(scope="package")
def client(server: Process) -> Any:
    """The real OpenAI client."""
    return connect(server)


@pytest.fixture(scope="package")
def plain(checkpoint: Path) -> Any:
    """The unmodified model."""
    return AutoModelForCausalLM.from_pretrained(checkpoint).eval()


@pytest.fixture(scope="package")
def expected(checkpoint: Path, plain: Any) -> Any:
    """The unmodified model's greedy text after a prompt."""
    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)

    def of(prompt: str, tokens: int, **settings: Any) -> str:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            out = plain.generate(ids, max_new_tokens=tokens, do_sample=False, **settings)
        return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))

    return of
