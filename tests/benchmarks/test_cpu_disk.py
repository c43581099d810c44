"""`benchmarks.cpu_disk.run`: what it runs, in which order, and how its workers live."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.cpu_disk import run as cpu_disk
from benchmarks.cpu_disk import turns as cpu_disk_turns
from benchmarks.cpu_disk.figures import read_results
from benchmarks.cpu_disk.plan import (
    BASE_CAP_BYTES,
    KEPT_ALIVE,
    WORKER_BYTES,
    Cell,
    chosen_cells,
    order_of,
    phase_cells,
    sentinel,
    sizes_of,
    smallest_size,
)
from benchmarks.cpu_disk.setup import Started
from benchmarks.cpu_disk.turns import Timed, Turns
from specmoe_compile.bench.arms import ARMS
from specmoe_compile.bench.child import ChildPython
from specmoe_compile.bench.live_worker import LiveWorker
from tests.benchmarks.cpu_disk_cells import MODEL
from tests.helpers import PATIENCE_S


def test_sizes_below_one_tokens_experts_are_refused_and_the_smallest_legal_one_runs() -> None:
    assert smallest_size(MODEL) == "12.5%"
    assert sizes_of(MODEL) == (["5%", "10%"], ["12.5%", "25%", "50%", "100%"])
    # with more experts the small sizes are legal
    many = {**MODEL, "experts": [128], "top_k": 4}
    assert sizes_of(many) == ([], ["3.125%", "5%", "10%", "25%", "50%", "100%"])
    # a share that is in the list already is not there twice
    assert sizes_of({**MODEL, "experts": [40]}) == (["5%"], ["10%", "25%", "50%", "100%"])


def test_every_size_has_specmoe_and_the_peers_under_the_same_cap() -> None:
    cells = [cell for phase in ("tight", "roomy") for cell in phase_cells(phase, MODEL)]
    for size in ("12.5%", "25%", "50%", "100%"):
        arms = {cell.arm for cell in cells if cell.size == size}
        assert arms >= {"specmoe", "mmap", "llama_cpp"}
    for size in ("5%", "10%"):
        assert {cell.arm for cell in cells if cell.size == size} == {"mmap", "llama_cpp"}
    caps = {cell.size: cell.cap_bytes(64 << 20) for cell in cells if cell.capped}
    assert caps["50%"] == BASE_CAP_BYTES + (32 << 20)
    half = next(cell for cell in cells if cell.capped and cell.size == "50%")
    assert replace(half, program_bytes=1 << 20).cap_bytes(64 << 20) == 33 << 20
    for cell in cells:
        # an arm that cannot keep a cap is never asked to
        assert not cell.capped or ARMS[cell.arm].capped, cell.name
    for phase in ("tight", "roomy", "uncapped"):
        assert any(cell.arm == "resident" for cell in phase_cells(phase, MODEL))
        names = [cell.name for cell in phase_cells(phase, MODEL)]
        assert len(set(names)) == len(names)


def test_the_engine_is_judged_against_the_peers_and_the_limit() -> None:
    cells = phase_cells("engine", MODEL)
    assert [cell.arm for cell in cells[:3]] == ["resident", "eager", "llama_cpp"]
    assert all(cell.capped for cell in cells[3:])
    for size in ("12.5%", "25%", "50%"):
        arms = {cell.arm for cell in cells if cell.size == size}
        assert arms - {"accelerate"} == {"cache", "specmoe", "llama_cpp"}
    large = phase_cells("large", MODEL)
    assert {(cell.arm, cell.size) for cell in large} < {(cell.arm, cell.size) for cell in cells}
    assert sentinel("engine", cells) == cells[0] and sentinel("large", large) == large[0]


def test_one_size_brings_what_computing_alone_takes() -> None:
    cells = phase_cells("engine", MODEL)
    names = [cell.arm for cell in chosen_cells(cells, ["50%"])]
    assert names == ["resident", "cache", "specmoe", "llama_cpp"]
    bare = chosen_cells(cells, ["none", "100%"])
    assert [cell.arm for cell in bare] == ["resident", "eager", "llama_cpp", "specmoe"]
    assert chosen_cells(cells, None) == cells
    with pytest.raises(ValueError, match=r"no cell has '75%', give some of .*'25%'"):
        chosen_cells(cells, ["75%"])


def test_slow_cells_generate_fewer_tokens_and_no_page_cache_arm_is_kept_alive() -> None:
    cells = [cell for phase in ("tight", "roomy", "uncapped") for cell in phase_cells(phase, MODEL)]
    slow = {(cell.arm, cell.size) for cell in cells if cell.slow}
    mapped = {(arm, s) for arm in ("mmap", "llama_cpp") for s in ("5%", "10%", "12.5%", "25%")}
    offloaded = {("accelerate", None), ("accelerate", "25%")}
    offloaded |= {("accelerate_auto", "25%"), ("accelerate_auto", "50%")}
    assert slow == mapped | offloaded
    for cell in cells:
        assert cell.kept_alive == (ARMS[cell.arm].policy is not None or cell.arm in KEPT_ALIVE)
        assert not (cell.kept_alive and cell.slow)
    assert not {"mmap", "llama_cpp", "accelerate", "accelerate_auto"} & set(KEPT_ALIVE)
    assert Cell(arm="cache", size="25%").ram_bytes(64 << 20) == WORKER_BYTES + (16 << 20)
    assert Cell(arm="eager").ram_bytes(64 << 20) == WORKER_BYTES + (128 << 20)


class FakeBench:
    """Starts real, tiny processes that speak a worker's lines; no model in them."""

    def __init__(self, code: str) -> None:
        self.about, self.started_s = {"expert_bytes": 1 << 20}, 0.0
        self.code, self.started = code, 0

    def start(self, cell: Cell, stack: ExitStack, **_: Any) -> Started:
        self.started += 1
        child = stack.enter_context(closing(ChildPython(["-c", self.code], timeout_s=PATIENCE_S)))
        worker = LiveWorker.__new__(LiveWorker)
        worker._child, worker._result_path = child, Path("/nonexistent")
        return Started(worker=worker, cap=None)

    def link_gbps(self) -> float:
        return 1.0


READY = 'print(\'{"event": "ready"}\', flush=True)\n'


def test_a_worker_that_dies_between_turns_fails_its_cell_alone() -> None:
    good, bad = Cell(arm="cache", size="25%"), Cell(arm="specmoe", size="25%")
    found = {good: Timed(), bad: Timed()}
    bench: Any = FakeBench(READY + "import sys; sys.stdin.read()")
    with closing(Turns(bench, found)) as turns:
        turns.start([good, bad, good])
        assert bench.started == 2
        pid = turns._alive[bad].worker.pid
        os.kill(pid, signal.SIGKILL)
        assert turns.run(bad) is None
        assert turns.run(bad) is None
        assert found[bad].error == "The process was ended by SIGKILL."
        turns.finish()
    assert found[good].error is None
    assert found[good].kept_alive
    assert not psutil.pid_exists(pid)


def test_a_machine_without_memory_keeps_no_worker_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell(arm="cache", size="25%")
    found = {cell: Timed()}
    bench: Any = FakeBench(READY + "raise SystemExit('No.')")
    monkeypatch.setattr(cpu_disk_turns, "available_ram_bytes", lambda: 1 << 30)
    with closing(Turns(bench, found)) as turns:
        turns.start([cell])
        assert bench.started == 0
        assert turns.run(cell) is None
    assert (bench.started, found[cell].kept_alive, found[cell].error) == (1, False, "No.")


def test_passes_go_there_and_back() -> None:
    cells = phase_cells("tight", MODEL)
    there, back, again = order_of(cells, 3)
    assert there == again == list(range(len(cells)))
    assert back == there[::-1]


@pytest.mark.slow
def test_a_dry_run_goes_through_every_phase(tmp_path: Path) -> None:
    results, report = tmp_path / "results", tmp_path / "docs" / "cpu-disk.md"
    arguments = ["--dry", "--folder", str(tmp_path / "models"), "--results", str(results)]
    arguments += ["--report", str(report), "--new-tokens", "6", "--prompts", "1", "--passes", "2"]
    assert cpu_disk.main(arguments) == 0
    found = read_results(results)
    assert set(found) == {"tight", "roomy", "uncapped", "loss"}
    assert all(not found[name]["failed"] for name in ("tight", "roomy", "uncapped"))
    assert set(found["tight"]["refused"]) == {"5%", "10%"}
    assert all("expert_cache=" in reason for reason in found["tight"]["refused"].values())
    hashes = {c["tokens_sha256"] for n in ("tight", "roomy", "uncapped") for c in found[n]["cells"]}
    assert len(hashes) == 1
    for name in ("tight", "roomy", "uncapped"):
        assert len(found[name]["sentinel"]["medians_ms"]) == 3
        assert all(cell["repeats"] in (2, 3) for cell in found[name]["cells"])
        assert all(c["kept_alive"] == (c["arm"] in KEPT_ALIVE) for c in found[name]["cells"])
        # two cores at most, and next to nothing of them
        assert found[name]["idle_cores"] < 0.1
    text = report.read_text()
    assert "A dry run" in text
    assert "cpu-disk-loss.png" in text
