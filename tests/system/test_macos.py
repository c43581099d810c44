"""A system without Linux's own calls: no fdatasync, O_DIRECT, posix_fadvise, affinity, /proc.

The calls are taken away in a process of its own, since what is bound at import counts too.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from specmoe_compile.system import files, machine
from tests.helpers import PATIENCE_S, save_tiny

SCRIPT = """
import fcntl, os, pathlib, sys, time
import psutil, torch, transformers
LINUX_ONLY = ("fdatasync", "O_DIRECT", "posix_fadvise", "POSIX_FADV_DONTNEED", "sched_getaffinity",
              "preadv", "pwritev")
for name in LINUX_ONLY:
    delattr(os, name)
real_read_text = pathlib.Path.read_text
def read_text(path, *args, **kwargs):
    if str(path).startswith(("/proc/", "/sys/")):
        raise FileNotFoundError(2, "No such file or directory", str(path))
    return real_read_text(path, *args, **kwargs)
pathlib.Path.read_text = read_text
asked = []
real_fcntl = fcntl.fcntl
fcntl.F_FULLFSYNC, fcntl.F_NOCACHE = 51, 48
def fake_fcntl(fd, command, *rest):
    if command in (51, 48):
        asked.append(command)
        return 0
    return real_fcntl(fd, command, *rest)
fcntl.fcntl = fake_fcntl

import specmoe_compile
from specmoe_compile.bench import machine as bench_machine, worker
folder, store = sys.argv[1:]
report = specmoe_compile.pack(folder, store, progress=False)
assert not report.reused and report.experts == 24
options = dict(device="cpu", store_dir=store, progress=False, verify=True)
ids = torch.tensor([[5, 17, 80, 3]])
want = transformers.AutoModelForCausalLM.from_pretrained(folder).generate(
    ids, max_new_tokens=6, do_sample=False)
for kind in ("disk", "auto"):
    model = specmoe_compile.from_pretrained(folder, store=kind, **options)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), want), kind
    specmoe_compile.close(model)
assert worker.peak_rss_bytes() > 0 and worker.disk_read_bytes_or_none() is None
assert bench_machine.describe_machine()["cores"] >= 1
print("asked", sorted(set(asked)))
"""


def test_everything_works_without_what_only_linux_has(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "model"), str(tmp_path / "store")],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "asked [48, 51]"
    assert "page cache" not in done.stderr


def test_where_the_drive_cannot_be_told_to_flush_fsync_must_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> int:
        raise OSError(25, "Inappropriate ioctl for device")

    synced: list[int] = []
    monkeypatch.delattr(os, "fdatasync", raising=False)
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    monkeypatch.setattr(os, "fsync", synced.append)
    files.sync_data(7)
    assert synced == [7]


def test_reading_without_preadv_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(range(100)))
    monkeypatch.delattr(os, "preadv", raising=False)
    buffer = bytearray(60)
    with open(path, "rb") as file:
        assert files.pread_into(file.fileno(), memoryview(buffer), 50) == 50
        assert files.pread_into(file.fileno(), memoryview(buffer), 100) == 0
    assert bytes(buffer) == bytes(range(50, 100)) + bytes(10)


def test_processors_are_counted_without_an_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert machine.cpu_count() == (os.cpu_count() or 1)
