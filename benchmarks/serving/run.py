"""What the server costs beside `specmoe generate`: time per token, load, a chat's second turn.

    python -m benchmarks serving MODEL --phase cost load --out serving.json [--store-dir DIR]

Each phase takes a few minutes and keeps what others wrote into the file:

- `cost`: the server's own cost per token, one model in one process in turns (`serving.cost`).
- `load`: tokens per second of 1, 4 and 8 clients beside `generate` alone, likewise in turns.
- `second_turn`: time to the first token behind a history of 2,000 tokens whose keys and values are
  kept, and behind the same history after another conversation has taken their place. The server is
  a process of its own.

With `--page` the file becomes docs/results/serving.md. Clients are the real `openai` package's.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.kit.command import run_parser
from benchmarks.kit.places import DOCUMENTS
from benchmarks.serving.cost import Side, load, own_cost, stream_times
from benchmarks.serving.report import page
from specmoe_compile.bench.machine import provenance

PROMPT = "import os\n\n\ndef walk(folder):\n"
CONTEXT = 256
HISTORY_TOKENS = 2000
REQUESTS = 8
PHASES = ("cost", "load", "second_turn")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure phases and add them to the file; write the page."""
    parser = run_parser("serving", __doc__)
    parser.add_argument("model", help="folder or hub name")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--phase", choices=PHASES, nargs="*", default=[])
    parser.add_argument("--page", action="store_true", help="write docs/results/serving.md")
    parser.add_argument("--store-dir", type=Path)
    parser.add_argument("--expert-cache", default="25%")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--store", default="disk")
    parser.add_argument("--threads", type=int, help="PyTorch's; by default its own choice")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--seconds", type=float, default=180, help="of the phase cost")
    parser.add_argument("--rounds", type=int, default=5, help="of the other phases")
    parser.add_argument("--history", type=int, default=HISTORY_TOKENS, help="tokens")
    asked = parser.parse_args(argv)
    found = json.loads(asked.out.read_text()) if asked.out.exists() else {"schema": 1}
    kept = ("device", "store", "expert_cache", "threads")
    for phase, figures in _measured(asked):
        found[phase] = {
            **provenance(),
            "seed": None,  # greedy
            "model": asked.model,
            "settings": {name: getattr(asked, name) for name in kept},
            **figures,
        }
        asked.out.write_text(json.dumps(found, indent=1) + "\n")
    if asked.page:
        (DOCUMENTS / "serving.md").write_text(page(found))
    return 0


def _measured(asked: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each phase that was asked for, with its figures."""
    if {"cost", "load"} & set(asked.phase):
        settings = {name: getattr(asked, name) for name in ("device", "store", "expert_cache")}
        if asked.store_dir is not None:
            settings["store_dir"] = asked.store_dir
        side = Side(asked.model, CONTEXT, asked.threads, **settings)
        try:
            if "cost" in asked.phase:
                cost = own_cost(side, PROMPT, asked.tokens, seconds=asked.seconds)
                yield "cost", {"context": CONTEXT, **cost}
            if "load" in asked.phase:
                head = {"context": CONTEXT, "tokens": asked.tokens, "requests": REQUESTS}
                rows = load(
                    side,
                    PROMPT,
                    asked.tokens,
                    clients=(1, 4, 8),
                    rounds=asked.rounds,
                    requests=REQUESTS,
                )
                yield "load", {**head, "rows": rows}
        finally:
            side.close()
    if "second_turn" in asked.phase:
        with Server(asked, context=asked.history + 256) as server:
            yield "second_turn", second_turn(server, asked.history, asked.rounds)


class Server:
    """`specmoe serve` in a process of its own, and its client."""

    def __init__(self, asked: Any, *, context: int) -> None:
        """Start it and wait until it is ready; raises `RuntimeError` where it ends before."""
        command = [sys.executable, "-m", "specmoe_compile.cli.main", "serve", asked.model]
        for name in ("device", "store", "expert_cache", "store_dir", "threads"):
            value = getattr(asked, name)
            if value is not None:
                command += [f"--{name.replace('_', '-')}", str(value)]
        command += ["--port", "0", "--served-name", "m", "--max-context", str(context)]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        lines = []
        for line in self._process.stderr:
            lines.append(line)
            if found := re.search(r"Ready after ([\d.]+) s: (\S+)", line):
                break
        else:
            raise RuntimeError(f"the server ended before it was ready: {''.join(lines[-5:])}")
        self.ready_s = float(found[1])
        self.url = found[2]

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.wait(60)


def second_turn(server: Server, history_tokens: int, rounds: int) -> dict[str, Any]:
    """Times to the first token behind a history that is kept, and one that is not."""
    from openai import OpenAI

    client = OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=600)

    def ask(prompt: str) -> Any:
        out = client.completions.create(model="m", prompt=prompt, max_tokens=2, temperature=0)
        return out.usage

    words = " ".join(f"value_{number} = {number}" for number in range(2 * history_tokens))
    fits = history_tokens // 4  # characters of which there are surely fewer tokens
    history = words[: int(fits * history_tokens / ask(words[:fits]).prompt_tokens)]
    turn = history + "\nprint("
    times: dict[str, list[float]] = {"kept": [], "not_kept": []}
    for _ in range(rounds):
        ask("#" + history)  # another conversation, as long
        times["not_kept"].append(stream_times(server.url, turn, 2)[0])
        ask(history)
        times["kept"].append(stream_times(server.url, turn, 2)[0])
    ask("#" + history)
    cold = ask(turn)
    first = ask(history)
    warm = ask(turn)
    return {
        "ready_s": server.ready_s,
        "tokens": {"history": first.prompt_tokens, "prompt": warm.prompt_tokens},
        "cached": {
            "kept": warm.prompt_tokens_details.cached_tokens,
            "not_kept": cold.prompt_tokens_details.cached_tokens,
        },
        "ttft_ms": {arm: statistics.median(each) for arm, each in times.items()},
        "turns_ms": times,
    }


if __name__ == "__main__":
    sys.exit(main())
