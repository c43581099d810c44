"""A process to be killed, interrupted or fed with failing reads: `python -m tests.faults.victim`.

It imports everything, generates once with a throwaway model, and then forks a child for each
command on its standard input, one JSON object per line: `{"what": "pack" | "load" | "decode",
"model", "store", "stop": null | [signal, seconds], "environment": {}}`. The parent sends the signal
so many seconds after the child began its work, and tells on standard output how it ended:
`{"status": exit status, -signal if it was killed; "said": its last line; "seconds"}`. A child that
is not stopped prints the tokens that it generated; one that got a Ctrl-C and works on to its end
has the status `SWALLOWED_STATUS`.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers  # noqa: F401  (imported before the fork, as everything slow)

import specmoe_compile
from specmoe_compile.cli.main import INTERRUPTED_STATUS, USER_ERROR_STATUS
from specmoe_compile.system.output import quiet_transformers, sentence, user_error_or_none
from tests.helpers import PATIENCE_S, save_tiny

PROMPT = [[5, 17, 80, 3, 44]]
NEW_TOKENS = 12
HUNG_STATUS = "hung"
SWALLOWED_STATUS = 99


def work(command: dict[str, Any]) -> str:
    """Do what a command says; returns what to print."""
    if command["what"] == "pack":
        specmoe_compile.pack(command["model"], command["store"], progress=False)
        return "packed"
    model: Any = specmoe_compile.from_pretrained(
        command["model"],
        device="cpu",
        store="disk",
        store_dir=command["store"],
        expert_cache="30%",
        progress=False,
    )
    if command["what"] == "load":
        return "loaded"
    tokens = model.generate(torch.tensor(PROMPT), max_new_tokens=NEW_TOKENS, do_sample=False)
    return json.dumps(tokens[0].tolist())


def child(command: dict[str, Any], out: int, begun: int) -> int:
    """Work, and return the exit status; a byte in the pipe `begun` says that the work begins."""
    interrupts = 0

    def interrupt(*_: object) -> None:
        nonlocal interrupts
        interrupts += 1
        raise KeyboardInterrupt

    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(command.get("environment", {}))
    try:
        signal.signal(signal.SIGINT, interrupt)
        os.write(begun, b"!")
        said = work(command)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print(said, flush=True)
        if interrupts:
            return SWALLOWED_STATUS
    except KeyboardInterrupt:
        return INTERRUPTED_STATUS
    except Exception as error:
        known = user_error_or_none(error)
        if known is None:
            raise
        print(sentence(known), flush=True)
        return USER_ERROR_STATUS
    return 0


def serve_one(command: dict[str, Any]) -> dict[str, Any]:
    begins, begun = os.pipe()
    with tempfile.TemporaryFile() as out:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.close(begins)
                status = child(command, out.fileno(), begun)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(begun)
        os.read(begins, 1)
        os.close(begins)
        began_s = time.monotonic()
        ended = wait(pid, command.get("stop"), began_s)
        seconds = time.monotonic() - began_s
        out.seek(0)
        lines = out.read().decode(errors="replace").strip().splitlines()
    return {"status": ended, "said": lines[-1] if lines else "", "seconds": seconds}


def wait(pid: int, stop: list[float] | None, began_s: float) -> int | str:
    sent = stop is None
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        elapsed_s = time.monotonic() - began_s
        if not sent and stop is not None and elapsed_s >= stop[1]:
            os.kill(pid, int(stop[0]))
            sent = True
        if elapsed_s > PATIENCE_S:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return HUNG_STATUS
        time.sleep(0.001)


def main() -> None:
    torch.set_num_threads(1)
    quiet_transformers()
    with tempfile.TemporaryDirectory() as folder:  # what is imported late is imported here
        model = save_tiny(Path(folder) / "model", layers=1)
        work({"what": "decode", "model": str(model), "store": f"{folder}/store"})
    gc.collect()
    for line in sys.stdin:
        print(json.dumps(serve_one(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
