"""One rank: sums over ranks are in the compiled graph, and in CUDA graphs on a GPU.

`test_ranks.py` has two ranks' sums in one graph on the CPU; what is here runs on one GPU.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.distributed._functional_collectives import all_reduce
from transformers.distributed import DistributedConfig

import specmoe_compile
from specmoe_compile.backend import specmoe
from specmoe_compile.hf.ranks import ranks_of_or_none
from specmoe_compile.runtime.experts.module import find_experts_layers
from tests.helpers import greedy, prompts, tiny_qwen3_moe
from tests.ranks.groups import needs_expert_parallel
from tests.ranks.launch import free_port

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
SLOW_CPU = pytest.param("cpu", marks=pytest.mark.slow)


@pytest.fixture(params=[SLOW_CPU, GPU])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """A process group of this process alone."""
    kind: str = request.param
    where = f"tcp://127.0.0.1:{free_port()}"
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo", init_method=where, rank=0, world_size=1
    )
    yield kind
    dist.destroy_process_group()


def summed(forward: Any, group: Any) -> Any:
    """Experts whose outputs are added up over the ranks, as transformers adds them up."""
    return lambda *args, **kwargs: all_reduce(forward(*args, **kwargs), "sum", group)


def test_sums_over_ranks_stay_inside_the_graph(device: str) -> None:
    plain: Any = tiny_qwen3_moe().to(device)
    ids = prompts(1, 5).to(device)
    expected = greedy(plain, ids, 12, cache_implementation="static")
    model = copy.deepcopy(plain)
    group = dist.distributed_c10d._get_default_group()
    for layer in find_experts_layers(model):
        layer.module.forward = summed(layer.module.forward, group)
    specmoe_compile.offload(model, device=device, store="ram", expert_cache="50%", progress=False)
    sums: list[int] = []
    options = {"mode": "reduce-overhead"} if device == "cuda" else {"lowering": "eager"}

    def counting(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        sums.append(sum("all_reduce" in str(node.target) for node in gm.graph.nodes))
        return specmoe(gm, inputs, options=options)

    counters.clear()
    compiled = torch.compile(model, backend=counting)
    for _ in range(2):
        assert torch.equal(greedy(compiled, ids, 12, cache_implementation="static"), expected)
    assert not counters["graph_break"]
    assert sums and min(sums) >= len(find_experts_layers(plain))
    if device == "cuda":
        assert counters["inductor"]["cudagraph_skips"] == 0
    assert specmoe_compile.stats(model).total.steps > 0
    specmoe_compile.close(model)


@needs_expert_parallel
@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_configuration_of_one_rank_is_one_process(device: str, tmp_path: Path) -> None:
    plain: Any = tiny_qwen3_moe()
    plain.save_pretrained(tmp_path / "checkpoint")
    plain.to(device)
    ids = prompts(1, 5).to(device)
    model: Any = specmoe_compile.from_pretrained(
        tmp_path / "checkpoint",
        device=device,
        dtype="float32",
        store="disk" if device == "cpu" else "ram",
        store_dir=tmp_path / "store" if device == "cpu" else None,
        expert_cache="50%",
        progress=False,
        distributed_config=DistributedConfig(tp_size=1, ep_size=1),
    )
    assert ranks_of_or_none(model) is None and not dist.is_initialized()
    static = {"cache_implementation": "static"}
    if device == "cpu":
        assert torch.equal(greedy(model, ids, 8, **static), greedy(plain, ids, 8, **static))
    else:
        compiled: Any = torch.compile(
            model, backend="specmoe", options={"mode": "reduce-overhead"}, fullgraph=True
        )
        assert torch.equal(greedy(compiled, ids, 8, **static), greedy(plain, ids, 8, **static))
    own, together = (specmoe_compile.stats(model, all_ranks=every) for every in (False, True))
    assert own.total.steps > 0 and own.as_dict() == together.as_dict()
    specmoe_compile.close(model)
