"""Gives the cells of `benchmarks.cpu_disk.run` their turns, one at a time.

A cell that may waits in a process of its own that stays alive; the others have a process for each
turn. The workers that wait are blocked, and what they compute nevertheless is measured.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from benchmarks.cpu_disk.idle_watch import IdleWatch
from benchmarks.cpu_disk.plan import SLOW_TOKENS, Cell
from benchmarks.cpu_disk.setup import Bench, Started, groups
from specmoe_compile.bench.child import ArmFailedError, ArmInputError
from specmoe_compile.bench.records import ArmRun, arm_record, spread, tokens_sha256
from specmoe_compile.system.machine import available_ram_bytes

RESERVE_BYTES = 1 << 30
"""Left free besides three times the experts: for a peer that has a process for each turn."""
IDLE_LIMIT_S = 10.0


@dataclass(slots=True)
class Timed:
    """Runs of one cell, with the disk's bandwidth before and after each.

    Attributes:
        kept_alive: whether its runs are turns of one process.
    """

    runs: list[ArmRun] = field(default_factory=list)
    link_gbps: list[float] = field(default_factory=list)
    cap_bytes: int | None = None
    peaks_bytes: list[int | None] = field(default_factory=list)
    error: str | None = None
    kept_alive: bool = False


class Turns:
    """The workers of a phase, until `close`.

    Attributes:
        idle_cores: most that the waiting workers together computed while another was measured, in
            cores, mean over a turn.
    """

    def __init__(self, bench: Bench, found: Mapping[Cell, Timed]) -> None:
        self._bench = bench
        self._found = found
        self._stack = contextlib.ExitStack()
        self._alive: dict[Cell, Started] = {}
        self.idle_cores = 0.0

    def close(self) -> None:
        """End all workers, gently or not."""
        self._stack.close()

    def start(self, cells: Iterable[Cell]) -> None:
        """Start the workers that stay alive, two at a time, as many as fit the free memory."""
        expert_bytes = self._bench.about["expert_bytes"]
        wanted = [cell for cell in dict.fromkeys(cells) if cell.kept_alive]
        for group in groups(wanted):
            room = available_ram_bytes() - RESERVE_BYTES - 3 * expert_bytes
            fitting: list[Cell] = []
            for cell in group:
                if cell.ram_bytes(expert_bytes) <= room:
                    fitting.append(cell)
                    room -= cell.ram_bytes(expert_bytes)
                else:
                    print(f"{cell.name}: a process for each turn, for want of memory", flush=True)
            self._start_together(fitting)

    def _start_together(self, cells: Iterable[Cell]) -> None:
        for cell in cells:
            with self._fails(cell):
                self._alive[cell] = self._bench.start(cell, self._stack)
                self._found[cell].kept_alive = True
        for cell in cells:
            if cell in self._alive:
                with self._fails(cell):
                    self._alive[cell].worker.wait_ready()
        print(
            f"{time.monotonic() - self._bench.started_s:5.0f} s  ready:"
            f" {', '.join(cell.name for cell in cells)}",
            flush=True,
        )

    @contextlib.contextmanager
    def _fails(self, cell: Cell) -> Any:
        """Note what went wrong with a cell, and go on."""
        try:
            yield
        except (ArmFailedError, ArmInputError) as error:
            self._found[cell].error = str(error)
            self._alive.pop(cell, None)
            print(f"{cell.name}: {error}", flush=True)

    def run(self, cell: Cell) -> float | None:
        """Give a cell its turn; returns its median in ms, None if it failed, now or earlier."""
        timed = self._found[cell]
        if timed.error is not None:
            return None
        with self._fails(cell), contextlib.ExitStack() as stack:
            started = self._alive.get(cell)
            if started is None:
                started = self._bench.start(cell, stack)
                started.worker.wait_ready()
            self._turn(timed, started, waited=cell in self._alive)
            if cell not in self._alive:
                started.worker.finish()
        if timed.error is not None:
            return None
        median_ms = median(timed.runs[-1].tpot_samples_ms)
        print(
            f"{time.monotonic() - self._bench.started_s:5.0f} s  {cell.name}: {median_ms:.2f} ms"
            f" ({timed.link_gbps[-1]:.2f} GB/s)",
            flush=True,
        )
        return round(median_ms, 4)

    def _turn(self, timed: Timed, started: Started, *, waited: bool) -> None:
        others = [s.worker.pid for s in self._alive.values() if s is not started]
        watch = IdleWatch(others)
        if not watch.wait_idle(limit_s=IDLE_LIMIT_S):
            print(f"workers that should wait compute: {watch.share():.2f} cores", flush=True)
        before = self._bench.link_gbps()
        run = started.worker.turn(warm_up=waited)
        self.idle_cores = max(self.idle_cores, watch.share())
        timed.runs.append(run)
        timed.link_gbps.append(round((before + self._bench.link_gbps()) / 2, 4))
        cap = started.cap
        timed.cap_bytes = None if cap is None else cap.limit_bytes
        timed.peaks_bytes.append(None if cap is None else cap.peak_bytes_or_none())

    def finish(self) -> None:
        """End the workers that are alive; one that ends badly has failed."""
        for cell, started in list(self._alive.items()):
            with self._fails(cell):
                started.worker.finish()
        self._alive.clear()


def cell_record(cell: Cell, timed: Timed, new_tokens: int) -> dict[str, Any]:
    """One cell's record, without single samples; `new_tokens` is what others generate."""
    record = arm_record(
        cell.name,
        timed.runs,
        memory_cap_bytes=timed.cap_bytes,
        cgroup_peaks_bytes=timed.peaks_bytes,
    )
    del record["tokens"], record["runs"]
    first = timed.runs[0]
    record |= {
        "arm": cell.arm,
        "size": cell.size,
        "label": cell.label,
        "prompts": len(first.tokens),
        "new_tokens": len(first.tokens[0]),
        "short": len(first.tokens[0]) < new_tokens,
        "kept_alive": timed.kept_alive,
        "first_tpot_ms": spread([ms for run in timed.runs for ms in _first_samples(run)]),
        "first_tokens_sha256": tokens_sha256([row[:SLOW_TOKENS] for row in first.tokens]),
        "per_run": [
            {
                "median_ms": round(median(run.tpot_samples_ms), 4),
                "mean_ms": round(sum(run.tpot_samples_ms) / len(run.tpot_samples_ms), 4),
                "link_gbps": link,
                "total": None if run.decode is None else run.decode["total"],
                "disk_read_bytes": run.decode_read_bytes,
            }
            for run, link in zip(timed.runs, timed.link_gbps, strict=True)
        ],
        "layers": None if first.decode is None else first.decode["layers"],
    }
    return record


def _first_samples(run: ArmRun) -> list[float]:
    """Times of the first `SLOW_TOKENS` of each prompt, for comparison with cells that stop there.

    The job skips none, so that each prompt has one time less than tokens.
    """
    samples: list[float] = []
    start = 0
    for row in run.tokens:
        samples += run.tpot_samples_ms[start : start + SLOW_TOKENS - 1]
        start += len(row) - 1
    return samples
