"""`benchmarks.cpu_disk.run`: what it runs, what it derives, and what its document says."""

from __future__ import annotations

import copy
import json
import os
import signal
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.__main__ import main
from benchmarks.cpu_disk import run as cpu_disk
from benchmarks.cpu_disk import turns as cpu_disk_turns
from benchmarks.cpu_disk.figures import SCHEMA, drift, figures, read_results
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
from benchmarks.cpu_disk.report import write_report
from benchmarks.cpu_disk.setup import Started
from benchmarks.cpu_disk.turns import Timed, Turns
from specmoe_compile.bench.arms import ARMS
from specmoe_compile.bench.child import ChildPython
from specmoe_compile.bench.live_worker import LiveWorker
from tests.helpers import PATIENCE_S

MODEL = {
    "name": "m",
    "dtype": "float32",
    "moe_layers": 2,
    "experts": [32, 32],
    "top_k": 4,
    "bytes_per_expert": 1 << 20,
    "expert_bytes": 64 << 20,
}
TOKENS = 10


def cell_of(
    arm: str,
    mean_ms: float,
    *,
    size: str | None = None,
    cap: bool = False,
    missed: int | None = None,
    stall_ms: float = 0.0,
    wasted: int = 0,
    useful: int = 0,
    label: str = "",
    link_gbps: float = 1.0,
    short: bool = False,
) -> dict[str, Any]:
    """A cell of two equal runs of ten tokens, `missed` bytes read on demand for each."""
    total = None
    if ARMS[arm].policy is not None:
        total = {
            "demand_bytes": TOKENS * (missed or 0),
            "speculative_bytes": TOKENS * (useful + wasted),
            "useful_speculative_bytes": TOKENS * useful,
            "stall_ms": TOKENS * stall_ms,
        }
    run = {
        "median_ms": mean_ms,
        "mean_ms": mean_ms,
        "link_gbps": link_gbps,
        "total": total,
        "disk_read_bytes": None if missed is None else TOKENS * missed,
    }
    cell = Cell(arm=arm, size=size, capped=cap, label=label)
    layers = [{"recalled": 0, "needed": 0}, {"recalled": 3, "needed": 4}]
    return {
        "name": cell.name,
        "arm": arm,
        "size": size,
        "label": label,
        "tpot_ms": {"p20": mean_ms - 0.5, "p50": mean_ms, "p80": mean_ms + 0.5},
        "first_tpot_ms": {"p20": 2 * mean_ms, "p50": 2 * mean_ms, "p80": 2 * mean_ms},
        "short": short,
        "new_tokens": 16 if short else 48,
        "kept_alive": cell.kept_alive,
        "ttft_ms": 50.0,
        "hit_rate": None if total is None else 0.5,
        "memory_cap_bytes": cell.cap_bytes(MODEL["expert_bytes"]),  # type: ignore[arg-type]
        "peak_rss_bytes": 1 << 29,
        "samples": 2 * TOKENS,
        "repeats": 2,
        "per_run": [run, copy.deepcopy(run)],
        "layers": None if total is None else layers,
        "tokens_sha256": "a",
        "first_tokens_sha256": "b",
    }


def phase_of(*cells: dict[str, Any], **changes: Any) -> dict[str, Any]:
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "commit": "c" * 40,
        "machine": {"cpu": "a CPU", "cores": 2, "ram_bytes": 1 << 30, "system": "S", "gpu": None},
        "versions": {"torch": "2.13"},
        "model": MODEL,
        "load_average": [0.5, 0.5, 0.5],
        "wall_s": 60.0,
        "cells": list(cells),
        "failed": {},
        "refused": {},
        "sentinel": {"cell": "cache 25%", "medians_ms": [10.0, 11.0, 10.0]},
        "idle_cores": 0.01,
        "settings": {
            "prompts": 2,
            "prompt_tokens": 64,
            "new_tokens": 48,
            "slow_tokens": 16,
            "passes": 2,
            "base_cap_bytes": BASE_CAP_BYTES,
            "dry": False,
        },
    }
    return {**result, **changes}


def write(folder: Path, **phases: dict[str, Any]) -> Path:
    for name, value in phases.items():
        (folder / f"cpu_disk_{name}.json").write_text(json.dumps(value))
    return folder


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


def test_a_peer_that_stopped_early_is_compared_over_the_same_tokens(tmp_path: Path) -> None:
    tight = phase_of(
        cell_of("specmoe", 10.0, size="12.5%", cap=True),
        # faster than all of specmoe's tokens, slower than its first ones
        {
            **cell_of("llama_cpp", 9.0, size="12.5%", cap=True, short=True),
            "first_tpot_ms": {"p20": 30.0, "p50": 30.0, "p80": 30.0},
        },
        cell_of("resident", 5.0),
    )
    write_report(write(tmp_path, tight=tight), tmp_path / "d.md")
    text = (tmp_path / "d.md").read_text()
    assert "| llama_cpp | 9.0 (8.5..9.5)* |" in text
    assert (
        "the first 16 tokens of each prompt only. Over the same tokens: specmoe 12.5% 20.0" in text
    )
    assert "Nowhere in this run" in text
    assert "process that stays alive for all turns of a cell, each turn after a warm-up:" in text
    assert "`specmoe`, `resident`" in text
    assert "at most 0.01 cores" in text
    assert "A process for each run: `llama_cpp`." in text


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


def test_the_limit_is_the_larger_of_reading_and_computing() -> None:
    # 4 MB at 0.5 GB/s take 8 ms; computing takes 5
    reads = cell_of("cache", 12.0, size="25%", missed=4_000_000, stall_ms=6.0, link_gbps=0.5)
    computes = cell_of("specmoe", 5.5, size="50%", missed=1_000_000)
    phase = phase_of(reads, computes, cell_of("resident", 5.0))
    own = figures(reads, phase)
    assert own.limit_ms == pytest.approx(8.0)
    assert own.distance == pytest.approx(1.5)
    assert (own.compute_ms, own.stall_ms, own.overhead_ms) == pytest.approx((5.0, 6.0, 1.0))
    own = figures(computes, phase)
    assert own.limit_ms == pytest.approx(5.0)
    assert own.distance == pytest.approx(1.1)


def test_wrong_guesses_do_not_count_in_the_limits_favour_and_right_ones_do() -> None:
    cell = cell_of("specmoe", 20.0, missed=4_000_000, useful=3_000_000, wasted=9_000_000)
    own = figures(cell, phase_of(cell, cell_of("resident", 5.0)))
    assert own.missed_bytes == 7_000_000
    assert own.read_bytes == 16_000_000
    assert own.limit_ms == pytest.approx(7.0)


def test_a_peer_is_held_against_what_the_kernel_read_for_it() -> None:
    peer = cell_of("mmap", 20.0, missed=10_000_000)
    own = figures(peer, phase_of(peer, cell_of("resident", 5.0)))
    assert (own.missed_bytes, own.stall_ms, own.overhead_ms) == (10_000_000, None, None)
    assert own.distance == pytest.approx(2.0)


def test_results_of_an_older_schema_are_refused(tmp_path: Path) -> None:
    write(tmp_path, tight=phase_of(cell_of("resident", 5.0), schema=1))
    with pytest.raises(ValueError, match=r"schema 1, expected 2: run .* --only tight"):
        read_results(tmp_path)


def test_limits_need_the_resident_cell() -> None:
    cell = cell_of("cache", 20.0)
    with pytest.raises(ValueError, match="no cell 'resident'"):
        figures(cell, phase_of(cell))


def test_drift_is_slowest_over_fastest() -> None:
    assert drift(phase_of()) == pytest.approx(1.1)
    assert drift(phase_of(sentinel={"cell": "c", "medians_ms": [10.0, None]})) is None


@pytest.fixture()
def results(tmp_path: Path) -> Path:
    tight = phase_of(
        cell_of("mmap", 30.0, size="5%", cap=True, missed=20_000_000),
        cell_of("specmoe", 20.0, size="12.5%", cap=True, missed=15_000_000, stall_ms=10.0),
        cell_of("llama_cpp", 15.0, size="12.5%", cap=True, missed=15_000_000),
        cell_of("resident", 5.0),
        refused={"5%": "expert_cache='5%' is too small."},
    )
    uncapped = phase_of(
        cell_of("eager", 13.0),
        cell_of("mmap", 13.0),
        cell_of("specmoe", 12.0, size="25%", missed=1_000_000, label="always"),
        cell_of("resident", 5.0),
        failed={"llama_cpp": "The arm llama_cpp needs the packages gguf and llama-cpp-python."},
    )
    return write(tmp_path, tight=tight, uncapped=uncapped)


def test_the_document_says_what_was_refused_what_failed_and_who_wins(results: Path) -> None:
    report = results / "docs" / "cpu-disk.md"
    write_report(results, report)
    text = report.read_text()
    assert "| ms/token | 5% | 12.5% |" in text
    assert "| specmoe | refused | 20.0 (19.5..20.5) |" in text
    assert "A cache of 5%: expert_cache='5%' is too small." in text
    assert "- llama_cpp did not run: The arm llama_cpp needs the packages" in text
    winners = text.partition("## Where a peer wins")[2].partition("##")[0]
    assert "| llama_cpp 12.5%, capped | 15.0 ms | specmoe 12.5%, capped: 20.0 ms |" in winners
    # without a cap the peers meet what specmoe does there, the resident arm included
    assert "mmap" not in winners
    assert "| specmoe 12.5%, capped | 20.0 | 14.3 MiB | 1.00 | 15.0 | **1.33**" in text
    assert "| recall | - | 75.0 % |" in text
    assert "| tight | cache 25% | 10.0, 11.0, 10.0 | 1.10 |" in text
    for name in ("tpot", "split", "limit", "recall"):
        assert f"](cpu-disk-{name}.png)" in text
        assert report.with_name(f"cpu-disk-{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "cpu-disk-loss.png" not in text


def test_the_goal_is_judged_for_specmoe_only(tmp_path: Path) -> None:
    roomy = phase_of(
        cell_of("specmoe", 5.4, size="100%", cap=True),
        cell_of("cache", 5.4, size="50%", cap=True),
        cell_of("resident", 5.0),
    )
    write_report(write(tmp_path, roomy=roomy), tmp_path / "d.md")
    lines = (tmp_path / "d.md").read_text().partition("## Distance")[2].splitlines()
    goals = {
        line.split("|")[1].strip(): line.split("|")[-2].strip() for line in lines if "|" in line
    }
    assert goals["specmoe 100%, capped"] == "yes"
    assert goals["cache 50%, capped"] == goals["resident"] == "-"


def test_a_report_without_results_ends_with_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(FileNotFoundError):
        read_results(tmp_path)
    arguments = ["--only", "report", "--results", str(tmp_path), "--report", str(tmp_path / "r.md")]
    assert main(["cpu_disk", *arguments]) == 2
    assert "run the phases first" in capsys.readouterr().err
    assert not (tmp_path / "r.md").exists()


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
