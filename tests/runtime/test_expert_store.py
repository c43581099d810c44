"""Expert stores: records come back bit by bit, damage is noticed, threads do not disturb."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from specmoe_compile.errors import StoreError
from specmoe_compile.runtime.store.base import ExpertStore
from specmoe_compile.runtime.store.disk import DiskStore
from specmoe_compile.runtime.store.header import record_checksum
from specmoe_compile.runtime.store.ram import RamStore
from specmoe_compile.runtime.store.writer import pack_records
from specmoe_compile.system.aligned import aligned_empty
from specmoe_compile.system.sizes import format_bytes, parse_size
from tests.helpers import PATIENCE_S
from tests.runtime.store_helpers import RandomSource, assert_record


@pytest.fixture
def source() -> RandomSource:
    return RandomSource()


@pytest.fixture
def folder(source: RandomSource, tmp_path: Path) -> Path:
    return pack_records(source, tmp_path / "store", progress=False).path


@pytest.fixture(params=["disk", "buffered", "ram"])
def store(
    request: pytest.FixtureRequest,
    source: RandomSource,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[ExpertStore]:
    opened: ExpertStore
    if request.param == "ram":
        opened = RamStore.from_source(source, progress=False)
    else:
        if request.param == "buffered":
            refuse_direct(monkeypatch)
        opened = DiskStore.open(folder)
        assert opened.direct is (request.param == "disk")
    with contextlib.closing(opened):
        yield opened


def refuse_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `open` refuse O_DIRECT, as some file systems do."""
    real_open = os.open

    def open_buffered(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real_open(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", open_buffered)


def all_records(store: ExpertStore) -> list[tuple[int, int]]:
    return [(i, e) for i, count in enumerate(store.num_experts) for e in range(count)]


def read(store: ExpertStore, layer: int, expert: int) -> torch.Tensor:
    """A record, read over memory that is full of other bytes."""
    record = aligned_empty(store.layouts[layer].record_bytes).fill_(0xA5)
    store.read_into(layer, expert, record)
    return record


def test_every_record_comes_back_bit_by_bit(store: ExpertStore, source: RandomSource) -> None:
    assert store.total_bytes == sum(layer.total_bytes for layer in source.layers)
    assert (store.num_experts, store.top_k) == ((5, 6), 2)
    assert store.layouts == tuple(layer.layout for layer in source.layers)
    for layer, expert in all_records(store):
        assert_record(source, layer, expert, read(store, layer, expert))


def test_unaligned_memory_is_read_into_as_well(store: ExpertStore, source: RandomSource) -> None:
    layout = store.layouts[1]
    for shift in (1, 64, 512):
        memory = aligned_empty(layout.record_bytes + 4096)
        store.read_into(1, 3, memory[shift : shift + layout.record_bytes])
        assert_record(source, 1, 3, memory[shift : shift + layout.record_bytes])
        assert not memory[:shift].any() and not memory[shift + layout.record_bytes :].any()


def test_a_memoryview_is_read_into(store: ExpertStore, source: RandomSource) -> None:
    memory = bytearray(store.layouts[0].record_bytes)
    store.read_into(0, 4, memoryview(memory))
    assert_record(source, 0, 4, torch.frombuffer(memory, dtype=torch.uint8))


def test_threads_read_at_once(store: ExpertStore, source: RandomSource) -> None:
    wanted = all_records(store) * 8
    with ThreadPoolExecutor(8) as pool:
        records = list(pool.map(lambda item: read(store, *item), wanted))
    for (layer, expert), record in zip(wanted, records, strict=True):
        assert_record(source, layer, expert, record)


@pytest.mark.parametrize(("layer", "expert"), [(0, 5), (0, -1), (2, 0), (-1, 0)])
def test_an_expert_that_is_not_there_is_refused(
    store: ExpertStore, layer: int, expert: int
) -> None:
    with pytest.raises(ValueError, match=f"No expert {expert} in MoE layer {layer}"):
        store.read_into(layer, expert, aligned_empty(4096))


def test_a_wrong_destination_is_refused(store: ExpertStore) -> None:
    size = store.layouts[0].record_bytes
    for destination in (
        torch.empty(size - 4096, dtype=torch.uint8),
        torch.empty(size // 4, dtype=torch.int32),
        torch.empty(2 * size, dtype=torch.uint8)[::2],
        memoryview(bytes(size)),
    ):
        with pytest.raises(ValueError, match=r"[Aa] record"):
            store.read_into(0, 0, destination)


def test_a_closed_store_says_so(store: ExpertStore) -> None:
    store.close()
    store.close()
    with pytest.raises(StoreError, match="is closed"):
        store.read_into(0, 0, aligned_empty(store.layouts[0].record_bytes))


def test_only_a_store_in_ram_has_records(folder: Path, source: RandomSource) -> None:
    with contextlib.closing(DiskStore.open(folder)) as disk:
        with pytest.raises(StoreError, match="use read_into"):
            disk.record(0, 0)
        ram = RamStore.from_store(disk, progress=False)
    assert ram.fingerprint == source.fingerprint
    assert ram.region.data_ptr() % 4096 == 0 and ram.region.numel() == ram.total_bytes
    for layer, expert in all_records(ram):
        record = ram.record(layer, expert)
        assert_record(source, layer, expert, record)
        bank = ram.layer_records(layer)
        assert bank.shape == (ram.num_experts[layer], ram.layouts[layer].record_bytes)
        assert record.data_ptr() == bank[expert].data_ptr()


def test_refused_direct_reads_are_told_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refuse_direct(monkeypatch)
    caplog.set_level(logging.WARNING, "specmoe_compile")
    with contextlib.closing(DiskStore.open(folder)) as store:
        for layer, expert in all_records(store):
            read(store, layer, expert)
    assert [r.message for r in caplog.records if "through the page cache" in r.message] == [
        f"{folder / 'experts.bin'} is read through the page cache, because the file system refuses "
        "O_DIRECT (Invalid argument); reads cost one more copy."
    ]


def test_short_reads_are_continued(
    folder: Path, source: RandomSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_preadv = os.preadv
    counts: list[int] = []

    def preadv_little(fd: int, buffers: list[Any], offset: int, *rest: Any) -> int:
        # 4096 bytes as a signal leaves them, then an odd count as a network file system may.
        part = memoryview(buffers[0])[:4096]
        count = real_preadv(fd, [part], offset, *rest)
        counts.append(count if len(counts) % 2 else min(count, 4095 + count % 2))
        return counts[-1]

    with contextlib.closing(DiskStore.open(folder)) as store:
        monkeypatch.setattr(os, "preadv", preadv_little)
        for layer, expert in all_records(store):
            assert_record(source, layer, expert, read(store, layer, expert))
    assert len(counts) > len(all_records(store))


def test_a_failing_disk_is_a_store_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def preadv_failing(*args: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with contextlib.closing(DiskStore.open(folder)) as store:
        monkeypatch.setattr(os, "preadv", preadv_failing)
        with pytest.raises(StoreError, match=r"failed: Input/output error"):
            read(store, 0, 0)
        monkeypatch.undo()
        read(store, 0, 0)


def test_a_file_cut_after_it_was_opened_is_a_store_error(folder: Path) -> None:
    with contextlib.closing(DiskStore.open(folder)) as store:
        os.truncate(folder / "experts.bin", store.total_bytes - 4096)
        with pytest.raises(StoreError, match="inside a record: it was truncated"):
            read(store, 1, 5)
        read(store, 0, 0)


def flip(path: Path, offset: int) -> None:
    """Flip one bit of a file."""
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_a_flipped_bit_is_noticed_when_the_record_is_read(folder: Path) -> None:
    with contextlib.closing(DiskStore.open(folder)) as store:
        flip(folder / "experts.bin", store.layouts[0].record_bytes * 2 + 100)
        read(store, 0, 1)
        for _ in range(2):  # the second time too: a damaged record is never marked good
            with pytest.raises(StoreError, match=r"layer 0 \(layers.0.experts\), expert 2"):
                read(store, 0, 2)
    with pytest.raises(StoreError, match="does not match its checksum"):
        DiskStore.open(folder, verify=True)
    with contextlib.closing(DiskStore.open(folder, verify_reads=False)) as careless:
        read(careless, 0, 2)
        with pytest.raises(StoreError, match="does not match its checksum"):
            careless.verify()


def test_swapped_records_are_noticed(folder: Path) -> None:
    size = RandomSource().layers[0].layout.record_bytes
    data = bytearray((folder / "experts.bin").read_bytes())
    data[:size], data[size : 2 * size] = data[size : 2 * size], data[:size]
    (folder / "experts.bin").write_bytes(data)
    with pytest.raises(StoreError, match="expert 0"):
        DiskStore.open(folder, verify=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.__setitem__(0, a[0] ^ 1),
        lambda a: a.__setitem__(slice(0, 4096), 0),
        lambda a: a.__setitem__(slice(0, 8192), np.roll(a[:8192], 4096)),
        lambda a: a.__setitem__(slice(0, 4096), np.roll(a[:4096], 8)),
        lambda a: a.__setitem__(slice(None), np.roll(a, 1)),
    ],
    ids=["bit", "zeroed page", "swapped pages", "shifted words", "shifted bytes"],
)
def test_the_checksum_tells_damage(change: Callable[[np.ndarray], None]) -> None:
    record = np.random.default_rng(0).integers(0, 256, 3 * 4096, dtype=np.uint8)
    before = record_checksum(record)
    assert before == record_checksum(record.copy())
    change(record)
    assert record_checksum(record) != before


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "another"}', "\x00\xff"])
def test_a_header_that_is_no_header_is_refused(folder: Path, content: str) -> None:
    (folder / "header.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(StoreError, match=r"header\.json is (damaged|not the header)"):
        DiskStore.open(folder)


def test_a_changed_header_is_refused(folder: Path) -> None:
    path = folder / "header.json"
    body = json.loads(path.read_text())
    body["layers"][0]["num_experts"] = 4
    path.write_text(json.dumps(body))
    with pytest.raises(StoreError, match="does not match its own checksum"):
        DiskStore.open(folder)


def test_another_version_is_refused(folder: Path) -> None:
    path = folder / "header.json"
    path.write_text(path.read_text().replace('"version": 2', '"version": 3'))
    with pytest.raises(
        StoreError, match="has format version 3, this specmoe reads versions up to 2"
    ):
        DiskStore.open(folder)


def test_a_store_of_version_1_opens(folder: Path, source: RandomSource) -> None:
    path = folder / "header.json"
    body = json.loads(path.read_text())
    del body["header_crc32"]
    assert all("format" not in layer for layer in body["layers"])  # plain records: as version 1
    body["version"] = 1
    crc = zlib.crc32(json.dumps(body, sort_keys=True).encode())
    path.write_text(json.dumps({**body, "header_crc32": crc}))
    with contextlib.closing(DiskStore.open(folder, verify=True)) as store:
        assert_record(source, 1, 2, read(store, 1, 2))


def test_a_truncated_store_is_refused(folder: Path) -> None:
    os.truncate(folder / "experts.bin", 8192)
    with pytest.raises(StoreError, match="has 8192 bytes, but its header promises"):
        DiskStore.open(folder)


def test_a_store_without_records_is_refused(folder: Path) -> None:
    (folder / "experts.bin").unlink()
    with pytest.raises(StoreError, match=r"experts\.bin cannot be read: No such file"):
        DiskStore.open(folder)


def test_a_folder_without_a_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"not a complete expert store: it has no header\.json"):
        DiskStore.open(tmp_path)
    with pytest.raises(StoreError, match="not a complete expert store: no such folder"):
        DiskStore.open(tmp_path / "absent")


def test_another_models_store_is_refused(folder: Path) -> None:
    with pytest.raises(StoreError, match="it holds other weights or another dtype"):
        DiskStore.open(folder, expected_fingerprint="f" * 64)


def test_closing_waits_for_readers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, go_on = threading.Event(), threading.Event()
    real_preadv = os.preadv

    def slow_preadv(*args: Any) -> int:
        started.set()
        assert go_on.wait(PATIENCE_S)
        return real_preadv(*args)

    store = DiskStore.open(folder)
    monkeypatch.setattr(os, "preadv", slow_preadv)
    with ThreadPoolExecutor(2) as pool:
        reading = pool.submit(read, store, 0, 0)
        assert started.wait(PATIENCE_S)
        closing = pool.submit(store.close)
        with pytest.raises(TimeoutError):
            closing.result(0.1)
        go_on.set()
        closing.result(PATIENCE_S)
        reading.result(PATIENCE_S)


def test_a_failed_open_leaves_no_descriptor(folder: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    os.truncate(folder / "experts.bin", 4096)
    for _ in range(3):
        with pytest.raises(StoreError):
            DiskStore.open(folder)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (4096, 4096),
        (0, 0),
        ("0%", 0),
        ("0.0001%", 1),
        ("4096B", 4096),
        ("4096", 4096),
        ("2GiB", 2 << 30),
        ("500MB", 500_000_000),
        ("1.5 gib", 3 << 29),
        ("25%", 250),
        ("0.5%", 5),
        (" 100 % ", 1000),
    ],
)
def test_sizes_are_read(text: int | str, expected: int) -> None:
    assert parse_size(text, total_bytes=1000) == expected


@pytest.mark.parametrize("text", [-1, "", "2G", "two", "101%", "-5MB", "1e9", "%"])
def test_a_size_that_cannot_be_meant_is_refused(text: int | str) -> None:
    with pytest.raises(ValueError, match="expert_cache="):
        parse_size(text, total_bytes=1000)


@pytest.mark.parametrize("value", [1.5, None, True])
def test_a_size_of_another_type_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="expert_cache="):
        parse_size(value, total_bytes=1000)


def test_sizes_are_printed() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1024, 805_306_368, 3 << 40)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "768.0 MiB",
        "3.0 TiB",
    ]
