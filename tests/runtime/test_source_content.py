"""A store is used for the very bytes that it was packed from, and for no others."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import specmoe_compile
from specmoe_compile.errors import StoreError
from specmoe_compile.hf import checkpoint as checkpoint_module
from specmoe_compile.hf import placing
from specmoe_compile.hf.conversion import CheckpointSource
from specmoe_compile.hf.model_loader import Skeleton, read_experts
from specmoe_compile.hf.packing import pack
from specmoe_compile.runtime.store import known_files, writer
from specmoe_compile.runtime.store.disk import DiskStore
from specmoe_compile.runtime.store.header import read_header
from specmoe_compile.runtime.store.source_content import SourceContent, SourceFile
from specmoe_compile.runtime.store.writer import StoreReport
from specmoe_compile.system.machine import cache_folder
from tests.runtime import tiny_checkpoints
from tests.runtime.test_packing import FAMILIES, assert_holds_model, load_reference

KEPT_TIME_NS = 1_700_000_000_000_000_000


@pytest.fixture(autouse=True)
def _few_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of a store sees next to nothing of a checkpoint, as with a large one."""
    monkeypatch.setattr(checkpoint_module, "_SAMPLES", 2)
    monkeypatch.setattr(checkpoint_module, "_SAMPLE_BYTES", 16)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as settled at once, so that a test need not wait for it."""
    monkeypatch.setattr(known_files, "_SETTLED_NS", 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tiny_checkpoints.write("mixtral", tmp_path / "model")
    for file in folder.iterdir():
        os.utime(file, ns=(KEPT_TIME_NS, KEPT_TIME_NS))
    return folder


def pack_quietly(folder: Path, store: Path | None = None) -> StoreReport:
    return pack(folder, store, progress=False)


def assert_right(report: StoreReport, folder: Path) -> None:
    with contextlib.closing(DiskStore.open(report.path, verify=True)) as store:
        assert_holds_model(store, load_reference(folder))


def edited(shard: Path) -> bytes:
    """A shard's bytes with one bit of an expert changed, in the middle of its last tensor."""
    data = bytearray(shard.read_bytes())
    with checkpoint_module.Checkpoint([shard]) as checkpoint:
        tensor = max(checkpoint.tensors.values(), key=lambda tensor: tensor.start)
        name = next(n for n, t in checkpoint.tensors.items() if t == tensor)
    assert ".experts." in name
    data[(tensor.start + tensor.stop) // 2] ^= 1
    return bytes(data)


def expert_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[2]


def change(folder: Path, how: str) -> None:
    """Change one expert; size and date of the file stay as they were."""
    shard = expert_shard(folder)
    data = edited(shard)
    if how == "in place":
        shard.write_bytes(data)
    elif how == "another file":
        other = shard.with_suffix(".new")
        other.write_bytes(data)
        os.utime(other, ns=(KEPT_TIME_NS, KEPT_TIME_NS))
        other.replace(shard)
    else:
        blob = folder / "blob"
        blob.write_bytes(data)
        shard.unlink()
        shard.symlink_to(blob)
    os.utime(shard, ns=(KEPT_TIME_NS, KEPT_TIME_NS))


@pytest.mark.parametrize("how", ["in place", "another file", "link to another blob"])
def test_one_changed_bit_is_noticed_though_name_size_and_date_stay(
    how: str, folder: Path, tmp_path: Path, settled: None
) -> None:
    explicit, default = pack_quietly(folder, tmp_path / "store"), pack_quietly(folder)
    assert pack_quietly(folder).reused
    change(folder, how)
    before = (explicit.path / "experts.bin").read_bytes()
    with pytest.raises(StoreError, match=r"store differs from .*: the weights were changed since"):
        pack_quietly(folder, explicit.path)
    assert (explicit.path / "experts.bin").read_bytes() == before
    again = pack_quietly(folder)
    assert not again.reused
    assert_right(again, folder)
    if how != "link to another blob":  # the same files: their old content is nowhere any more
        assert again.path == default.path
    assert pack_quietly(folder).reused


def test_two_checkpoints_of_one_name_have_a_store_each(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    copy = Path(shutil.copytree(folder, tmp_path / "other" / "model"))
    first = pack_quietly(folder)
    assert pack_quietly(copy).path == first.path, "equal bytes share a store"
    change(copy, "in place")
    second = pack_quietly(copy)
    assert (second.reused, second.path.name) == (False, f"{first.path.name}-2")
    for report, source in ((first, folder), (second, copy)):
        assert_right(report, source)
        again = pack_quietly(source)
        assert (again.path, again.reused) == (report.path, True)
    change(copy, "another file")  # back to what it was: its own store is packed anew
    assert pack_quietly(copy).path == first.path


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the files that are read once more, only to be hashed."""
    files: list[str] = []
    real = SourceContent._hash_range

    def counted(self: Any, file: Any, start: int, stop: int) -> str:
        files.append(file.path.name)
        return real(self, file, start, stop)

    monkeypatch.setattr(SourceContent, "_hash_range", counted)
    yield files


def test_a_second_load_hashes_nothing(
    folder: Path, tmp_path: Path, settled: None, hashed: list[str]
) -> None:
    first = pack_quietly(folder, tmp_path / "store")
    assert pack_quietly(folder, first.path).reused
    assert hashed == []
    (tmp_path / "other").mkdir()
    copy = Path(shutil.copytree(folder, tmp_path / "other" / "model"))
    assert pack_quietly(copy, first.path).reused
    assert set(hashed) == {file.name for file in copy.glob("*.safetensors")} & set(hashed) != set()
    hashed.clear()
    assert pack_quietly(copy, first.path).reused, "what was hashed is remembered"
    assert hashed == []
    change(copy, "in place")
    with pytest.raises(StoreError, match="were changed since"):
        pack_quietly(copy, first.path)
    assert set(hashed) == {expert_shard(copy).name}, "only the file that changed is hashed"


def test_a_file_that_was_written_just_now_is_hashed_again(
    folder: Path, tmp_path: Path, hashed: list[str]
) -> None:
    first = pack_quietly(folder, tmp_path / "store")
    assert {file.identity for file in read_header(first.path).packed_from} == {None}
    for _ in range(2):
        assert pack_quietly(folder, first.path).reused
        assert hashed != []
        hashed.clear()


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_hashed_while_packing_is_what_the_files_hold(
    name: str, tmp_path: Path, hashed: list[str]
) -> None:
    folder = tiny_checkpoints.write(name, tmp_path / "model")
    report = pack_quietly(folder, tmp_path / "store")
    assert hashed == [], "packing has read everything already"
    packed = read_header(report.path).packed_from
    found: list[tuple[SourceFile, ...]] = []

    def place(skeleton: Skeleton) -> None:
        assert skeleton.source.content is not None
        found.append(skeleton.source.content.files())

    read_experts(folder, dtype="auto", hf_options={}, place_experts=place)
    assert found == [packed] and packed != () and hashed != []


def without_hashes(store: Path) -> None:
    """Make a store one of those that were written before there were hashes."""
    path = store / "header.json"
    body = json.loads(path.read_text())
    del body["packed_from"], body["header_crc32"]
    crc = zlib.crc32(json.dumps(body, sort_keys=True).encode())
    path.write_text(json.dumps({**body, "header_crc32": crc}))


def test_an_old_store_is_compared_once(
    folder: Path, tmp_path: Path, settled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = pack_quietly(folder, tmp_path / "store").path
    without_hashes(store)
    fills: list[int] = []
    real = CheckpointSource.fill

    def counted(self: Any, layer: int, expert: int, record: Any) -> None:
        fills.append(layer)
        real(self, layer, expert, record)

    monkeypatch.setattr(CheckpointSource, "fill", counted)
    assert pack_quietly(folder, store).reused and len(fills) == 12
    assert pack_quietly(folder, store).reused and len(fills) == 12
    change(folder, "in place")
    with pytest.raises(StoreError, match=r"differs from .* in layer \d, expert \d"):
        pack_quietly(folder, store)


def test_a_pack_goes_on_only_with_the_weights_it_began_with(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = CheckpointSource.fill

    def killed(self: Any, layer: int, expert: int, record: Any) -> None:
        if layer == 2:
            raise KeyboardInterrupt
        real(self, layer, expert, record)

    def pack_two_layers(store: Path) -> None:
        monkeypatch.setattr(CheckpointSource, "fill", killed)
        with pytest.raises(KeyboardInterrupt):
            pack_quietly(folder, store)
        monkeypatch.setattr(CheckpointSource, "fill", real)

    pack_two_layers(tmp_path / "same")
    assert pack_quietly(folder, tmp_path / "same").resumed_layers == 2
    pack_two_layers(tmp_path / "changed")
    change(folder, "in place")  # an expert of the first layer
    report = pack_quietly(folder, tmp_path / "changed")
    assert report.resumed_layers == 0
    assert_right(report, folder)


def test_a_complete_store_needs_no_lock_and_a_pack_does(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = pack_quietly(folder, tmp_path / "store").path
    (store / "packing.lock").unlink()

    def no_locks(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(writer.fcntl, "flock", no_locks)
    assert pack_quietly(folder, store).reused
    assert sorted(file.name for file in store.iterdir()) == ["experts.bin", "header.json"]
    with pytest.raises(StoreError, match=r"cannot be locked \(No locks available\)"):
        pack_quietly(folder, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_store_of_another_user_is_used(folder: Path, tmp_path: Path) -> None:
    store = pack_quietly(folder, tmp_path / "store").path
    for path in (tmp_path, *tmp_path.parents[:3]):
        path.chmod(path.stat().st_mode | 0o555)
    for path in folder.iterdir():
        path.chmod(0o644)
    reader, writing = os.pipe()
    child = os.fork()
    if child == 0:  # root may write anywhere, so try as somebody else, who has no cache folder
        message = "used"
        try:
            if os.getuid() == 0:
                os.setuid(65534)
            os.environ["XDG_CACHE_HOME"] = "/proc/nowhere"
            assert pack_quietly(folder, store).reused
        except BaseException as error:
            message = f"{type(error).__name__}: {error}"
        os.write(writing, message.encode())
        os._exit(0)
    os.close(writing)
    with open(reader) as file:
        message = file.read()
    os.waitpid(child, 0)
    assert message == "used"


def test_when_a_file_counts_as_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"weights")
    with open(path, "rb") as file:
        identity = known_files.FileIdentity.of(os.fstat(file.fileno()))
        later = identity.ctime_ns + 4_000_000_000

        def settled(since_ns: int) -> bool:
            known = known_files.settled_identity_or_none(file.fileno(), identity, since_ns)
            return known is not None

        assert settled(later)
        assert not settled(identity.ctime_ns + 1_000_000), "a write may leave the time as it is"
        assert not settled(identity.ctime_ns - 4_000_000_000), "the clock was set back"
        monkeypatch.setattr(known_files, "_file_system_or_none", lambda device: "fuse.sshfs")
        assert not settled(later), "its times are those that the client says"
        monkeypatch.setattr(known_files, "_file_system_or_none", lambda device: None)
        assert settled(later)
        path.write_bytes(b"changed")
        assert not settled(later)


def test_notes_that_are_damaged_or_cannot_be_kept_do_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"weights")
    identity = known_files.FileIdentity.of(path.stat())
    assert known_files.recall(path, "part", identity) is None
    known_files.remember(path, "part", identity, "abc")
    assert known_files.recall(path, "part", identity) == "abc"
    assert known_files.recall(path, "other part", identity) is None
    other = known_files.FileIdentity.of(tmp_path.stat())
    assert known_files.recall(path, "part", other) is None
    (note,) = (cache_folder() / "hashes").iterdir()
    for damage in ("", "[]", '{"identity": 1}', "\x00"):
        note.write_text(damage)
        assert known_files.recall(path, "part", identity) is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))  # a file where the folder should be
    known_files.remember(path, "part", identity, "abc")
    assert known_files.recall(path, "part", identity) is None


def test_the_file_system_of_a_device_is_found() -> None:
    device = os.stat("/proc").st_dev
    assert known_files._file_system_or_none(device) == "proc"


def test_a_store_that_another_process_replaced_meanwhile_is_not_used(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    copy = Path(shutil.copytree(folder, tmp_path / "other" / "model"))
    change(copy, "in place")
    other = pack_quietly(copy, tmp_path / "store")
    real = placing.pack_source

    def replaced(source: Any, store: Path, **kwargs: Any) -> StoreReport:
        return dataclasses.replace(real(source, store, **kwargs), path=other.path)

    monkeypatch.setattr(placing, "pack_source", replaced)
    with pytest.raises(StoreError, match="were changed since"):
        specmoe_compile.from_pretrained(
            folder, device="cpu", store="disk", store_dir=tmp_path / "own", progress=False
        )
