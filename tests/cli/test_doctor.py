"""`specmoe doctor` measures, and says what to install."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specmoe_compile.bench import probes
from specmoe_compile.bench.link_rates import measure_link
from specmoe_compile.cli.doctor import _print, _store_or_none, advice
from specmoe_compile.cli.main import run
from specmoe_compile.runtime.store.writer import pack_records
from tests.helpers import PATIENCE_S
from tests.runtime.store_helpers import RandomSource


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


def test_a_store_says_what_its_experts_are_and_what_a_fetch_costs(
    result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert result["store"] is None and _store_or_none(tmp_path, 1.0) is None
    source = RandomSource()
    pack_records(source, tmp_path / "store", progress=False)
    found = _store_or_none(tmp_path / "store", 2.0)
    assert found is not None
    total = sum(layer.total_bytes for layer in source.layers)
    records = sum(layer.num_experts for layer in source.layers)
    assert (found["records"], found["record_bytes"]) == (records, total // records)
    assert found["fetch_ms"] == found["record_bytes"] / 2e6
    _print({**result, "store": {**found, "experts": "MXFP4"}})
    shown = capsys.readouterr().out
    assert "Experts in the store" in shown and f"MXFP4, {records} of" in shown


def test_the_link_to_a_gpu_is_shown_by_record_size(
    result: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = {"name": "a GPU", "memory_bytes": 1 << 30}
    without = {**result, "machine": {**result["machine"], "gpu": None}, "link": None}
    _print(without)
    assert capsys.readouterr().out.count("not measured: no CUDA device") == 1
    machine = {**result["machine"], "gpu": gpu}
    _print({**without, "machine": machine})
    assert "not measured: Triton is missing" in capsys.readouterr().out
    rate = {"record_bytes": 9 << 20, "copy_gbps": 51.25, "gather_gbps": 44.0}
    link = {"large_bytes": 1 << 28, "large_copy_gbps": 54.8, "by_record": [rate]}
    _print({**without, "machine": machine, "link": link})
    shown = " ".join(capsys.readouterr().out.split())
    assert "at most 54.8 GB/s, one copy of 256.0 MiB" in shown
    assert "records of 9.0 MiB 51.2 GB/s by the copy engine, 44.0 read by the GPU itself" in shown


class HostLink:
    """A link whose device is the host, with a clock of its own: 1 ms per launch and per MB."""

    def __init__(self) -> None:
        self.captures = 0

    def host(self, size_bytes: int) -> torch.Tensor:
        return torch.arange(size_bytes, dtype=torch.int64).to(torch.uint8)

    def device(self, size_bytes: int) -> torch.Tensor:
        self.target = torch.zeros(size_bytes, dtype=torch.uint8)
        return self.target

    def captured(self, work: Any) -> Any:
        self.captures += 1
        self.target.zero_()
        work()
        self.gathered = self.target.clone()
        return work

    def seconds(self, work: Any) -> float:
        self.target.zero_()
        work()
        return 1e-3


def test_each_size_moves_all_its_records() -> None:
    link = HostLink()
    rates = measure_link((4096, 48, 4096), link=link, moved_bytes=10_000)
    assert [rate.record_bytes for rate in rates.by_record] == [48, 4096]
    assert link.captures == 2, "each size is gathered in a graph"
    assert torch.equal(link.gathered[:8192], link.host(8192)), "two records of 4096 bytes"
    assert not link.gathered[8192:].any()
    assert torch.equal(link.target[:8192], link.host(8192))
    small, large = rates.by_record
    assert rates.large_copy_gbps == pytest.approx(10_000 / 1e6)
    assert small.copy_gbps == small.gather_gbps == pytest.approx(208 * 48 / 1e6)
    assert large.copy_gbps == large.gather_gbps == pytest.approx(8192 / 1e6)


@pytest.mark.gpu
def test_the_link_of_this_machine() -> None:
    rates = measure_link()
    assert rates.large_copy_gbps > 1
    for rate in rates.by_record:
        assert 0 < rate.copy_gbps < 1.2 * rates.large_copy_gbps
        assert 0 < rate.gather_gbps < 1.2 * rates.large_copy_gbps


class Lockstep:
    """A clock that moves when all reader threads are in a read, and stops until counting begins.

    Each read takes `read_s`; the main thread sleeps by the same clock.
    """

    def __init__(self, readers: int, read_s: float) -> None:
        self.now_s, self.read_s, self.wakes_s = 0.0, read_s, math.inf
        self.asleep, self.wakes, self.counts = (threading.Event() for _ in range(3))
        self.all_read = threading.Barrier(readers, self.move, timeout=PATIENCE_S)

    def move(self) -> None:
        assert self.asleep.wait(PATIENCE_S)
        self.now_s += self.read_s
        if self.now_s >= self.wakes_s and not self.counts.is_set():
            self.wakes.set()
            assert self.counts.wait(PATIENCE_S)

    def sleep(self, seconds: float) -> None:
        self.wakes_s = seconds
        self.asleep.set()
        assert self.wakes.wait(PATIENCE_S)

    def event(self) -> threading.Event:
        return self.counts


def test_reads_count_only_what_was_read_in_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With reads of known duration the rate is known: threads x size / duration."""
    size, readers, read_s = 1 << 16, 4, 1 / 64
    clock = Lockstep(readers, read_s)

    def read(fd: int, buffers: list[memoryview], offset: int) -> int:
        assert offset % size == 0
        clock.all_read.wait()
        return sum(len(buffer) for buffer in buffers)

    times = SimpleNamespace(perf_counter=lambda: clock.now_s, sleep=clock.sleep)
    threads = SimpleNamespace(Thread=threading.Thread, Event=clock.event)
    monkeypatch.setattr(probes, "time", times)
    monkeypatch.setattr(probes, "threading", threads)
    monkeypatch.setattr(probes.os, "preadv", read)
    rate = probes._read_rate(0, readers, 8, size, 0.5)
    reads = 1 + 32  # one is under way when counting begins, 32 follow in half a second
    assert clock.now_s == 0.3125 + 32 * read_s
    assert rate == pytest.approx(reads * readers * size / (32 * read_s) / 1e9)


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
