"""llama.cpp on a GPU at full size, by its own `llama-bench`: rows for `peers_gpu`.

    python -m benchmarks peers_llama --bench build/bin/llama-bench --model Qwen3-30B-A3B \\
        --format q4_0 --folder /dev/shm --threads 16 8 --out llama.jsonl

Writes a GGUF file of random weights in the model's full shape if it is not there, and keeps a JSON
object a line in `--out`, for each share of layers whose experts are in GPU memory (`--n-cpu-moe`
counts layers: 0, 25, 50 and 100 % of them) and each context. Attention and all else is on the GPU,
flash attention is on, experts in RAM are multiplied by the CPU, and keys and values are float16.
`llama-bench` times runs of 48 tokens behind a context, not tokens: a row has the median of the
runs, the runs, and no quantiles of tokens. First tokens are those of a prompt of 1024. Of several
`--threads` the fastest with all experts in RAM is taken for the rest. Rows that are there are kept.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.full_size.model import SHAPES
from benchmarks.full_size.peer_rows import RowFile
from benchmarks.full_size.random_gguf import FORMATS, expert_bytes_of_layers, write_gguf
from benchmarks.kit.command import run_parser
from benchmarks.kit.turns import preparing, turn
from specmoe_compile.system.output import USER_ERRORS, sentence

Row = dict[str, Any]
Line = dict[str, Any]
SHARES = (100, 50, 25, 0)
"""Of layers whose experts are in GPU memory. All of them first: the others find the keys and values
of the context that those computed."""
TOKENS, RUNS = 48, 3
PROMPT, PROMPT_RUNS = 1024, 2
POLL_S = 0.5


def layers_off_gpu(layers: int, share: int) -> int:
    """Layers whose experts are in RAM: the others are at most `share` per cent of all."""
    return layers - layers * share // 100


def arm_name(share: int) -> str:
    """As `peers_gpu` names arms: by the share, or `resident`."""
    return "resident" if share == 100 else f"cpu_moe_{share}"


def command(
    bench: Path,
    gguf: Path,
    layers: int,
    shares: Sequence[int],
    *,
    threads: Sequence[int],
    depth: int,
    prompt: int,
    tokens: int,
    runs: int,
) -> list[str]:
    """A call of `llama-bench` for several shares; it prints a JSON object a line."""
    off_gpu = ",".join(str(layers_off_gpu(layers, share)) for share in shares)
    values = {
        "-m": str(gguf),
        "-ngl": "99",
        "-ncmoe": off_gpu,
        "-fa": "on",
        "-t": ",".join(str(count) for count in threads),
        "-d": str(depth),
        "-p": str(prompt),
        "-n": str(tokens),
        "-r": str(runs),
        "-o": "jsonl",
    }
    return [str(bench), *(part for pair in values.items() for part in pair)]


class Watch:
    """Highest memory of a child and of its GPU while it runs, read twice a second."""

    def __init__(self, gpu_bytes: Callable[[], int | None], child: int) -> None:
        self._gpu_bytes, self._process = gpu_bytes, psutil.Process(child)
        self._before = gpu_bytes()
        self._gpu = self._host = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(POLL_S):
            self._read()

    def _read(self) -> None:
        self._gpu = max(self._gpu, self._gpu_bytes() or 0)
        with suppress(psutil.Error):  # it may have just ended
            self._host = max(self._host, self._process.memory_info().rss)

    def take(self) -> tuple[int | None, int]:
        """Bytes of GPU memory above what was in use before, and of host memory, since last time."""
        self._read()
        gpu = None if self._before is None else self._gpu - self._before
        host, self._gpu, self._host = self._host, 0, 0
        return gpu, host

    def end(self) -> None:
        self._over.set()
        self._thread.join()


def used_gpu_bytes() -> int | None:
    """What is in use of the first visible GPU's memory; None without one."""
    index = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    query = ["nvidia-smi", "-i", index, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10)
        return int(done.stdout.split()[0]) << 20
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return None


def run_bench(
    call: Sequence[str], seconds: float, gpu_bytes: Callable[[], int | None] = used_gpu_bytes
) -> Iterator[Line]:
    """Run `llama-bench`; each line that it prints, with `gpu_bytes` and `host_bytes` of the time.

    Raises:
        ValueError: it failed or took longer than `seconds`; with the last line that it wrote.
    """
    child = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines, errors = child.stdout, child.stderr
    assert lines is not None and errors is not None, "both are pipes"
    said: list[str] = []
    listener = threading.Thread(target=said.extend, args=(errors,), daemon=True)
    listener.start()
    late = threading.Event()

    def end() -> None:
        late.set()
        child.kill()

    timer = threading.Timer(seconds, end)
    timer.start()
    watch = Watch(gpu_bytes, child.pid)
    try:
        for text in lines:
            if text.startswith("{"):
                gpu, host = watch.take()
                yield {**json.loads(text), "gpu_bytes": gpu, "host_bytes": host}
    except BaseException:  # nobody listens any more
        child.kill()
        raise
    finally:
        status = child.wait()
        timer.cancel()
        listener.join()
        watch.end()
    if status:
        reason = f"it took more than {seconds:.0f} s" if late.is_set() else f"status {status}"
        last = next((line.strip() for line in reversed(said) if line.strip()), "nothing")
        raise ValueError(f"llama-bench did not finish ({reason}); it said last: {last}")


def cell_of(model: str, form: str, share: int, context: int) -> Row:
    """What names a row."""
    return {
        "system": "llama.cpp",
        "arm": arm_name(share),
        "model": model,
        "format": form,
        "context": context,
        "routing": "own",
    }


def figures_of(line: Line, layers: Sequence[int]) -> Row:
    """What a line about generated tokens says, as `peers_gpu` has it; `layers`: experts' bytes."""
    count = line["n_gen"]
    runs = [nanoseconds / count / 1e6 for nanoseconds in line["samples_ns"]]
    return {
        "cache_bytes": sum(layers[line["n_cpu_moe"] :]),
        "tpot_ms": {"p20": None, "p50": statistics.median(runs), "p80": None},
        "runs_ms": runs,
        "tokens": count,
        "device_ms": None,
        "ttft_ms": None,
        "gpu_bytes": line["gpu_bytes"],
        "host_bytes": line["host_bytes"],
        "hit_rate": None,
        "threads": line["n_threads"],
        "build": f"{line['build_commit']}, {line['backends']}",
        "cpu": line["cpu_info"],
    }


class Benchmark:
    """One call: what is asked for, what is there already, and how much time is left."""

    def __init__(self, args: Any) -> None:
        self._args = args
        self._config = SHAPES[args.model].configured()
        self._layers = int(self._config.num_hidden_layers)
        self._bytes = expert_bytes_of_layers(self._config, args.format)
        self._end = time.monotonic() + args.budget_s
        self._gguf = args.folder / f"{args.model}-{args.format}.gguf"
        self._rows = RowFile(args.out)
        self._shares = {layers_off_gpu(self._layers, share): share for share in SHARES}

    def run(self) -> None:
        """All contexts, in the order that was asked for, and first tokens."""
        args = self._args
        with preparing(args.turns):
            began = time.monotonic()
            size = write_gguf(self._gguf, self._config, args.format)
            seconds = time.monotonic() - began
            print(f"{self._gguf}: {size / 1e9:.1f} GB, {seconds:.0f} s", flush=True)
        threads = list(args.threads)
        for context in args.contexts:
            wanted = [s for s in args.shares if not self._rows.has(self._cell(s, context))]
            if wanted and len(threads) > 1:
                threads = [self._fastest(threads, context)]
            if wanted:
                self._keep_lines(wanted, context, threads)
            if context == PROMPT:
                self._first_tokens(threads[:1])

    def _cell(self, share: int, context: int) -> Row:
        return cell_of(self._args.model, self._args.format, share, context)

    def _lines(self, shares: Sequence[int], **values: Any) -> Iterator[Line]:
        call = command(self._args.bench, self._gguf, self._layers, shares, **values)
        print(" ".join(call), flush=True)
        with turn(self._args.turns):
            yield from run_bench(call, max(1.0, self._end - time.monotonic()))

    def _fastest(self, threads: Sequence[int], context: int) -> int:
        """Of several numbers of threads, with all experts in RAM; the first if none was timed."""
        found: dict[int, float] = {}
        wanted = {"threads": threads, "depth": context, "prompt": 0, "tokens": TOKENS, "runs": 2}
        try:
            for line in self._lines([0], **wanted):
                found[line["n_threads"]] = line["avg_ns"]
        except ValueError as error:
            print(error, flush=True)
        print(f"ns of {TOKENS} tokens by threads: {found}", flush=True)
        return min(found or threads, key=lambda count: found.get(count, 0.0))

    def _keep_lines(self, shares: Sequence[int], context: int, threads: Sequence[int]) -> None:
        wanted = {"depth": context, "prompt": 0, "tokens": TOKENS, "runs": RUNS}
        try:
            for line in self._lines(shares, threads=threads, **wanted):
                cell = self._cell(self._shares[line["n_cpu_moe"]], context)
                self._rows.keep({**cell, **figures_of(line, self._bytes)})
        except ValueError as error:
            for cell in (self._cell(share, context) for share in shares):
                if not self._rows.has(cell):
                    self._rows.keep({**cell, "not_run": str(error)})

    def _first_tokens(self, threads: Sequence[int]) -> None:
        """Of a prompt of 1024, into the rows of that context."""
        rows = {share: self._rows.get(self._cell(share, PROMPT)) for share in self._args.shares}
        missing = [s for s, row in rows.items() if row.get("ttft_ms", 0.0) is None]
        wanted = {"depth": 0, "prompt": PROMPT, "tokens": 0, "runs": PROMPT_RUNS}
        try:
            for line in self._lines(missing, threads=threads, **wanted) if missing else ():
                ttft_ms = statistics.median(line["samples_ns"]) / 1e6
                self._rows.keep({**rows[self._shares[line["n_cpu_moe"]]], "ttft_ms": ttft_ms})
        except ValueError as error:
            print(error, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and keep rows; returns the exit status."""
    parser = run_parser("peers_llama", __doc__)
    parser.add_argument("--bench", type=Path, required=True, help="the program llama-bench")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines of the rows")
    parser.add_argument("--model", choices=sorted(SHAPES), default="Qwen3-30B-A3B")
    parser.add_argument("--format", choices=list(FORMATS), default="q4_0")
    parser.add_argument("--folder", type=Path, required=True, help="where the GGUF file is put")
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024, 65536])
    parser.add_argument("--shares", nargs="+", type=int, choices=SHARES, default=list(SHARES))
    parser.add_argument("--threads", nargs="+", type=int, default=[os.cpu_count() or 1])
    parser.add_argument("--turns", type=Path, help="file of the processes that measure beside it")
    parser.add_argument("--budget-s", type=float, default=480.0, help="stop after this")
    args = parser.parse_args(arguments)
    args.shares = sorted(args.shares, reverse=True)
    try:
        if not args.bench.is_file():
            raise ValueError(
                f"{args.bench} is no file: build llama.cpp's target llama-bench first."
            )
        Benchmark(args).run()
    except (*USER_ERRORS, ImportError) as error:
        print(sentence(error), file=sys.stderr)
        return 2
    return 0
