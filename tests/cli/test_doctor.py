"""`specmoe doctor` measures, and says what to install."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from specmoe_compile.bench import probes
from specmoe_compile.cli.doctor import _print, advice
from specmoe_compile.cli.main import run


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a short examination found."""
    folder = tmp_path_factory.mktemp("doctor")
    out = folder / "out.json"
    arguments = ["--store-dir", str(folder), "--file-mib", "64", "--seconds", "0.1"]
    assert run(["doctor", *arguments, "--record-mib", "1", "--json", str(out)]) == 0
    assert list(folder.iterdir()) == [out], "the temporary file must be gone"
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_rates_are_measured_for_each_number_of_readers(result: dict[str, Any]) -> None:
    disk = result["disk"]
    assert disk["record_bytes"] == 1 << 20
    assert disk["gbps"].keys() == {"1", "4", "8"}
    assert all(rate > 0 for rate in disk["gbps"].values())
    assert all(rate > 0 for rate in result["memory"].values())
    assert result["versions"]["torch"] is not None
    assert result["free_disk_bytes"] > 0


def test_a_store_is_read_itself_and_a_small_or_missing_one_is_not(
    result: dict[str, Any], tmp_path: Path
) -> None:
    assert result["disk"]["source"] == "temporary file"
    records = tmp_path / "experts.bin"
    records.write_bytes(bytes(16 << 16))
    read = {"record_bytes": 1 << 16, "file_bytes": 1 << 20, "seconds": 0.05}
    rates = probes.disk_rates(tmp_path, threads=(1, 4), **read)
    assert rates.source == "store" and rates.file_bytes == 16 << 16 and min(rates.gbps.values()) > 0
    assert list(tmp_path.iterdir()) == [records], "nothing is written beside a store"
    assert records.read_bytes() == bytes(16 << 16)
    rates = probes.disk_rates(tmp_path, threads=(32,), **read)
    assert rates.source == "temporary file", "fewer records than readers say nothing"


def test_both_transfers_to_a_gpu_are_shown(
    result: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    without = {**result, "machine": {**result["machine"], "gpu": None}, "transfer_gbps": None}
    _print(without)
    shown = capsys.readouterr().out
    assert shown.count("not measured: no CUDA device") == 2
    gpu = {"name": "a GPU", "memory_bytes": 1 << 30}
    machine = {**result["machine"], "gpu": gpu}
    _print({**without, "machine": machine, "transfer_gbps": {"copy": 51.25, "gather": 44.0}})
    shown = capsys.readouterr().out
    assert "51.2 GB/s, by the copy engine" in shown
    assert "44.0 GB/s, read by the GPU itself" in shown


def test_reads_count_only_what_was_read_in_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With reads of known duration the rate is known: threads x size / duration."""
    size, duration_s = 1 << 16, 0.02

    def slow_read(fd: int, buffers: list[memoryview], offset: int) -> int:
        assert offset % size == 0
        probes.time.sleep(duration_s)
        return sum(len(buffer) for buffer in buffers)

    monkeypatch.setattr(probes.os, "preadv", slow_read)
    rate = probes._read_rate(0, 4, 8, size, 0.5)
    expected = 4 * size / duration_s / 1e9
    # Threads start and end a read apart, and sleeping takes a little longer than asked.
    assert 0.5 * expected < rate < 1.15 * expected


def healthy() -> dict[str, Any]:
    return {
        "compiler": "g++",
        "python_headers": True,
        "machine": {"gpu": {"name": "a GPU"}},
        "versions": {"triton": "3.6.0", "accelerate": "1.10.0"},
        "disk": {"direct": True},
        "memory_cap": "permitted",
    }


def test_nothing_is_advised_on_a_machine_that_has_everything() -> None:
    assert advice(healthy()) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"compiler": None}, "C++ compiler"),
        ({"python_headers": False}, "python3-dev"),
        ({"machine": {"gpu": None}}, "no CUDA"),
        ({"versions": {"triton": None, "accelerate": "1"}}, "triton 3.6"),
        ({"versions": {"triton": "3.6", "accelerate": None}}, "accelerate"),
        ({"disk": {"direct": False}}, "O_DIRECT"),
        ({"memory_cap": "denied"}, "denied"),
    ],
)
def test_what_is_missing_is_advised(change: dict[str, Any], expected: str) -> None:
    (line,) = advice({**healthy(), **change})
    assert expected in line


def test_too_little_disk_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["doctor", "--store-dir", str(tmp_path), "--file-mib", str(1 << 30)]
    assert run(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "MiB free" in line
