"""Starts groups of ranks by forking: torch and transformers are imported once for all of them.

Run as `python -m tests.ranks.launch OUT`, where OUT/scenarios.json holds a list of scenarios (see
`tests.ranks.worker`). Each group gets OUT/NAME with a result, an error text and a status per rank.
Nobody ends the others when a rank fails: each must end by itself. Those that do not are ended after
a time that no machine needs, however busy it is.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

# What compiling and this family need: imported here, or else by each rank for itself.
import functorch.compile  # noqa: F401
import networkx  # noqa: F401
import torch._inductor.compile_fx  # noqa: F401
import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401

import specmoe_compile.backend  # noqa: F401
from tests.ranks import worker

LIMIT_S = 1200.0


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def be_rank(scenario: dict[str, Any], folder: Path, rank: int, port: int) -> int:
    """Run one rank in this process, which is a fork of its own; returns its exit status."""
    size = str(scenario["ranks"])
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=size,
        LOCAL_WORLD_SIZE=size,
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    errors = os.open(folder / f"rank{rank}.err", os.O_CREAT | os.O_WRONLY, 0o644)
    os.dup2(errors, 1)
    os.dup2(errors, 2)
    try:
        found = worker.run(scenario)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    return 0


def run_group(scenario: dict[str, Any], out: Path) -> None:
    """Run all ranks of a scenario, and write down how each ended: a status, or "hangs"."""
    folder = out / scenario["name"]
    folder.mkdir()
    port = free_port()
    children: dict[int, int] = {}
    for rank in range(scenario["ranks"]):
        child = os.fork()
        if child == 0:
            os._exit(be_rank(scenario, folder, rank, port))
        children[child] = rank
    ended: dict[int, Any] = {}
    until = time.monotonic() + LIMIT_S
    while children and time.monotonic() < until:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child in children:
            ended[children.pop(child)] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    for child, rank in children.items():
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        ended[rank] = "hangs"
    statuses = [ended[rank] for rank in range(scenario["ranks"])]
    (folder / "status.json").write_text(json.dumps(statuses))


if __name__ == "__main__":
    place = Path(sys.argv[1])
    for each in json.loads((place / "scenarios.json").read_text()):
        run_group(each, place)
