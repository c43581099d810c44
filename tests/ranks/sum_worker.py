"""One rank: sums in one shot beside NCCL's, in CUDA graphs, on random inputs; run by torchrun.

`sum_worker.py OUT` writes OUT/rankN.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from specmoe_compile.hf.ranks import device_of_rank
from specmoe_compile.kernels.sum_ranks.op import sum_ranks
from specmoe_compile.kernels.sum_ranks.reference import sum_ranks_reference
from specmoe_compile.runtime.cuda.inboxes import open_inboxes
from specmoe_compile.system.launched import launched

INPUTS = 20
CASES = [
    (dtype, tokens, hidden)
    for dtype in (torch.bfloat16, torch.float32)
    for hidden in (2048, 2880)
    for tokens in range(1, 17)
]


class Case:
    """Both sums of one size in a CUDA graph; compared on the device."""

    def __init__(self, dtype: torch.dtype, tokens: int, hidden: int, group: str) -> None:
        device = torch.device("cuda", launched().local_rank)
        self._x = torch.zeros(tokens, hidden, dtype=dtype, device=device)
        self.wrong = torch.zeros(2, dtype=torch.int64, device=device)
        self._group = group
        self._run()  # compiles
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self.total = self._run()
        self.wrong.zero_()

    def _run(self) -> Tensor:
        nccl: Any = torch.ops._c10d_functional
        by_ring = nccl.wait_tensor(nccl.all_reduce(self._x, "sum", self._group))
        total = sum_ranks(self._x, self._group)
        again = sum_ranks(self._x, self._group)
        self.wrong += torch.stack(((total != by_ring).sum(), (total != again).sum()))
        return total

    def replay(self, values: Tensor) -> Tensor:
        """Sum values, which arrive late on one rank now and then."""
        self._x.copy_(values)
        self._graph.replay()
        return self.total


def run() -> dict[str, Any]:
    """All cases in turns; how many numbers differed, and from what."""
    here = launched()
    device = device_of_rank(torch.device("cuda"))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    group = dist.group.WORLD.group_name  # type: ignore[union-attr]
    reason = open_inboxes([group], device)[group]
    if reason is not None:
        return {"reason": reason}
    cases = [Case(*case, group) for case in CASES]
    generator = torch.Generator(device).manual_seed(here.rank)
    digest, off_reference = hashlib.sha256(), 0
    for number in range(INPUTS):
        for index, (case, (dtype, tokens, hidden)) in enumerate(zip(cases, CASES, strict=True)):
            if (number + index) % 7 == here.rank:
                torch.cuda._sleep(20_000 * (1 + index % 5))
            values = torch.randn(tokens, hidden, generator=generator, device=device) * 10 ** (
                number % 5 - 2
            )
            total = case.replay(values.to(dtype))
            if number == INPUTS - 1:
                parts = [torch.empty_like(total) for _ in range(here.size)]
                dist.all_gather(parts, values.to(dtype))
                off_reference += int((total != sum_ranks_reference(parts)).sum())
                digest.update(total.view(torch.uint8).cpu().numpy().tobytes())
    return {
        "reason": None,
        "sums": INPUTS * len(CASES),
        "off_nccl": sum(int(case.wrong[0]) for case in cases),
        "off_again": sum(int(case.wrong[1]) for case in cases),
        "off_reference": off_reference,
        "sha256": digest.hexdigest(),
    }


if __name__ == "__main__":
    result = json.dumps(run())
    Path(sys.argv[1], f"rank{launched().rank}.json").write_text(result)
    sys.stdout.flush()
    torch.cuda.synchronize()
    # Destroying the group would wait for graphs that hold its sums.
    os._exit(0)
