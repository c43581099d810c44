"""Every kernel compiles for every target without a GPU, fits, and spills nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kernels.resources import (
    ALL_SHAPES,
    TARGETS,
    TRITON_RUNS,
    Resources,
    find_problems,
    resources_table,
    versions_section,
)


def make_row(**changes: object) -> Resources:
    values: dict[str, object] = {
        "model": "m",
        "label": "l",
        "target": 86,
        "registers": 40,
        "shared_bytes": 2048,
        "spilled_bytes": 0,
        "num_warps": 4,
        "num_stages": 3,
    }
    return Resources(**{**values, **changes})  # type: ignore[arg-type]


def test_spills_and_too_much_shared_memory_are_problems() -> None:
    assert find_problems([make_row()], []) == []
    assert find_problems([make_row(spilled_bytes=8)], []) == ["m, l, sm_86: 8 bytes spilled"]
    too_much = make_row(shared_bytes=120_000)
    assert find_problems([too_much], []) == ["m, l, sm_86: 120000 bytes of shared memory"]
    assert find_problems([make_row(shared_bytes=120_000, target=80)], []) == []


def test_table_has_one_column_per_target() -> None:
    rows = [make_row(), make_row(target=90, registers=50)]
    assert resources_table(rows, [86, 90])[-1] == "| m | l | 4, 3 | 40 / 2.0 / 0 | 50 / 2.0 / 0 |"


def test_report_holds_the_recorded_versions_of_triton() -> None:
    section = versions_section(TRITON_RUNS)
    recorded = json.loads(TRITON_RUNS.read_text())["runs"]
    assert [line.split(" | ")[0] for line in section.splitlines()[-len(recorded) :]] == [
        f"| {run['triton']}" for run in recorded
    ]
    report = Path(__file__).parents[2] / "docs" / "results" / "log" / "kernels.md"
    assert report.read_text().endswith(section)


@pytest.mark.slow
def test_kernels_compile_for_every_target_without_spills(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    report, numbers = tmp_path / "kernels.md", tmp_path / "kernels.json"
    command = [sys.executable, "-m", "benchmarks", "kernel_resources"]
    command += ["--write", str(report), "--json", str(numbers)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    rows = json.loads(numbers.read_text())
    assert {row["target"] for row in rows} == set(TARGETS)
    assert {row["model"] for row in rows} == {shape.name for shape in ALL_SHAPES}
    assert all(0 < row["registers"] <= 255 for row in rows)
    text = report.read_text()
    assert all(shape.name in text for shape in ALL_SHAPES)
