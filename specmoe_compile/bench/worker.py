"""The process that measures one arm: `python -m specmoe_compile.bench.worker JOB`.

JOB is the JSON of an `ArmJob`. The process loads, compiles and warms up, tells "ready", and then
takes one turn for each line on its standard input, `{"result": path, "warm_up": bool}`: it
generates the job's prompts, writes the JSON of the `ArmRun` to that path and tells "measured". The
end of standard input ends it. Events go to standard output, one JSON object per line. A mistake
that one sentence explains ends the process with status 2 and that sentence as the last line on
standard error.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from specmoe_compile.bench.arm import Generator
from specmoe_compile.bench.counters import CounterLaps, Counters, add_counters
from specmoe_compile.bench.hf_generation import HuggingFaceGenerator
from specmoe_compile.bench.records import ArmJob, ArmRun
from specmoe_compile.bench.timing import TokenClock
from specmoe_compile.system.machine import cpu_count
from specmoe_compile.system.output import (
    quiet_transformers,
    sentence,
    user_error_or_none,
    write_json,
)

_EVENT_INTERVAL_S = 0.5


def main(job_path: str) -> int:
    """Serve one job; returns the exit status."""
    commands = _take_standard_input()
    job = ArmJob(**json.loads(Path(job_path).read_text(encoding="utf-8")))
    try:
        measurement = Measurement(job, emit=_emit)
        _emit("ready")
        for line in commands:
            command = json.loads(line)
            run = measurement.turn(warm_up=command["warm_up"])
            write_json(Path(command["result"]), asdict(run))
            _emit("measured")
    except Exception as error:
        known = user_error_or_none(error)
        if known is None:
            traceback.print_exc()
        # The parent shows the last line.
        print(sentence(known or error), file=sys.stderr)
        return 1 if known is None else 2
    return 0


def _take_standard_input() -> IO[str]:
    """The commands; processes that this one starts get an empty standard input instead."""
    commands = os.fdopen(os.dup(0), encoding="utf-8")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    return commands


class Measurement:
    """An arm that is loaded, compiled and warm, for turns of generation."""

    def __init__(self, job: ArmJob, *, emit: Callable[..., None]) -> None:
        """Load the arm and warm it up.

        Args:
            job: what to measure.
            emit: called as `emit(event, **details)` when something is worth telling.
        """
        from specmoe_compile.bench.arms import ARMS

        self._job, self._emit = job, emit
        self._arm = arm = ARMS[job.arm]
        if arm.uses_torch:
            import torch

            quiet_transformers()
            if job.threads is not None:
                torch.set_num_threads(job.threads)
        emit("loading")
        started_s = time.perf_counter()
        self._loaded = loaded = arm.load(job, arm)
        self._load_s = time.perf_counter() - started_s
        self._load_peak_bytes = peak_rss_bytes()
        emit("compiling" if arm.options is not None else "warming up")
        generator = loaded.generator
        if generator is None:
            static = arm.options is not None and job.kv_cache == "static"
            generator = HuggingFaceGenerator(
                loaded.model, loaded.inner, {"cache_implementation": "static"} if static else {}
            )
        self._generator = generator
        self._first_token_s = self._timer().warm_up(job.started_s)

    @property
    def model(self) -> Any:
        """The model that is generated with, not the wrapper that compiles it."""
        return self._loaded.inner

    def _timer(self) -> _Timer:
        return _Timer(self._job, self._generator, self._loaded.read_stats)

    def turn(self, *, warm_up: bool, prompts: Sequence[list[int]] | None = None) -> ArmRun:
        """Time the generation of the job's prompts.

        Args:
            warm_up: repeat the warm-up first, for a process that has been idle.
            prompts: those of this turn; None for all.
        """
        job, arm, loaded = self._job, self._arm, self._loaded
        timer = self._timer()
        if warm_up:
            timer.warm_up(job.started_s)
        graphs_before = _graph_count()
        decode, prefill = timer.run(job.prompts if prompts is None else prompts, self._emit)
        notes = list(loaded.notes)
        if _graph_count() != graphs_before:
            notes.append(
                f"{_graph_count() - graphs_before} graphs were compiled after the warm-up: some"
                " times include compilation"
            )
        if job.save_logits is not None:
            import torch

            rows = torch.stack([torch.as_tensor(rows) for rows in timer.logits])
            torch.save(rows, job.save_logits)
        return ArmRun(
            arm=job.arm,
            policy=arm.policy if arm.options is None else job.options.get("policy", arm.policy),
            tpot_samples_ms=timer.tpot_ms,
            ttft_samples_ms=timer.ttft_ms,
            tokens=timer.tokens,
            decode=decode,
            prefill=prefill,
            decode_read_bytes=timer.decode_read_bytes,
            fast_tier_bytes=loaded.fast_tier_bytes,
            load_s=self._load_s,
            compile_s=compile_seconds(),
            passes_ms=passes_ms(),
            first_token_s=self._first_token_s,
            peak_rss_bytes=peak_rss_bytes(),
            load_peak_rss_bytes=self._load_peak_bytes,
            children_peak_rss_bytes=resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
            * _MAXRSS_UNIT,
            peak_cuda_bytes=_peak_cuda_bytes_or_none(),
            compiled_graphs=_graph_count() if arm.options is not None else None,
            threads=_threads(job),
            notes=notes,
        )


class _Timer:
    """Generates the job's prompts and keeps their times, tokens and logits."""

    def __init__(
        self, job: ArmJob, generator: Generator, read_stats: Callable[[], Any] | None
    ) -> None:
        self._job = job
        self._generator = generator
        self._read_stats = read_stats
        longest = max(len(prompt) for prompt in job.prompts)
        self._most_tokens = longest + max(job.new_tokens, job.warmup_tokens)
        self.tpot_ms: list[float] = []
        self.ttft_ms: list[float] = []
        self.tokens: list[list[int]] = []
        self.logits: list[Any] = []
        self.decode_read_bytes: int | None = None

    def warm_up(self, process_started_s: float) -> float:
        """Generate a few tokens; returns the seconds from the process's start to the first."""
        first_s: list[float] = []

        def note(count: int) -> None:
            if count == 1:
                first_s.append(time.time() - process_started_s)

        prompt = self._job.prompts[0]
        # Asks for the longest generation of all and stops early: transformers sizes a static cache
        # by the most it was ever asked for, so that the warm-up and all prompts share one graph.
        self._generator.generate(
            prompt,
            self._most_tokens - len(prompt),
            TokenClock(on_token=note),
            stop_at=len(prompt) + self._job.warmup_tokens,
        )
        return first_s[0]

    def run(
        self, prompts: Sequence[list[int]], emit: Callable[..., None]
    ) -> tuple[Counters | None, Counters | None]:
        """Generate each prompt; returns the session's counters while decoding and prefilling."""
        job = self._job
        laps = CounterLaps(self._read_stats) if self._read_stats is not None else None
        decode: Counters | None = None
        prefill: Counters | None = None
        read_before: int | None = None
        told_s = 0.0
        for index, prompt in enumerate(prompts):

            def on_token(count: int, index: int = index) -> None:
                nonlocal prefill, told_s, read_before
                if count == 1:
                    read_before = disk_read_bytes_or_none()
                    if laps is not None:
                        prefill = add_counters(prefill, laps.lap())
                if time.perf_counter() - told_s > _EVENT_INTERVAL_S:
                    told_s = time.perf_counter()
                    emit("tokens", done=index * job.new_tokens + count)

            clock = TokenClock(on_token=on_token)
            tokens, logits = self._generator.generate(
                prompt, job.new_tokens, clock, keep_logits=job.save_logits is not None
            )
            read_after = disk_read_bytes_or_none()
            if read_before is not None and read_after is not None:
                self.decode_read_bytes = (self.decode_read_bytes or 0) + read_after - read_before
            if laps is not None:
                decode = add_counters(decode, laps.lap())
            assert clock.ttft_ms is not None, "generate streamed no token"
            self.ttft_ms.append(clock.ttft_ms)
            self.tpot_ms.extend(clock.intervals_ms[job.skip_tokens :])
            self.tokens.append(tokens)
            if logits is not None:
                self.logits.append(logits)
        return decode, prefill


def compile_seconds() -> float:
    """Seconds that Dynamo and what it calls took so far; 0 in a process that never loaded it."""
    if "torch._dynamo" not in sys.modules:
        return 0.0
    from torch._dynamo.utils import calculate_time_spent

    spent: dict[str, float] = calculate_time_spent()
    return float(spent.get("total_wall_time", spent.get("entire_frame_compile", 0.0)))


def passes_ms() -> float:
    """Milliseconds that specmoe's passes took so far; 0 in a process that never loaded them."""
    if "specmoe_compile.passes.manager" not in sys.modules:
        return 0.0
    from torch._dynamo.utils import compilation_time_metrics

    from specmoe_compile.passes.manager import TIME_METRIC

    return 1e3 * sum(compilation_time_metrics.get(TIME_METRIC, []))


def _graph_count() -> int:
    """Graphs that Dynamo compiled; none in a process that never loaded it."""
    if "torch._dynamo" not in sys.modules:
        return 0
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def _threads(job: ArmJob) -> int:
    """Threads that compute."""
    if "torch" not in sys.modules:
        return job.threads or cpu_count()
    import torch

    return torch.get_num_threads()


def _peak_cuda_bytes_or_none() -> int | None:
    if "torch" not in sys.modules:
        return None
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def disk_read_bytes_or_none() -> int | None:
    """What block devices read for this process so far; None where the kernel does not say."""
    try:
        for line in Path("/proc/self/io").read_text(encoding="ascii").splitlines():
            if line.startswith("read_bytes:"):
                return int(line.split()[1])
    except OSError:
        pass  # no such accounting here
    return None


# Linux counts kibibytes, macOS bytes.
_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


def peak_rss_bytes() -> int:
    """Most memory that this process had resident since it became what it is.

    VmHWM where there is /proc: `ru_maxrss` also remembers the parent, whose memory a child shares
    until it executes.
    """
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # no /proc: what getrusage knows must do
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_UNIT


def _emit(event: str, **details: Any) -> None:
    print(json.dumps({"event": event, **details}), flush=True)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
