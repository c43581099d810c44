"""Experts' memory is page-locked as it is, and given back on close, on error and at exit."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from specmoe_compile.errors import StoreError, UnsupportedModelError
from specmoe_compile.runtime.cuda import opening, page_lock
from specmoe_compile.runtime.cuda.page_lock import PageLock
from specmoe_compile.runtime.experts.module import find_experts_layers
from specmoe_compile.runtime.session import Session
from specmoe_compile.runtime.store.module_source import ModuleSource
from specmoe_compile.runtime.store.ram import RamStore
from specmoe_compile.system.aligned import aligned_empty
from specmoe_compile.system.numa import node_of_pci_device_or_none, prefer_node
from tests.helpers import tiny_qwen3_moe
from tests.runtime.cuda.fake_cudart import FakeCudart
from tests.runtime.cuda.stream_model import StreamModel


def locked(region: torch.Tensor, runtime: FakeCudart) -> PageLock:
    return PageLock(region, runtime=runtime, synchronize=runtime.synchronize)


def is_mapped(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if begin <= address < end:
            return True
    return False


def test_a_region_is_locked_as_it_is_and_unlocked_once_after_the_device() -> None:
    runtime, region = FakeCudart(), aligned_empty(3 * 4096)
    lock = locked(region, runtime)
    assert runtime.locked == {region.data_ptr(): 3 * 4096}
    lock.release()
    lock.release()
    assert runtime.locked == {}
    assert runtime.calls == ["cudaHostRegister", "synchronize", "cudaHostUnregister"]


@pytest.mark.parametrize(
    ("limit_bytes", "said"),
    [
        (None, "; 3.0 GiB of RAM are free: free RAM, or keep"),
        (1 << 20, "; the process may lock 1.0 MiB (ulimit -l), and 3.0 GiB of RAM are free: raise"),
    ],
)
def test_a_refusal_says_what_is_needed_and_what_there_is(
    limit_bytes: int | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_lock, "available_ram_bytes", lambda: 3 << 30)
    monkeypatch.setattr(page_lock, "too_small_lock_limit_or_none", lambda size: limit_bytes)
    runtime, region = FakeCudart(fails="cudaHostRegister"), aligned_empty(5 << 20)
    with pytest.raises(StoreError) as refused:
        locked(region, runtime)
    text = str(refused.value)
    assert "could not page-lock 5.0 MiB of host memory for the experts (error 2, out of me" in text
    assert said in text
    assert runtime.calls == ["cudaHostRegister"], "what was never locked is not unlocked"


def test_the_lock_limit_is_raised_before_locking_as_far_as_it_may_be() -> None:
    code = """if True:
        import resource
        from specmoe_compile.runtime.cuda.page_lock import too_small_lock_limit_or_none
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (4096, 65536))
        for size_bytes in (4096, 8192, 65536, 65537):
            limit_bytes = too_small_lock_limit_or_none(size_bytes)
            print(size_bytes, limit_bytes, resource.getrlimit(resource.RLIMIT_MEMLOCK)[0])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "4096 None 4096",
        "8192 None 65536",
        "65536 None 65536",
        "65537 65536 65536",
    ]


@pytest.mark.parametrize("fails", ["synchronize", "cudaHostUnregister"])
def test_a_device_that_fails_does_not_keep_the_lock(
    fails: str, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = FakeCudart(fails=fails)
    lock = locked(aligned_empty(4096), runtime)
    if fails == "synchronize":
        with pytest.raises(RuntimeError, match="lost"):
            lock.release()
    else:
        lock.release()
        assert "could not unlock" in caplog.text
    assert runtime.calls[-1] == "cudaHostUnregister"


def open_session(model: Any, runtime: FakeCudart, monkeypatch: pytest.MonkeyPatch) -> Session:
    """`open_device_session` on CPU tensors."""
    layers = find_experts_layers(model)
    store = RamStore.from_source(ModuleSource(layers, name="m", top_k=2), progress=False)
    monkeypatch.setattr(opening, "PageLock", lambda region: locked(region, runtime))
    monkeypatch.setattr(opening, "CudaStreams", lambda device: StreamModel())
    return opening.open_device_session(
        model,
        layers,
        store,
        expert_cache_bytes=1 << 18,
        cache_policy="lru",
        top_k=2,
        reader_threads=2,
    )


def test_closing_unlocks_and_unmaps(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = FakeCudart()
    session = open_session(tiny_qwen3_moe(layers=2), runtime, monkeypatch)
    ids = torch.tensor([[0, 1]])
    session.experts(0, torch.randn(1, 64), ids, torch.ones(1, 2))
    (address,) = runtime.locked
    assert is_mapped(address)
    session.close()
    gc.collect()
    assert runtime.locked == {}
    assert not is_mapped(address)
    assert session.stats.total.misses == 2, "what it did is still known"
    session.close()
    assert runtime.calls.count("cudaHostUnregister") == 1


def test_a_session_that_does_not_open_unlocks(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, model = FakeCudart(), tiny_qwen3_moe(layers=1)
    model.model.layers[0].mlp.experts.act_fn = torch.nn.Tanh()
    with pytest.raises(UnsupportedModelError, match="none that the kernels have"):
        open_session(model, runtime, monkeypatch)
    assert runtime.calls == ["cudaHostRegister", "synchronize", "cudaHostUnregister"]


def test_a_session_that_is_left_open_unlocks_at_exit() -> None:
    code = """
        import pytest
        from tests.helpers import tiny_qwen3_moe
        from tests.runtime.cuda.fake_cudart import FakeCudart
        from tests.runtime.cuda.test_pinned_store import open_session

        class Loud(FakeCudart):
            def cudaHostUnregister(self, address):
                print("unlocked", address in self.locked, flush=True)
                return super().cudaHostUnregister(address)

        session = open_session(tiny_qwen3_moe(layers=1), Loud(), pytest.MonkeyPatch())
        print("ending", flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["ending", "unlocked True"]


def test_the_node_of_a_device_is_the_system_s(tmp_path: Path) -> None:
    for name, content in (("0000:3b:00.0", "1\n"), ("0000:af:00.0", "-1\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "numa_node").write_text(content)
    assert node_of_pci_device_or_none("0000:3b:00.0", devices=tmp_path) == 1
    assert node_of_pci_device_or_none("0000:af:00.0", devices=tmp_path) is None
    assert node_of_pci_device_or_none("0000:01:00.0", devices=tmp_path) is None


@pytest.mark.skipif(not Path("/proc/self/numa_maps").exists(), reason="a kernel without NUMA")
def test_a_store_is_put_on_the_node_that_is_asked_for() -> None:
    model = tiny_qwen3_moe(layers=1)
    source = ModuleSource(find_experts_layers(model), name="m", top_k=2)
    store = RamStore.from_source(source, progress=False, numa_node=0)
    address = f"{store.region.data_ptr():x}"
    lines = Path("/proc/self/numa_maps").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(address)]
    assert line.split()[1].startswith("prefer")
    assert not prefer_node(aligned_empty(4096), 63), "no such node"
