"""Rows of llama.cpp: what `llama-bench` is asked, what is kept of it, and what a failure leaves."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.full_size import llama
from benchmarks.full_size.model import SHAPES
from benchmarks.full_size.random_gguf import expert_bytes_of_layers

FAKE = """#!{python}
import json, sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open({log!r}, "a") as log:
    log.write(json.dumps(given) + "\\n")
for off_gpu in map(int, given["-ncmoe"].split(",")):
    for threads in map(int, given["-t"].split(",")):
        if off_gpu == {fails!r} and given["-d"] == "64":
            print("cannot allocate", file=sys.stderr)
            sys.exit(1)
        count = int(given["-n"]) + int(given["-p"])
        times = [1000000 * (count + off_gpu + threads + run) for run in range(int(given["-r"]))]
        line = {{"n_cpu_moe": off_gpu, "n_threads": threads, "n_gen": int(given["-n"])}}
        line |= {{"n_depth": int(given["-d"]), "samples_ns": times, "avg_ns": sum(times)}}
        line |= {{"build_commit": "abc", "backends": "CUDA", "cpu_info": "a CPU"}}
        print(json.dumps(line), flush=True)
"""


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the benchmark of a tiny model beside a program that only answers as llama-bench does."""
    monkeypatch.setattr(llama, "write_gguf", lambda path, config, form: 1000)
    monkeypatch.setattr(llama, "PROMPT", 32)
    out, log = tmp_path / "llama.jsonl", tmp_path / "log"

    def run(*more: str, fails: int | None = None) -> tuple[int, list[Any], list[Any]]:
        program = tmp_path / "llama-bench"
        program.write_text(FAKE.format(python=sys.executable, log=str(log), fails=fails))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        log.write_text("")
        given = ["--bench", str(program), "--out", str(out), "--folder", str(tmp_path)]
        status = llama.main([*given, "--model", "tiny-qwen3", "--contexts", "32", "64", *more])
        rows = out.read_text().splitlines() if out.exists() else []
        return status, [json.loads(r) for r in rows], list(map(json.loads, log.open()))

    return run


def test_every_share_of_layers_has_a_row_in_the_words_of_peers(call: Any) -> None:
    status, rows, calls = call("--threads", "8", "4", "--shares", "0", "100", "50")
    assert status == 0
    assert [(row["arm"], row["context"]) for row in rows] == [
        (arm, context) for context in (32, 64) for arm in ("resident", "cpu_moe_50", "cpu_moe_0")
    ]
    # Of 3 layers: all, 1 and none on the GPU; the larger shares first.
    assert [c["-ncmoe"] for c in calls] == ["3", "0,2,3", "0,2,3", "0,2,3"]
    assert [(c["-d"], c["-t"], c["-p"]) for c in calls] == [
        ("32", "8,4", "0"),
        ("32", "4", "0"),
        ("0", "4", "32"),
        ("64", "4", "0"),
    ]
    assert all(c["-fa"] == "on" and c["-ngl"] == "99" for c in calls)
    layer = expert_bytes_of_layers(SHAPES["tiny-qwen3"].configured(), "q4_0")[0]
    assert [row["cache_bytes"] for row in rows[:3]] == [3 * layer, layer, 0]
    first = rows[0]
    assert first["tpot_ms"] == {"p20": None, "p50": (48 + 4 + 1) / 48, "p80": None}
    assert len(first["runs_ms"]) == llama.RUNS and first["threads"] == 4
    assert first["ttft_ms"] == 32 + 4 + 0.5 and rows[3]["ttft_ms"] is None
    assert (first["system"], first["routing"]) == ("llama.cpp", "own")


def test_what_is_there_is_not_measured_again(call: Any) -> None:
    call("--shares", "100")
    status, rows, calls = call("--shares", "100")
    assert status == 0 and calls == [] and len(rows) == 2


def test_a_failure_keeps_what_came_before_and_says_why(call: Any) -> None:
    status, rows, _ = call("--shares", "100", "50", "0", "--threads", "4", fails=2)
    assert status == 0
    found = {(row["arm"], row["context"]): row for row in rows}
    assert "tpot_ms" in found["resident", 64]
    for arm in ("cpu_moe_50", "cpu_moe_0"):
        assert (
            "cannot allocate" in found[arm, 64]["not_run"]
            and "status 1" in found[arm, 64]["not_run"]
        )
    # A second call tries them again.
    _, rows, calls = call("--shares", "100", "50", "0", "--threads", "4")
    assert [c["-ncmoe"] for c in calls] == ["2,3"] and all("tpot_ms" in row for row in rows)


def test_a_program_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    code = "import time; print('{\"a\": 1}', flush=True); time.sleep(600)"
    lines = llama.run_bench([sys.executable, "-c", code], 0.2, lambda: None)
    with pytest.raises(ValueError, match="more than 0 s"):
        list(lines)


def test_memory_is_the_highest_since_the_last_line() -> None:
    used = iter([100, *[400] * 10_000])
    code = "import time; print('{}', flush=True); time.sleep(600)"
    lines = llama.run_bench([sys.executable, "-c", code], 60, lambda: next(used))
    line = next(lines)
    lines.close()
    assert line["gpu_bytes"] == 300 and line["host_bytes"] > 1 << 20


def test_a_missing_program_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--bench", str(tmp_path / "no"), "--out", str(tmp_path / "o"), "--folder", "/tmp"]
    assert llama.main(given) == 2
    assert "is no file" in capsys.readouterr().err
