"""Memory limits: the process's own group and those above it, both versions, file cache is free."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from specmoe_compile.bench.memory_cap import memory_cap, why_not_permitted
from specmoe_compile.system import machine, memory_groups
from specmoe_compile.system.memory_groups import (
    MemoryGroup,
    own_memory_groups,
    room_bytes_or_none,
)

MIB = 1 << 20
NO_LIMIT = 0x7FFFFFFFFFFFF000

V1_MOUNT = "35 31 0:32 {root} {folder} rw,relatime - cgroup cgroup rw,memory"
V2_MOUNT = "41 31 0:38 {root} {folder} rw,relatime - cgroup2 cgroup2 rw"


class Machine:
    """A fake /proc/self and control groups below a folder."""

    def __init__(self, folder: Path, version: int, path: str, *, root: str = "/") -> None:
        self.version, self.top, self.proc = version, folder / "c groups", folder / "proc"
        for made in (self.top, self.proc):
            made.mkdir()
        if version == 2:
            (self.top / "cgroup.controllers").write_text("cpu memory\n")
        line = V1_MOUNT if version == 1 else V2_MOUNT
        escaped = str(self.top).replace(" ", r"\040")
        (self.proc / "mountinfo").write_text(line.format(root=root, folder=escaped) + "\n")
        own = f"4:cpu,memory:{path}\n0::/\n" if version == 1 else f"0::{path}\n"
        (self.proc / "cgroup").write_text(own)

    def group(
        self, name: str, *, limit: int | None, used: int, file: int = 0, high: int | None = None
    ) -> None:
        folder = self.top / name
        folder.mkdir(parents=True, exist_ok=True)
        if self.version == 1:
            stat = f"cache {file}\ntotal_inactive_file {file}\ntotal_active_file 0\n"
            files = {
                "memory.limit_in_bytes": NO_LIMIT if limit is None else limit,
                "memory.usage_in_bytes": used,
                "memory.use_hierarchy": 1,
            }
        else:
            stat = f"anon {used - file}\nfile {file}\ninactive_file 0\nactive_file {file}\n"
            files = {
                "memory.max": "max" if limit is None else limit,
                "memory.high": "max" if high is None else high,
                "memory.current": used,
            }
        (folder / "memory.stat").write_text(stat)
        for file_name, value in files.items():
            (folder / file_name).write_text(f"{value}\n")

    def room(self, monkeypatch: pytest.MonkeyPatch) -> int | None:
        found = own_memory_groups(self.proc)
        monkeypatch.setattr(memory_groups, "own_memory_groups", lambda: found)
        return room_bytes_or_none()


versions = pytest.mark.parametrize("version", [1, 2])


@versions
def test_the_groups_of_the_process_are_found_innermost_first(version: int, tmp_path: Path) -> None:
    fake = Machine(tmp_path, version, "/batch/job")
    fake.group("batch/job", limit=None, used=0)
    folders = [fake.top / "batch/job", fake.top / "batch", fake.top]
    assert own_memory_groups(fake.proc) == [MemoryGroup(version, f) for f in folders]


@versions
@pytest.mark.parametrize("limited", ["batch/job", "batch", "."])
def test_a_limit_counts_wherever_it_is_set(
    version: int, limited: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Machine(tmp_path, version, "/batch/job")
    for name in ("batch/job", "batch", "."):
        fake.group(name, limit=700 * MIB if name == limited else None, used=100 * MIB)
    assert fake.room(monkeypatch) == 600 * MIB


@versions
def test_without_a_limit_there_is_no_bound(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Machine(tmp_path, version, "/job")
    fake.group("job", limit=None, used=100 * MIB)
    assert fake.room(monkeypatch) is None


@versions
def test_cached_files_are_free(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Machine(tmp_path, version, "/job")
    fake.group("job", limit=3000 * MIB, used=2999 * MIB, file=2900 * MIB)
    assert fake.room(monkeypatch) == 2901 * MIB


def test_the_soft_limit_of_version_2_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Machine(tmp_path, 2, "/job")
    fake.group("job", limit=900 * MIB, high=500 * MIB, used=100 * MIB)
    assert fake.room(monkeypatch) == 400 * MIB


def test_a_group_of_version_1_that_does_not_count_those_below_does_not_bind_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Machine(tmp_path, 1, "/batch/job")
    fake.group("batch/job", limit=700 * MIB, used=0)
    fake.group("batch", limit=100 * MIB, used=0)
    (fake.top / "batch/memory.use_hierarchy").write_text("0\n")
    assert fake.room(monkeypatch) == 700 * MIB


@versions
@pytest.mark.parametrize(
    ("path", "root"), [("/docker/abc", "/docker/abc"), ("/", "/"), ("/../../other", "/")]
)
def test_a_container_sees_its_own_group_as_the_top(
    version: int, path: str, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Machine(tmp_path, version, path, root=root)
    fake.group(".", limit=500 * MIB, used=100 * MIB)
    assert fake.room(monkeypatch) == 400 * MIB


def test_a_mount_over_another_hides_it(tmp_path: Path) -> None:
    fake = Machine(tmp_path, 1, "/batch/job")
    (fake.top / "job").mkdir()
    mounts = fake.proc / "mountinfo"
    mounts.write_text(mounts.read_text() + mounts.read_text().replace(" / ", " /batch "))
    assert own_memory_groups(fake.proc)[0].folder == fake.top / "job"


@pytest.mark.parametrize("controllers", ["", "cpu io"])
def test_version_2_without_the_memory_controller_is_none(controllers: str, tmp_path: Path) -> None:
    fake = Machine(tmp_path, 2, "/job")
    (fake.top / "cgroup.controllers").write_text(controllers)
    assert own_memory_groups(fake.proc) == []


def test_a_system_without_control_groups_has_none(tmp_path: Path) -> None:
    assert own_memory_groups(tmp_path) == []


def test_the_smaller_of_system_and_groups_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    free = psutil.virtual_memory()._replace(available=7 * MIB)
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: free)
    for room, available in ((5 * MIB, 5 * MIB), (1 << 60, 7 * MIB), (None, 7 * MIB)):
        monkeypatch.setattr(machine, "room_bytes_or_none", lambda room=room: room)
        assert machine.available_ram_bytes() == available


@pytest.mark.skipif(why_not_permitted() is not None, reason="control groups are not permitted here")
def test_a_real_limit_is_seen_and_the_cache_of_a_written_file_is_free() -> None:
    """The kernel's own files; the group lies below this process's, as a batch system's would."""
    code = (
        "import sys; from specmoe_compile.system.machine import available_ram_bytes\n"
        "before = available_ram_bytes()\n"
        "with open(sys.argv[1], 'wb') as file: file.write(bytes(96 << 20))\n"
        "held = bytearray(32 << 20)\n"
        "print(before, available_ram_bytes())"
    )
    # Not /tmp, which may be memory itself.
    with (
        memory_cap(256 * MIB) as cap,
        tempfile.NamedTemporaryFile(dir="/var/tmp") as file,
    ):
        command = cap.wrap([sys.executable, "-c", code, file.name])
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    before, after = map(int, shown.split())
    assert 128 * MIB < before < 256 * MIB
    assert before - 64 * MIB < after <= before - 16 * MIB
