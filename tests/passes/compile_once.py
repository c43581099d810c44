"""Compile a stack of MoE blocks with the passes, run it, print what the graph cache did as JSON."""

from __future__ import annotations

import json
import sys

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import specmoe_compile.ops
from specmoe_compile.passes.manager import SpeculationPass
from specmoe_compile.passes.pass_config import PassConfig
from tests.passes.graphs import RecordingSession, inputs, plain_block
from tests.passes.lowering import compile_with


class Stack(nn.Module):
    """Three blocks, and a factor by which one graph differs from all others."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, r: Tensor, *gates: Tensor) -> Tensor:
        for layer, gate in enumerate(gates):
            r = plain_block(r * self.factor, gate, layer)
        return r


@torch.no_grad()
def main(factor: float) -> None:
    """Run once."""
    session = RecordingSession()
    specmoe_compile.ops.get_session = lambda handle: session  # type: ignore[assignment, return-value]
    speculation = SpeculationPass(PassConfig())
    compile_with(Stack(factor), speculation)(*inputs())
    found = {
        "hits": counters["inductor"]["fxgraph_cache_hit"],
        "misses": counters["inductor"]["fxgraph_cache_miss"],
        "passes": len(speculation.reports),
        "prefetches": sum(name == "start" for name, _ in session.events),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(float(sys.argv[1]))
