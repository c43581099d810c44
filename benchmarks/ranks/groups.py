"""Groups of ranks in processes of their own: one job from start to end, or many turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.kit.places import ROOT
from specmoe_compile.system.output import write_json

POLL_S = 0.02
NO_MULTICAST = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}


def start(
    module: str, ranks: int, job: Path, errors: Path, gpu: int | None = None
) -> subprocess.Popen[bytes]:
    """Start a worker module with the path of its job, on so many ranks, one thread each.

    Args:
        errors: where its standard error goes.
        gpu: the only one that they see, of those that this process sees; None for all.
    """
    worker = ["-m", module, str(job)]
    if ranks > 1:
        # Standalone: torchrun takes a port that is free.
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        worker = [*launch, *worker]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # Multicast over NVLink is not to be had on every machine that has NVLink.
    chosen = {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **NO_MULTICAST}
    if gpu is not None:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        chosen["CUDA_VISIBLE_DEVICES"] = seen.split(",")[gpu] if seen else str(gpu)
    with errors.open("wb") as told:
        return subprocess.Popen(
            [sys.executable, *worker],
            env={**os.environ, **chosen},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=told,
        )


def run_group(job: Mapping[str, Any], ranks: int, folder: Path, module: str) -> dict[str, Any]:
    """Run a job of a worker module on so many ranks, and return what rank 0 wrote to its `out`.

    Raises:
        RuntimeError: a rank failed; its last lines are in the message.
    """
    path, errors = folder / "job.json", folder / "errors.txt"
    path.write_text(json.dumps(job), encoding="utf-8")
    if start(module, ranks, path, errors).wait():
        raise RuntimeError(f"{ranks} ranks failed:\n{_last(errors)}")
    found: dict[str, Any] = json.loads(Path(job["out"]).read_text(encoding="utf-8"))
    return found


class Group:
    """Ranks that stay: they load once, and then take a turn whenever they are asked to.

    The turns' arguments and results pass through files, `ask.json` and `answer-N.json`. Between
    turns the ranks look for the first every `POLL_S` seconds, and leave the cores alone.
    """

    def __init__(
        self,
        module: str,
        job: Mapping[str, Any],
        ranks: int,
        folder: Path,
        *,
        name: str = "group",
        gpu: int | None = None,
    ) -> None:
        """Start them. Several of one folder differ in `name` or `ranks`; `gpu` as in `start`."""
        self._folder = folder / f"{name}-{ranks}"
        self._folder.mkdir()
        path, self._errors = self._folder / "job.json", self._folder / "errors.txt"
        job = {**job, "folder": str(self._folder), "parent": os.getpid()}
        path.write_text(json.dumps(job), encoding="utf-8")
        self._ranks, self._number = ranks, 0
        self._process = start(module, ranks, path, self._errors, gpu)

    def first(self) -> dict[str, Any]:
        """What they say once they are ready; they end if they cannot be.

        Raises:
            RuntimeError: a rank failed; its last lines are in the message.
        """
        try:
            return self.answer()
        except BaseException:
            self.close()
            raise

    def turn(self, ask: Mapping[str, Any]) -> dict[str, Any]:
        """One turn of all ranks; what rank 0 says of it.

        Raises:
            RuntimeError: a rank failed; its last lines are in the message.
        """
        self.ask(ask)
        return self.answer()

    def ask(self, ask: Mapping[str, Any]) -> None:
        """Begin a turn; `answer` waits for its end, and several groups can be asked before."""
        self._number += 1
        write_json(self._folder / "ask.json", {"number": self._number, "ask": dict(ask)})

    def close(self) -> None:
        """End them."""
        if self._process.poll() is None:
            write_json(self._folder / "ask.json", {"number": self._number + 1, "ask": None})
            self._process.terminate()
        self._process.wait()

    def answer(self) -> dict[str, Any]:
        """What rank 0 says of the last turn that was asked for, once it is over."""
        path = self._folder / f"answer-{self._number}.json"
        while not path.exists():
            if self._process.poll() is not None:
                raise RuntimeError(f"{self._ranks} ranks failed:\n{_last(self._errors)}")
            time.sleep(POLL_S)
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found


class Turns:
    """The other side of a `Group`, on each of its ranks."""

    def __init__(self, job: Mapping[str, Any], rank: int) -> None:
        """Of the job that the group started this process with."""
        self._folder, self._parent = Path(job["folder"]), int(job["parent"])
        self._rank, self._number = rank, 0

    def answer(self, found: Mapping[str, Any]) -> None:
        """Say what came of a turn; only rank 0 is heard."""
        if self._rank == 0:
            write_json(self._folder / f"answer-{self._number}.json", dict(found))

    def next_or_none(self) -> dict[str, Any] | None:
        """Wait for the next turn; None at the end, or when the process that asks is gone."""
        path = self._folder / "ask.json"
        while True:
            asked = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
            if asked is not None and asked["number"] > self._number:
                self._number = asked["number"]
                ask: dict[str, Any] | None = asked["ask"]
                return ask
            if not Path(f"/proc/{self._parent}").exists():
                return None
            time.sleep(POLL_S)


def _last(errors: Path) -> str:
    return errors.read_text(encoding="utf-8", errors="replace")[-4000:]
