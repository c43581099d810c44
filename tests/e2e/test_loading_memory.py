"""Peak memory while packing, loading and decoding, measured in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import PATIENCE_S

REPOSITORY = Path(__file__).parents[2]


def run_jobs(*jobs: list[object]) -> list[dict[str, int]]:
    """What jobs of `tests.e2e.memory_peaks` found, each in a process of its own."""
    process = subprocess.run(
        [sys.executable, "-m", "tests.e2e.memory_peaks", json.dumps(jobs)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    assert process.returncode == 0, process.stderr
    return [json.loads(line) for line in process.stdout.splitlines()]


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """Experts of 3 MiB, 201 MB in all: what each way of loading took."""
    folder = tmp_path_factory.mktemp("memory")
    model, store, none = (str(folder / name) for name in ("model", "store", "none"))
    ways = {
        "packs": ["measure", model, store, "disk"],
        "finds the store": ["measure", model, store, "disk"],
        "ram": ["measure", model, none, "ram"],
        "offload": ["measure", model, none, "offload"],
    }
    _, *found = run_jobs(["write", model, 2], *ways.values())
    return dict(zip(ways, found, strict=True))


@pytest.mark.parametrize("way", ["packs", "finds the store"])
def test_a_store_on_disk_never_holds_all_experts_in_ram(
    way: str, used: dict[str, dict[str, int]]
) -> None:
    found = used[way]
    # Packing needs one expert and buffers; torch's own allocations are the rest.
    loaded = found["loaded"] - found["imported"]
    assert loaded < found["rest"] + (60 << 20) < found["experts"] / 2
    cache = found["experts"] // 4
    assert found["decoded"] - found["imported"] < found["rest"] + cache + (110 << 20)


def test_a_store_in_ram_holds_them_once(used: dict[str, dict[str, int]]) -> None:
    found = used["ram"]
    loaded = found["loaded"] - found["imported"]
    assert found["experts"] < loaded < found["rest"] + found["experts"] + (60 << 20)


def test_offloading_to_ram_needs_one_layer_more(used: dict[str, dict[str, int]]) -> None:
    found = used["offload"]
    loaded = found["loaded"] - found["imported"]
    assert loaded < found["layer"] + (30 << 20) < found["experts"]


@pytest.mark.slow
def test_the_promised_limit_with_805_mb_of_experts(tmp_path: Path) -> None:
    model, store = str(tmp_path / "model"), str(tmp_path / "store")
    way: list[object] = ["measure", model, store, "disk"]
    for found in run_jobs(["write", model, 8], way, way)[1:]:
        assert found["experts"] == 8 * 32 * (3 << 20)
        assert found["decoded"] < found["rest"] + found["experts"] // 4 + 700 * 10**6
