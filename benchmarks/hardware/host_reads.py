"""How fast a GPU's kernels can read page-locked host memory, against its copy engine.

    python -m benchmarks gpu_host_reads --out host_reads.json

`gather_experts` against CUDA kernels that read in other ways: other grids, caching hints, and
bulk copies through shared memory (`cp.async.bulk`, compute capability 9.0). Each figure is the
median of replayed CUDA graphs of twelve launches over random records. Under a minute.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.hardware.first_run import Rig
from benchmarks.kit.command import run_parser
from specmoe_compile.bench.machine import provenance
from specmoe_compile.kernels.gather_experts.op import gather_experts
from specmoe_compile.runtime.cuda.page_lock import PageLock
from specmoe_compile.system.aligned import aligned_empty
from specmoe_compile.system.output import write_json

SEED = 0
HOST_BYTES = 4 << 30  # far more than a host's caches
CASES = ((9437184, 1), (9437184, 2), (9437184, 8), (49807360, 1), (49807360, 4))
"""Bytes of a record and records per launch: Qwen3-30B-A3B and GPT-OSS-20B."""
LAUNCHES, REPLAYS = 12, 5
GRIDS = (8, 16, 32, 64, 132)
HINTS = {
    "ld.global.v4": "ld.global.v4.u32",
    "ld.global.nc, 256-byte sectors": "ld.global.nc.L1::no_allocate.L2::256B.v4.u32",
    "ld.relaxed.sys": "ld.relaxed.sys.global.v4.u32",
}
BULK = ((1024, 32), (4096, 16), (8192, 24), (32768, 6))
"""Bytes of a bulk copy, and how many of them a block has in flight."""

_LOADS = """
extern "C" __global__ void read_loads(
    const char* source, char* target, const int* experts, int count, int record) {
  const int unroll = 4, chunk = blockDim.x * 16 * unroll, chunks = record / chunk;
  for (int task = blockIdx.x; task < count * chunks; task += gridDim.x) {
    const int fill = task / chunks;
    const long long within = (long long)(task % chunks) * chunk;
    const uint4* from = (const uint4*)(source + (long long)experts[fill] * record + within);
    uint4* to = (uint4*)(target + (long long)fill * record + within);
    uint4 v[unroll];
#pragma unroll
    for (int u = 0; u < unroll; u++)
      asm volatile("LOAD {%0, %1, %2, %3}, [%4];"
                   : "=r"(v[u].x), "=r"(v[u].y), "=r"(v[u].z), "=r"(v[u].w)
                   : "l"(from + threadIdx.x + u * blockDim.x));
#pragma unroll
    for (int u = 0; u < unroll; u++) to[threadIdx.x + u * blockDim.x] = v[u];
  }
}
"""

_BULK = """
__device__ unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

extern "C" __global__ void read_bulk(const char* source, char* target, const int* experts,
                                     int count, int record, int chunk, int stages) {
  extern __shared__ __align__(128) char buffer[];
  __shared__ __align__(8) unsigned long long bars[32];
  if (threadIdx.x) return;
  for (int s = 0; s < stages; s++)
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&bars[s])));
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  const int chunks = record / chunk, total = count * chunks, first = blockIdx.x;
  const int mine = total > first ? (total - first + gridDim.x - 1) / gridDim.x : 0;
  auto issue = [&](int i) {
    const int task = first + i * gridDim.x, s = i % stages;
    const char* from = source + (long long)experts[task / chunks] * record +
                       (long long)(task % chunks) * chunk;
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                     shared_address(&bars[s])), "r"(chunk) : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        ::"r"(shared_address(buffer + s * chunk)), "l"(from), "r"(chunk),
        "r"(shared_address(&bars[s])) : "memory");
  };
  for (int i = 0; i < stages && i < mine; i++) issue(i);
  for (int i = 0; i < mine; i++) {
    const int s = i % stages, parity = (i / stages) & 1;
    unsigned done = 0;
    while (!done)
      asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;"
                   " selp.u32 %0, 1, 0, p; }"
                   : "=r"(done) : "r"(shared_address(&bars[s])), "r"(parity) : "memory");
    const int task = first + i * gridDim.x;
    char* to = target + (long long)(task / chunks) * record + (long long)(task % chunks) * chunk;
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to),
                 "r"(shared_address(buffer + s * chunk)), "r"(chunk) : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    if (i > 0) {
      asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
      if (i - 1 + stages < mine) issue(i - 1 + stages);
    }
  }
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
"""

Launch = Callable[[int], object]


def rate_gbps(launch: Launch, moved_bytes: int) -> float:
    """Median over replays of a graph of `LAUNCHES` launches."""
    launch(0)  # compiled before it is captured
    rig = Rig()
    replay = rig.captured(lambda: [launch(i) for i in range(LAUNCHES)])
    return LAUNCHES * moved_bytes / rig.median_ms(replay, REPLAYS) / 1e6


def ways(
    source: Tensor, target: Tensor, experts: Tensor, chosen: Sequence[Sequence[int]]
) -> Iterator[tuple[str, int | None, Launch]]:
    """Ways to fetch records, and their grids.

    Args:
        source: [E, R] uint8 in page-locked memory. target: [N, R] uint8 on the device.
        experts: [LAUNCHES, N] int32 on the device; chosen: the same numbers on the host.
    """
    count, record = target.shape
    slots = torch.arange(count, dtype=torch.int32, device=target.device)
    number = torch.tensor([count], dtype=torch.int32, device=target.device)

    def copy_each(i: int) -> None:
        for slot, expert in enumerate(chosen[i]):
            target[slot].copy_(source[expert], non_blocking=True)

    yield "copy engine, one copy per record", None, copy_each
    for grid in GRIDS:
        yield (
            "gather_experts",
            grid,
            lambda i, grid=grid: gather_experts(  # type: ignore[misc]
                [source], [target], experts[i], slots, number, programs=grid
            ),
        )
    compiled: Any = torch.cuda._compile_kernel
    for name, load in HINTS.items():
        kernel = compiled(_LOADS.replace("LOAD", load), "read_loads")
        for grid in GRIDS:
            yield (
                name,
                grid,
                lambda i, kernel=kernel, grid=grid: kernel(  # type: ignore[misc]
                    (grid, 1, 1), (128, 1, 1), [source, target, experts[i], count, record]
                ),
            )
    bulk = compiled(_BULK, "read_bulk")
    bulk.set_shared_memory_config(max(chunk * stages for chunk, stages in BULK))
    for chunk, stages in BULK:
        for grid in GRIDS:
            arguments = [count, record, chunk, stages]
            yield (
                f"cp.async.bulk, {chunk} bytes, {stages} in flight",
                grid,
                lambda i, grid=grid, rest=arguments, size=chunk * stages: bulk(  # type: ignore[misc]
                    (grid, 1, 1), (32, 1, 1), [source, target, experts[i], *rest], shared_mem=size
                ),
            )


def measure(region: Tensor) -> list[dict[str, Any]]:
    """A row per case and way; each way's last launch is compared with what it should have read."""
    rows: list[dict[str, Any]] = []
    generator = torch.Generator().manual_seed(SEED)
    for record, count in CASES:
        source = region[: region.numel() // record * record].view(-1, record)
        target = torch.empty(count, record, dtype=torch.uint8, device="cuda")
        picks = [torch.randperm(len(source), generator=generator)[:count] for _ in range(LAUNCHES)]
        chosen = [pick.tolist() for pick in picks]
        experts = torch.stack(picks).int().cuda()
        for name, grid, launch in ways(source, target, experts, chosen):
            target.zero_()
            rate = rate_gbps(launch, count * record)
            right = torch.equal(target[-1].cpu(), source[chosen[-1][-1]])
            rows.append(
                {"record_bytes": record, "records": count, "way": name, "grid": grid}
                | {"gbps": rate, "right": right}
            )
            print(f"{record / 1e6:5.1f} MB x {count}  {name}, grid {grid}: {rate:.1f}", flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the JSON file; returns the exit status."""
    parser = run_parser("gpu_host_reads", __doc__)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("this benchmark needs a CUDA device and found none", file=sys.stderr)
        return 2
    region = aligned_empty(HOST_BYTES)
    lock = PageLock(region)
    large = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    for begin in range(0, HOST_BYTES, 1 << 30):
        region[begin:][: 1 << 30].copy_(large.view(torch.int64).random_().view(torch.uint8))
    ceiling = rate_gbps(
        lambda i: large.copy_(region[(i % 4) << 30 :][: 1 << 30], non_blocking=True), 1 << 30
    )
    print(f"copy engine, one copy of 1 GiB: {ceiling:.1f} GB/s", flush=True)
    result = {
        "schema": 1,
        **provenance(),
        "device": torch.cuda.get_device_name(),
        "seed": SEED,
        "one_copy_gbps": ceiling,
        "rows": measure(region),
    }
    write_json(args.out, result)
    lock.release()
    return 0 if all(row["right"] for row in result["rows"]) else 1
