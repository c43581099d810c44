"""Compile a stack of MoE blocks with the passes, run it, say what the graph cache did.

As `python -m tests.passes.compile_once FACTOR` it prints that as JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from specmoe_compile.passes.manager import SpeculationPass
from specmoe_compile.passes.pass_config import PassConfig
from tests.passes.graphs import RecordingSession, inputs, plain_block, use_session
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
def compile_once(factor: float, session: RecordingSession) -> dict[str, int]:
    """Compile and run once on a session that `use_session` made; returns what is counted."""
    counters.clear()
    speculation = SpeculationPass(PassConfig())
    compile_with(Stack(factor), speculation)(*inputs())
    return {
        "hits": counters["inductor"]["fxgraph_cache_hit"],
        "misses": counters["inductor"]["fxgraph_cache_miss"],
        "passes": len(speculation.reports),
        "prefetches": sum(name == "start" for name, _ in session.events),
    }


class _SetForGood:
    """Stands in for pytest's monkeypatch in a process that ends with the test."""

    setattr: Any = staticmethod(setattr)


if __name__ == "__main__":
    print(json.dumps(compile_once(float(sys.argv[1]), use_session(_SetForGood()))))
