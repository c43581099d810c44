"""One rank: generates with offloaded experts beside a reference, and returns what it saw.

A scenario is a dictionary: `name`, `ranks`, `checkpoint`, `store_dir`, and what differs from the
defaults below; or it has the arguments of a `command` of the command line. It is run by
`tests.ranks.launch`, or by torchrun: `worker.py SCENARIO OUT`.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import specmoe_compile
from specmoe_compile.backend import specmoe
from specmoe_compile.cli import main
from specmoe_compile.hf import placing
from specmoe_compile.hf.attach import session_of
from specmoe_compile.hf.replayed_steps import Replay
from specmoe_compile.passes import manager
from specmoe_compile.runtime.cuda import inboxes
from tests.helpers import prompts_left_to_the_model

DEFAULTS: dict[str, Any] = {
    "load": {},  # more arguments of from_pretrained
    "load_rank_1": {},  # the same, of rank 1 only
    "compile": {"lowering": "eager"},  # options of torch.compile; None: run eagerly
    "by_name": False,  # the backend is named, and its graphs are not looked at
    "static": True,  # the cache of keys and values
    "batch": 1,
    "sample": False,
    "new_tokens": 10,
    "dies_at_read": 0,  # rank 1 ends itself when it reads for the nth time
    "other_prompt": False,  # rank 1 generates from another prompt
    "other_store": False,  # rank 1 has a folder of its own
    "inboxes_on_cpu": False,  # sums in one shot, by what the op does on a CPU
    "reference": "plain",  # or "one_rank": specmoe in one process, with the same arguments
}


def run(scenario: dict[str, Any]) -> dict[str, Any]:
    """Load, compile, generate; or run a command of the command line."""
    if "command" in scenario:
        with prompts_left_to_the_model():
            return {"status": main.run(scenario["command"])}
    ask = {**DEFAULTS, **scenario}
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    load = {
        "device": "cpu",
        "dtype": "float32",
        "store": "disk",
        "store_dir": ask["store_dir"],
        "expert_cache": 0,
        "progress": False,
        **ask["load"],
    }
    if rank == 1:
        load.update(ask["load_rank_1"])
    if rank == 1 and ask["other_store"]:
        load["store_dir"] += ".other"
    packed: list[bool] = []
    pack_source = placing.pack_source

    def noted_pack(*args: Any, **kwargs: Any) -> Any:
        report = pack_source(*args, **kwargs)
        packed.append(not report.reused)
        return report

    placing.pack_source = noted_pack
    split = {"tp_size": size, "ep_size": size}
    model = specmoe_compile.from_pretrained(ask["checkpoint"], distributed_config=split, **load)
    reads = note_reads(model, ask["dies_at_read"] if rank == 1 else 0)
    sums: list[int] = []
    one_shot = note_one_shot_sums()
    if ask["inboxes_on_cpu"]:
        inboxes._open = lambda name, group, device: inboxes._first(inboxes._gather(None, group))

    def counting(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        sums.append(sum("all_reduce" in str(node.target) for node in gm.graph.nodes))
        return specmoe(gm, inputs, options=ask["compile"])

    replayed = note_replays()
    compiled: Any = model
    if ask["compile"] is not None:
        named = {"backend": "specmoe", "options": ask["compile"]}
        compiled = torch.compile(model, **(named if ask["by_name"] else {"backend": counting}))
    torch.manual_seed(7 + rank * ask["sample"])
    if ask["other_prompt"] and rank == 1:
        ask["batch"] += 1
    with prompts_left_to_the_model() if ask["by_name"] else nullcontext():
        tokens = generate(compiled, ask)
    found = {
        "tokens": tokens,
        "sums": sums,
        "one_shot": max(one_shot, default=0),
        "replayed": sum(replayed),
        "inboxes": {name: why for name, (_, why) in inboxes._decided.items()},
        "breaks": dict(counters["graph_break"]),
        "cudagraph_skips": counters["inductor"]["cudagraph_skips"],
        "reads": reads,
        "packed": packed,
        "split_weights": sum(
            isinstance(weight, DTensor)
            for name, weight in model.named_parameters()
            if ".experts." not in name
        ),
        "own": list(session_of(model).store.num_experts),
        "stats": specmoe_compile.stats(model).as_dict(),
        "stats_of_all": specmoe_compile.stats(model, all_ranks=True).as_dict(),
    }
    torch._dynamo.reset()
    torch.manual_seed(7)
    if ask["reference"] == "plain":
        plain = AutoModelForCausalLM.from_pretrained(ask["checkpoint"], dtype=torch.float32)
        found["expected"] = generate(plain.eval().to(model.device), ask)
        return found
    placing.pack_source = pack_source
    load["store_dir"] += ".one"
    if rank == 0:  # nobody has to wait for it
        one = specmoe_compile.from_pretrained(ask["checkpoint"], **load)
        other: Any = one
        if ask["compile"] is not None:
            other = torch.compile(one, backend="specmoe", options=ask["compile"])
        found["expected"] = generate(other, ask)
        found["stats_of_one"] = specmoe_compile.stats(one).as_dict()
    return found


def note_replays() -> list[int]:
    """A one for each step that calls its graph without Dynamo."""
    noted: list[int] = []
    run_again = Replay.run

    def counting(self: Replay, arguments: Any) -> Any:
        noted.append(1)
        return run_again(self, arguments)

    Replay.run = counting  # type: ignore[method-assign]
    return noted


def note_one_shot_sums() -> list[int]:
    """How many sums of each graph that is rewritten are in one shot."""
    noted: list[int] = []
    run_passes = manager.run_passes

    def counting(*args: Any, **kwargs: Any) -> Any:
        report = run_passes(*args, **kwargs)
        noted.append(report.matches.get("replace_sums", 0))
        return report

    manager.run_passes = counting
    return noted


def note_reads(model: Any, dies_at: int) -> list[tuple[int, int]]:
    """Keep layer and expert of each read of the whole store; end this process at one of them."""
    reads: list[tuple[int, int]] = []
    whole = getattr(session_of(model).store, "whole", None)
    if whole is None:
        return reads
    read_into = whole.read_into
    numbers = itertools.count(1)  # several threads read, and each has a number of its own

    def noted(layer: int, expert: int, record: torch.Tensor) -> None:
        reads.append((layer, expert))
        if next(numbers) == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        read_into(layer, expert, record)

    whole.read_into = noted
    return reads


def generate(model: Any, ask: dict[str, Any]) -> list[list[int]]:
    """Tokens of the same prompts for every model."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(2, 60, (ask["batch"], 5), generator=generator).to(model.device)
    kwargs: dict[str, Any] = {
        "max_new_tokens": ask["new_tokens"],
        "do_sample": ask["sample"],
        "pad_token_id": 0,
    }
    if ask["static"]:
        kwargs["cache_implementation"] = "static"
    with torch.no_grad():
        out = model.generate(prompts, attention_mask=torch.ones_like(prompts), **kwargs)
    tokens: list[list[int]] = out.tolist()
    return tokens


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    result = json.dumps(run(given))
    Path(sys.argv[2], f"rank{os.environ['RANK']}.json").write_text(result)
