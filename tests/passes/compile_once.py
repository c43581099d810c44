"""Compile one tiny model with the passes, run it, print what the FX graph cache did as JSON."""

from __future__ import annotations

import json

import torch
from torch._dynamo.utils import counters

import specmoe_compile.ops
from specmoe_compile.passes.manager import SpeculationPass
from specmoe_compile.passes.pass_config import PassConfig
from tests.passes.families import EXPERTS, HIDDEN, compile_with, tiny
from tests.passes.graphs import RecordingSession


@torch.no_grad()
def main() -> None:
    """Run once; the caller sets TORCHINDUCTOR_CACHE_DIR."""
    session = RecordingSession(hidden=HIDDEN, experts=EXPERTS)
    specmoe_compile.ops.get_session = lambda handle: session  # type: ignore[assignment, return-value]
    model, _ = tiny("qwen3_moe", num_hidden_layers=3)
    speculation = SpeculationPass(PassConfig())
    compile_with(model, speculation)(torch.arange(1, 6)[None], use_cache=False)
    found = {
        "hits": counters["inductor"]["fxgraph_cache_hit"],
        "misses": counters["inductor"]["fxgraph_cache_miss"],
        "passes": len(speculation.reports),
        "prefetches": sum(name == "start" for name, _ in session.events),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
