"""Memory caps by control groups, version 1 and 2; a real one where that is permitted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from specmoe_compile.bench import memory_cap as module
from specmoe_compile.bench.child import ArmFailedError, run_python
from specmoe_compile.bench.memory_cap import (
    MemoryCap,
    memory_cap,
    why_not_permitted,
)
from specmoe_compile.system.memory_groups import MemoryGroup

MIB = 1 << 20
needs_groups = pytest.mark.skipif(
    why_not_permitted() is not None, reason="control groups are not permitted here"
)


@needs_groups
def test_child_runs_inside_its_group_and_the_group_is_removed() -> None:
    with memory_cap(256 * MIB) as cap:
        command = cap.wrap([sys.executable, "-c", "print(open('/proc/self/cgroup').read())"])
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert cap.folder.name in shown
        assert cap.limit_bytes == 256 * MIB
        peak = cap.peak_bytes_or_none()
        assert peak is not None
        assert 0 < peak <= 256 * MIB
        assert not cap.was_killed()
        folder = cap.folder
    assert not folder.exists()


@needs_groups
def test_child_that_needs_more_is_ended_and_the_message_names_the_cap() -> None:
    with (
        memory_cap(64 * MIB) as cap,
        pytest.raises(ArmFailedError, match=r"memory cap of 64\.0 MiB"),
    ):
        run_python(["-c", f"bytearray({512 * MIB})"], cap=cap)
    assert not cap.folder.exists()


def fake_groups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Put the process into the group user/me of version 2."""
    groups = [MemoryGroup(2, tmp_path / "user/me"), MemoryGroup(2, tmp_path / "user")]
    groups[0].folder.mkdir(parents=True)
    monkeypatch.setattr(module, "own_memory_groups", lambda: groups)


def test_version_2_tries_the_parent_when_its_own_group_may_not_hand_out_limits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_groups(monkeypatch, tmp_path)
    tried: list[Path] = []

    def create(version: int, parent: Path, limit_bytes: int) -> MemoryCap:
        tried.append(parent)
        if parent.name == "me":
            raise OSError(16, "Device or resource busy")
        folder = parent / "group"
        folder.mkdir()
        return MemoryCap(version=version, folder=folder, limit_bytes=limit_bytes)

    monkeypatch.setattr(module, "_create", create)
    with memory_cap(5 * MIB) as cap:
        assert cap.folder == tmp_path / "user/group"
    assert tried == [tmp_path / "user/me", tmp_path / "user"]
    assert not cap.folder.exists()


def test_where_no_group_can_be_made_the_reason_is_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_groups(monkeypatch, tmp_path)

    def create(version: int, parent: Path, limit_bytes: int) -> MemoryCap:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module, "_create", create)
    reason = why_not_permitted()
    assert reason is not None
    assert "Permission denied" in reason


def test_kills_are_read_from_both_versions(tmp_path: Path) -> None:
    first = MemoryCap(version=1, folder=tmp_path, limit_bytes=1)
    second = MemoryCap(version=2, folder=tmp_path, limit_bytes=1)
    assert not first.was_killed()
    (tmp_path / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 1\n")
    (tmp_path / "memory.events").write_text("low 0\noom 1\noom_kill 0\n")
    assert first.was_killed()
    assert not second.was_killed()
