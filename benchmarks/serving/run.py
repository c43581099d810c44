"""What the server costs beside `specmoe generate`: tokens per second, and a chat's second turn.

    python -m benchmarks serving MODEL --out serving.json [--store-dir DIR] [--expert-cache 25%]

Rows: `specmoe generate` alone, then 1, 4 and 8 clients of `specmoe serve` at the same model, in
turn and twice; then the time to the first token of a second turn after a history of 2,000 tokens,
beside that of the first turn. Real processes, the real `openai` client.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from specmoe_compile.bench.machine import provenance

PROMPT = "import os\n\n\ndef walk(folder):\n"
TOKENS = 64
HISTORY_TOKENS = 2000


def main(argv: Sequence[str] | None = None) -> int:
    """Run all rows and write the file."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks serving", description=__doc__.splitlines()[0]
    )
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--store-dir", type=Path)
    parser.add_argument("--expert-cache", default="25%")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--store", default="disk")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args(argv)
    common = ["--device", arguments.device, "--store", arguments.store]
    common += ["--expert-cache", arguments.expert_cache]
    if arguments.store_dir is not None:
        common += ["--store-dir", str(arguments.store_dir)]
    rows: list[dict[str, Any]] = []
    for turn in range(arguments.rounds):
        rows.append({"arm": "generate", "turn": turn, **alone(arguments.model, common)})
        with Server(arguments.model, common) as server:
            rows.append({"arm": "ready", "turn": turn, "seconds": server.ready_s})
            for clients in (1, 4, 8):
                rows.append({"arm": "serve", "turn": turn, **server.load(clients)})
            rows.append({"arm": "second_turn", "turn": turn, **server.second_turn()})
        print(json.dumps(rows[-6:], indent=1), flush=True)
    result = {
        "schema": 1,
        **provenance(),
        "model": Path(arguments.model).name,
        "tokens": TOKENS,
        "rows": rows,
        "server_cost": server_cost(rows),
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def server_cost(rows: list[dict[str, Any]]) -> float:
    """Time per token of one client over that of `generate` alone, medians, less 1."""
    alone_ms = [float(row["tpot_ms"]) for row in rows if row["arm"] == "generate"]
    served = [row for row in rows if row["arm"] == "serve" and row["clients"] == 1]
    served_ms = [float(row["tpot_ms"]) for row in served]
    return statistics.median(served_ms) / statistics.median(alone_ms) - 1.0


def alone(model: str, common: list[str]) -> dict[str, Any]:
    """Median time per token of `specmoe generate`, after the first tokens."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, "-m", "specmoe_compile.cli.main", "generate", model, *common]
        command += ["--prompt", PROMPT, "--max-new-tokens", str(3 * TOKENS), "--json", str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found = json.loads(out.read_text())
    return {"tpot_ms": found["tpot_ms"]["p50"]}


class Server:
    """A server process and its client."""

    def __init__(self, model: str, common: list[str]) -> None:
        command = [sys.executable, "-m", "specmoe_compile.cli.main", "serve", model, *common]
        command += ["--port", "0", "--served-name", "m", "--max-context", "4096"]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        for line in self._process.stderr:
            found = re.search(r"Ready after ([\d.]+) s: (\S+)", line)
            if found:
                break
        else:
            raise SystemExit("the server ended before it was ready")
        self.ready_s = float(found[1])
        from openai import OpenAI

        self._client: Any = OpenAI(base_url=found[2], api_key="none", max_retries=0, timeout=600)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.wait(60)

    def _stream(self, prompt: str, tokens: int) -> tuple[float, list[float]]:
        started = time.perf_counter()
        stamps = [
            time.perf_counter()
            for chunk in self._client.completions.create(
                model="m", prompt=prompt, max_tokens=tokens, temperature=0, stream=True
            )
            if chunk.choices[0].text
        ]
        return (stamps[0] - started) * 1e3, [(b - a) * 1e3 for a, b in itertools.pairwise(stamps)]

    def load(self, clients: int) -> dict[str, Any]:
        """So many clients at once, each two requests."""
        self._stream(PROMPT, TOKENS)
        started = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            out = list(pool.map(lambda _: self._stream(PROMPT, TOKENS), range(2 * clients)))
        seconds = time.perf_counter() - started
        gaps = [gap for _, each in out for gap in each]
        return {
            "clients": clients,
            "tpot_ms": statistics.median(gaps),
            "tokens_per_s": 2 * clients * TOKENS / seconds,
        }

    def second_turn(self) -> dict[str, Any]:
        """Time to the first token of a long prompt, and of the same with an end."""
        words = " ".join(f"value_{number} = {number}" for number in range(HISTORY_TOKENS))
        sample = words[1000:3000]
        usage = self._client.completions.create(model="m", prompt=sample, max_tokens=1).usage
        history = words[: int(HISTORY_TOKENS * len(sample) / usage.prompt_tokens)]
        first_ms, _ = self._stream(history, 8)
        second_ms, _ = self._stream(history + "\nprint(", 8)
        return {"first_turn_ttft_ms": first_ms, "second_turn_ttft_ms": second_ms}
