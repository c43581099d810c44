"""What the fault tests share: the victim process, and what a sound store looks like."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from specmoe_compile.errors import StoreError
from specmoe_compile.runtime.store.disk import DiskStore
from tests.helpers import save_tiny

ROOT = Path(__file__).resolve().parents[2]
TRIALS = 20


class Victim:
    """A `tests.faults.victim` process; a context manager."""

    def __init__(self, cache: Path, **environment: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.victim"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "XDG_CACHE_HOME": str(cache), **environment},
        )

    def __enter__(self) -> Victim:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()

    def run(self, what: str, model: Path, store: Path, **more: Any) -> dict[str, Any]:
        self.start(what, model, store, **more)
        return self.result()

    def start(self, what: str, model: Path, store: Path, **more: Any) -> None:
        assert self._process.stdin is not None
        command = {"what": what, "model": str(model), "store": str(store), **more}
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def result(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the victim's parent died"
        told: dict[str, Any] = json.loads(line)
        return told


def save_model(folder: Path) -> Path:
    """A checkpoint whose packing takes long enough to be hit in the middle: 6 layers, 9 MB."""
    return save_tiny(folder, layers=6, experts=8, moe_intermediate_size=256)


def records_or_none(store: Path) -> bytes | None:
    """The records of a store that looks complete, all checked; None if none does."""
    with contextlib.suppress(StoreError), contextlib.closing(DiskStore.open(store)) as opened:
        opened.verify()
        return (store / "experts.bin").read_bytes()
    assert not (store / "header.json").exists(), "a store that looks complete is damaged"
    return None
