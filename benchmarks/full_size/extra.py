"""What the arms are judged by: the link, accelerate's offload, and the unmodified model's tokens.

Shape letters: L layers, E experts, K top-k, N steps.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.full_size.arms import Bench, Mode, free_memory, sharing_groups
from benchmarks.full_size.measure import Run, measure_arms, step_times_ms
from benchmarks.full_size.model import FilledCache, RandomStore, Shape, build_skeleton
from benchmarks.full_size.routing import install_routing
from specmoe_compile.hf.compiled_calls import cache_argument
from specmoe_compile.kernels.gather_experts.op import gather_experts
from specmoe_compile.runtime.experts.formats.expert_format import DOWN_NAME, UP_NAMES
from specmoe_compile.runtime.experts.formats.weight_code import WeightPlanes, dequantise
from specmoe_compile.runtime.experts.module import ExpertsLayer, expert_parameter_names
from specmoe_compile.runtime.store.module_source import restore_experts

_LINK_BYTES = 1 << 30
_REPEATS = 10
_GRAPHED = 10
CHECKED_ARMS = ("resident", "on_demand", "prefetch_no_cache", "cache_25", "specmoe_25")
ACCELERATE_LAYERS = (1, 3)


def measure_link(bench: Bench) -> dict[str, float]:
    """GB/s from host memory to the device: one large copy, K copies of a record, K gathered."""
    top_k = bench.store.top_k
    records = bench.store.layer_records(0)
    large = bench.store.region[: min(_LINK_BYTES, bench.store.region.numel())]
    buffer = torch.empty(large.numel(), dtype=torch.uint8, device=bench.device)
    slots = torch.empty((top_k, records.shape[1]), dtype=torch.uint8, device=bench.device)
    fills = torch.arange(top_k, dtype=torch.int32, device=bench.device)
    count = torch.tensor([top_k], dtype=torch.int32, device=bench.device)

    def copy_each() -> None:
        for slot in range(top_k):
            slots[slot].copy_(records[slot], non_blocking=True)

    moved = slots.numel()
    runs: list[tuple[str, int, Callable[[], object]]] = [
        ("copy_gbps", large.numel(), lambda: buffer.copy_(large, non_blocking=True)),
        ("copy_per_record_gbps", moved, copy_each),
        ("gather_gbps", moved, lambda: gather_experts([records], [slots], fills, fills, count)),
    ]
    if bench.device.type == "cuda":
        gather = runs[-1][2]
        gather()  # compiled before it is captured
        runs.append(("gather_in_graph_gbps", moved * _GRAPHED, _captured(gather, bench.device)))
    return {name: size / _median_s(run, bench.device) / 1e9 for name, size, run in runs}


def _captured(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """A CUDA graph of several runs: without what the host needs for a launch."""
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_GRAPHED):
            run()
    return graph.replay


def _median_s(run: Callable[[], object], device: torch.device) -> float:
    times: list[float] = []
    for repeat in range(_REPEATS + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if repeat:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


@torch.no_grad()
def check_tokens(
    bench: Bench, context: int, *, arms: Sequence[str], modes: Sequence[Mode]
) -> list[dict[str, Any]]:
    """Tokens of the exact arms against the unmodified eager model, with the same routing.

    The model's experts are put back into its modules from the same records; only its routers follow
    the trace, as the arms' do.
    """
    want = _eager_tokens(bench, context)
    rows: list[dict[str, Any]] = []
    for mode in modes:
        for names in sharing_groups(
            arms, mode, experts=bench.store.num_experts[0], top_k=bench.store.top_k
        ):
            for found in measure_arms(bench, names, mode, context, ("trace", "router")):
                rows += [_compared(row, want[routing]) for routing, row in found.items()]
    return rows


def _compared(row: dict[str, Any], want: Sequence[int]) -> dict[str, Any]:
    got = row.get("tokens")
    differing = None if got is None else sum(a != b for a, b in zip(got, want, strict=True))
    kept = {name: row[name] for name in ("arm", "mode", "routing", "context")}
    return {
        **kept,
        "tokens": len(want),
        "differing_tokens": differing,
        "not_run": row.get("not_run"),
    }


def restore_float_experts(
    layers: Sequence[ExpertsLayer], store: RandomStore, device: torch.device
) -> None:
    """Give modules their experts back; coded ones as the numbers they stand for, in float32."""
    for layer in layers:
        format = layer.layout.format
        if format.is_plain:
            restore_experts([layer], store, [device] * len(store.layers))
            continue
        turn = bool(layer.module.is_transposed)
        views = layer.layout.bank_views(store.layer_records(layer.index).to(device))
        for name in expert_parameter_names(layer.module):
            value = views[name]
            if name in (*UP_NAMES, DOWN_NAME):
                value = dequantise(WeightPlanes.of(views, name), format.code(name))
                value = value.transpose(1, 2) if turn else value
            parameter = torch.nn.Parameter(value.contiguous(), requires_grad=False)
            layer.module.register_parameter(name, parameter)


def _eager_tokens(bench: Bench, context: int) -> dict[str, list[int]]:
    model, layers = build_skeleton(bench.shape, bench.device, layers=bench.layers)
    restore_float_experts(layers, bench.store, bench.device)
    routing = install_routing(model, layers, bench.tables)
    filled = FilledCache(model.config, context, bench.steps.total, bench.device, bench.shape.dtype)
    run = Run(bench, model, None, routing, filled)
    tokens: dict[str, list[int]] = {}
    for kind in ("trace", "router"):
        run.start(kind == "trace")
        for _ in range(bench.steps.total):
            run.step()
        tokens[kind] = run.tokens
    del model, run, filled
    free_memory(bench.device)
    return tokens


@torch.no_grad()
def measure_accelerate(
    shape: Shape, device: torch.device, context: int, *, layers: int, warm_up: int, timed: int
) -> dict[str, Any]:
    """Hugging Face, eager, experts on the host and moved by accelerate's hooks, layer by layer.

    All experts of a layer move for every token, so the time is linear in the layers: it is measured
    on models of a few layers and scaled to `layers`, and the row says so. What is not an expert
    stays on the device, as in the other arms. Routing does not matter.
    """
    row: dict[str, Any] = {"arm": "accelerate", "mode": "eager", "context": context}
    try:
        import accelerate
    except ImportError:
        return {**row, "not_run": "The package accelerate is not installed."}
    medians: dict[int, float] = {}
    for count in ACCELERATE_LAYERS:
        torch.manual_seed(0)
        with torch.device(device):
            model: Any = AutoModelForCausalLM.from_config(
                shape.configured(count), dtype=shape.dtype
            )
        model.eval().requires_grad_(False)
        for layer in model.model.layers:
            accelerate.cpu_offload(layer.mlp.experts, execution_device=device)
        free_memory(device)
        filled = FilledCache(model.config, context, warm_up + timed, device, shape.dtype)
        medians[count] = statistics.median(_plain_times(model, filled, warm_up, timed, device))
        del model, filled
        free_memory(device)
    few, many = ACCELERATE_LAYERS
    per_layer_ms = (medians[many] - medians[few]) / (many - few)
    return {
        **row,
        "summary": "Hugging Face eager, experts offloaded by accelerate",
        "scaled": f"from {few} and {many} layers to {layers}",
        "measured_ms": {str(count): median for count, median in medians.items()},
        "tpot_ms": {"p50": medians[few] + per_layer_ms * (layers - few)},
    }


def _plain_times(
    model: Any, filled: FilledCache, warm_up: int, timed: int, device: torch.device
) -> list[float]:
    token = torch.full((1, 1), 2, dtype=torch.int64, device=device)
    kept = cache_argument(model, filled.cache)

    class Step:
        def step(self) -> Tensor:
            filled.hold()
            out = model(token, **kept)
            return out.logits[:, -1].argmax(-1)  # type: ignore[no-any-return]

    step_times_ms(Step(), warm_up, device)
    return step_times_ms(Step(), timed, device)
