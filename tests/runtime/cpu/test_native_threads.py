"""The C++ engine where the system has no threads left."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from specmoe_compile.runtime.cpu.native.library import library_or_none

ROOT = Path(__file__).resolve().parents[3]

NO_ROOM_FOR_STACKS = """
import resource
import torch
from specmoe_compile.runtime.cpu.native.layer import NativeEngine, NativeLayer, Task
from specmoe_compile.runtime.cpu.native.library import library_or_none
from specmoe_compile.runtime.experts.formats.expert_format import PLAIN_FORMAT
from tests.runtime.cpu.test_native_kernels import Experts

torch.set_num_threads(1)
experts = Experts(256, 512, PLAIN_FORMAT, torch.float32)
tasks = [Task(experts.records[0].data_ptr(), (0,), (0,))]
x, outs = torch.randn(1, 256), torch.empty(2, 1, 256)
for out, threads in zip(outs, (1, 256)):
    engine = NativeEngine(library_or_none(), threads)
    if threads > 1:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        # Two stacks, and room for what the C library gives each thread: without that it aborts.
        resource.setrlimit(resource.RLIMIT_AS, (used + (160 << 20),) * 2)
    NativeLayer(engine, experts.spec()).run(tasks, x, out)
print("equal" if torch.equal(*outs) else "different")
"""


STACK_BYTES = 64 << 20


def with_large_stacks() -> Callable[[], None]:
    """What gives the threads of a process that begins stacks of `STACK_BYTES`, or as allowed."""
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_STACK)
    size = STACK_BYTES if most == resource.RLIM_INFINITY else min(STACK_BYTES, most)
    return lambda: resource.setrlimit(resource.RLIMIT_STACK, (size, most))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_fewer_threads_than_asked_for_do_the_work() -> None:
    if library_or_none() is None:
        pytest.skip("no C++ compiler")
    done = subprocess.run(
        [sys.executable, "-c", NO_ROOM_FOR_STACKS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=with_large_stacks(),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "equal"
