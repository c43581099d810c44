"""Writing a store: a kill, a full disk, a rival or a forbidden folder lose nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from specmoe_compile.errors import StoreError
from specmoe_compile.runtime.store import writer as store_writer
from specmoe_compile.runtime.store.disk import DiskStore
from specmoe_compile.runtime.store.writer import pack_records
from tests.helpers import PATIENCE_S
from tests.runtime.store_helpers import RandomSource, assert_record

REPOSITORY = Path(__file__).parents[2]


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name != "packing.lock")


def test_a_store_is_two_files_and_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    pack_records(RandomSource(), tmp_path, progress=False)
    assert leftovers(tmp_path) == ["experts.bin", "header.json", "notes.txt"]


def test_a_damaged_store_is_packed_anew_only_where_it_is_ours(tmp_path: Path) -> None:
    source = RandomSource()
    pack_records(source, tmp_path, progress=False)
    os.truncate(tmp_path / "experts.bin", 4096)
    with pytest.raises(StoreError, match="truncated or damaged"):
        pack_records(source, tmp_path, progress=False)
    assert not pack_records(source, tmp_path, progress=False, replace=True).reused
    assert_store_holds(tmp_path, source)


def assert_store_holds(folder: Path, source: RandomSource) -> None:
    with contextlib.closing(DiskStore.open(folder, verify=True)) as store:
        for layer, count in enumerate(store.num_experts):
            for expert in range(count):
                record = torch.empty(store.layouts[layer].record_bytes, dtype=torch.uint8)
                store.read_into(layer, expert, record)
                assert_record(source, layer, expert, record)


def start_packing(folder: Path, body: str) -> subprocess.Popen[str]:
    """Start a process that packs `RandomSource(layers=9)`; `body` is the body of its `fill`."""
    code = f"""
        import os, sys, time
        from pathlib import Path
        from tests.runtime.store_helpers import RandomSource
        from specmoe_compile.runtime.store.writer import pack_records

        class Source(RandomSource):
            def fill(self, layer, expert, record):
                {body}
                super().fill(layer, expert, record)

        report = pack_records(Source(layers=9), Path({str(folder)!r}), progress=False)
        print("reused" if report.reused else "packed", report.resumed_layers, flush=True)
    """
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


HANG_AT = 'if (layer, expert) == ({}, 3): print("there", flush=True); time.sleep(600)'


def kill_at(folder: Path, layer: int) -> None:
    process = start_packing(folder, HANG_AT.format(layer))
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "there\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(PATIENCE_S)
        process.stdout.close()


def test_a_killed_pack_is_not_a_store_and_goes_on_where_it_was(tmp_path: Path) -> None:
    folder, source = tmp_path / "store", RandomSource(layers=9)
    kill_at(folder, 2)
    with pytest.raises(StoreError, match="not a complete expert store"):
        DiskStore.open(folder)
    kill_at(folder, 5)
    # What was written after the last complete layer is written again.
    with open(folder / "experts.bin.partial", "r+b") as file:
        file.seek(sum(layer.total_bytes for layer in source.layers[:5]))
        file.write(b"\xff" * 8192)
    report = pack_records(source, folder, progress=False)
    assert (report.reused, report.resumed_layers) == (False, 5)
    assert leftovers(folder) == ["experts.bin", "header.json"]
    assert_store_holds(folder, source)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a pack left that was killed in layer 4. Nobody writes into it."""
    folder = tmp_path_factory.mktemp("killed") / "store"
    kill_at(folder, 4)
    return folder


def test_a_killed_pack_of_other_weights_is_not_continued(tmp_path: Path, killed: Path) -> None:
    folder = Path(shutil.copytree(killed, tmp_path / "store"))
    other = RandomSource(layers=9, seed=1)
    assert pack_records(other, folder, progress=False).resumed_layers == 0
    assert_store_holds(folder, other)


@pytest.mark.parametrize("damage", ["cut line", "short file", "no file"])
def test_a_damaged_journal_costs_only_time(tmp_path: Path, killed: Path, damage: str) -> None:
    folder, source = Path(shutil.copytree(killed, tmp_path / "store")), RandomSource(layers=9)
    expected = {"cut line": 3, "short file": 1, "no file": 0}[damage]
    if damage == "cut line":
        journal = folder / "packing.journal"
        os.truncate(journal, journal.stat().st_size - 5)
    elif damage == "short file":
        os.truncate(folder / "experts.bin.partial", source.layers[0].total_bytes + 4096)
    else:
        (folder / "experts.bin.partial").unlink()
    assert pack_records(source, folder, progress=False).resumed_layers == expected
    assert_store_holds(folder, source)


def test_two_packers_do_not_collide(tmp_path: Path) -> None:
    slow = 'expert == 0 and (print("there", flush=True) or time.sleep(0.1))'
    first = start_packing(tmp_path / "store", slow)
    assert first.stdout is not None and first.stdout.readline() == "there\n"
    second = start_packing(tmp_path / "store", "pass")
    outputs = [process.communicate(timeout=PATIENCE_S)[0] for process in (first, second)]
    assert outputs[0].splitlines()[-1] == "packed 0"
    assert outputs[1] == "reused 0\n"
    assert_store_holds(tmp_path / "store", RandomSource(layers=9))


def test_a_folder_that_another_packer_makes_meanwhile_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Between the look at the folder and its making, where two ranks can be at once.
    monkeypatch.setattr(store_writer, "refuse_file", lambda folder: folder.mkdir())
    source = RandomSource()
    assert not pack_records(source, tmp_path / "store", progress=False).reused
    assert_store_holds(tmp_path / "store", source)


def test_too_little_free_disk_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(store_writer.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StoreError, match=r"Not enough free disk .* need .* 97\.7 KiB are free"):
        pack_records(RandomSource(), tmp_path / "store", progress=False)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fails_in_the_middle_is_cleaned_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    real_pwrite = os.pwrite
    written: list[int] = []

    def failing_pwrite(fd: int, data: Any, offset: int) -> int:
        written.append(offset)
        if len(written) > 4:
            raise OSError(code, os.strerror(code))
        return real_pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", failing_pwrite)
    message = r"failed: Input/output error" if code == errno.EIO else "The disk became full"
    with pytest.raises(StoreError, match=message):
        pack_records(RandomSource(), tmp_path / "store", progress=False)
    assert not (tmp_path / "store").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(StoreError, match=message):
        pack_records(RandomSource(), tmp_path / "mine", progress=False)
    assert leftovers(tmp_path / "mine") == []


def can_mount() -> bool:
    """Whether this process may mount a file system of its own (root, user namespaces)."""
    tool = shutil.which("unshare")
    command = [tool or "", "-m", "mount", "-t", "tmpfs", "-o", "size=1m", "none", "/mnt"]
    return tool is not None and subprocess.run(command, capture_output=True).returncode == 0


def run_on_tmpfs(folder: Path, options: str, code: str) -> str:
    """Run Python code where `folder` is a small file system; returns what it prints."""
    script = f"mount -t tmpfs -o {options} none {folder} && exec {sys.executable} -c '{code}'"
    process = subprocess.run(
        ["unshare", "-m", "sh", "-c", script],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.skipif(not can_mount(), reason="may not mount file systems")
def test_a_really_full_disk_is_cleaned_up(tmp_path: Path) -> None:
    code = f"""
import os
from pathlib import Path
from tests.runtime.store_helpers import RandomSource
from specmoe_compile.errors import StoreError
from specmoe_compile.runtime.store.writer import pack_records
folder = Path("{tmp_path}")
class Source(RandomSource):
    def fill(self, layer, expert, record):
        super().fill(layer, expert, record)
        if layer == 4:  # somebody else takes the rest of the disk
            try:
                (folder / "other").write_bytes(bytes(64 << 20))
            except OSError as error:
                print(error.strerror)
try:
    pack_records(Source(layers=9), folder / "store", progress=False)
except StoreError as error:
    print(error)
print(os.listdir(folder))
"""
    lines = run_on_tmpfs(tmp_path, "size=20m", code).splitlines()
    assert lines[0] == "No space left on device"
    assert lines[-2].startswith(f"The disk became full while packing random into {tmp_path}/store")
    assert lines[-1] == "['other']"


@pytest.mark.skipif(not can_mount(), reason="may not mount file systems")
def test_a_read_only_file_system_is_a_store_error(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from tests.runtime.store_helpers import RandomSource
from specmoe_compile.errors import StoreError
from specmoe_compile.runtime.store.writer import pack_records
for folder in (Path("{tmp_path}"), Path("{tmp_path}") / "store"):
    try:
        pack_records(RandomSource(), folder, progress=False)
    except StoreError as error:
        print(error)
"""
    assert run_on_tmpfs(tmp_path, "ro", code).splitlines() == [
        f"The store folder {tmp_path} is not writable: Read-only file system. Choose another "
        "store_dir.",
        f"The store folder {tmp_path}/store cannot be created: Read-only file system. Choose a "
        "store_dir that is writable.",
    ]


def test_a_file_in_the_way_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here first")
    with pytest.raises(StoreError, match="a file of that name is in the way"):
        pack_records(RandomSource(), tmp_path / "file", progress=False)
    with pytest.raises(StoreError, match="cannot be created: Not a directory"):
        pack_records(RandomSource(), tmp_path / "file" / "store", progress=False)
    assert (tmp_path / "file").read_text() == "here first"


def test_a_folder_without_permission_is_a_store_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    for parent in tmp_path.parents[:3]:
        parent.chmod(parent.stat().st_mode | 0o555)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # root may write anywhere, so try as somebody else
        message = "no error"
        try:
            if os.getuid() == 0:
                os.setuid(65534)
            pack_records(RandomSource(), tmp_path, progress=False)
        except BaseException as error:
            message = f"{type(error).__name__}: {error}"
        os.write(writer, message.encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as file:
        message = file.read()
    os.waitpid(child, 0)
    tmp_path.chmod(0o755)
    assert message.startswith(
        f"StoreError: The store folder {tmp_path} is not writable: Permission"
    )


def test_an_interrupt_keeps_what_was_packed(tmp_path: Path) -> None:
    class Interrupted(RandomSource):
        def fill(self, layer: int, expert: int, record: torch.Tensor) -> None:
            if (layer, expert) == (3, 1):
                raise KeyboardInterrupt
            super().fill(layer, expert, record)

    with pytest.raises(KeyboardInterrupt):
        pack_records(Interrupted(layers=9), tmp_path / "store", progress=False)
    assert (
        pack_records(RandomSource(layers=9), tmp_path / "store", progress=False).resumed_layers == 3
    )
