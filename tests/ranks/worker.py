"""One rank: generates with offloaded experts beside the plain model, and writes what it saw.

Started by torchrun: worker.py CHECKPOINT STORE OUT OPTIONS, where OPTIONS is JSON.
"""

import json
import os
import sys
from pathlib import Path

import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import specmoe_compile
from specmoe_compile.backend import specmoe
from specmoe_compile.runtime.session import session_of

NEW_TOKENS = 10


def main(checkpoint: str, store_dir: str, out: str, options: dict[str, object]) -> None:
    world = int(os.environ["WORLD_SIZE"])
    reads: list[tuple[int, int]] = []
    sums: list[int] = []

    def counting(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        sums.append(sum("all_reduce" in str(node.target) for node in gm.graph.nodes))
        return specmoe(gm, inputs, options=options.get("compile"))

    config = DistributedConfig(tp_size=world, ep_size=world)
    model = specmoe_compile.from_pretrained(
        checkpoint,
        device="cpu",
        store=options.get("store", "disk"),
        store_dir=store_dir if options.get("store", "disk") == "disk" else None,
        expert_cache=options.get("expert_cache", 0),
        distributed_config=config,
        progress=False,
    )
    store = session_of(model).store
    whole = getattr(store, "whole", None)
    if whole is not None:
        read_into = whole.read_into

        def noted(layer: int, expert: int, record: torch.Tensor) -> None:
            reads.append((layer, expert))
            read_into(layer, expert, record)

        whole.read_into = noted
    torch.manual_seed(0)
    prompts = torch.randint(1, 90, (options.get("batch", 1), 5))
    kwargs = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    if options.get("static", True):
        kwargs["cache_implementation"] = "static"
    mask = torch.ones_like(prompts)
    compiled = torch.compile(model, backend=counting)
    tokens = compiled.generate(prompts, attention_mask=mask, **kwargs)
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    expected = plain.generate(prompts, attention_mask=mask, **kwargs)
    stats = specmoe_compile.stats(model).as_dict()
    found = {
        "tokens": tokens.tolist(),
        "expected": expected.tolist(),
        "sums": sums,
        "breaks": dict(counters["graph_break"]),
        "reads": reads,
        "own": list(store.num_experts),
        "stats": stats,
    }
    rank = os.environ["RANK"]
    Path(out, f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:4], json.loads(sys.argv[4]))
