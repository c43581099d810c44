"""Decode on a GPU through the device session: tokens, time, graph capture, host synchronisation.

Part of `benchmarks.hardware.first_run`; alone:

    python -m benchmarks gpu_decode --out decode.json --arms "specmoe 25%" "specmoe 25% copy"

Shape letters: B batch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, StaticCache

import specmoe_compile
from specmoe_compile.bench.machine import provenance
from specmoe_compile.hf.attach import session_of
from specmoe_compile.hf.compiled_calls import _mark_static, cache_argument
from specmoe_compile.reference_model import CHECKPOINT_DIR
from specmoe_compile.system.output import write_json

PROMPT_TOKENS, NEW_TOKENS = 20, 48
WARM_UP_STEPS, TIMED_STEPS, PROFILED_STEPS = 6, 20, 5
ARMS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "on_demand": ("least", {"prefetch": False, "transfer": "gather"}),
    "on_demand copy": ("least", {"prefetch": False, "transfer": "copy"}),
    "prefetch": ("least", {"prefetch": True, "transfer": "gather"}),
    "prefetch copy": ("least", {"prefetch": True, "transfer": "copy"}),
    "cache 25%": ("25%", {"prefetch": False, "transfer": "gather"}),
    "cache 25% copy": ("25%", {"prefetch": False, "transfer": "copy"}),
    "specmoe 25%": ("25%", {"prefetch": True, "transfer": "gather"}),
    "specmoe 25% copy": ("25%", {"prefetch": True, "transfer": "copy"}),
    "specmoe 25% auto": ("25%", {"prefetch": True}),
    "specmoe 25% graph": ("25%", {"prefetch": True, "mode": "reduce-overhead"}),
    "cache 50% graph": ("50%", {"prefetch": False, "mode": "reduce-overhead"}),
    "specmoe 50% graph": ("50%", {"prefetch": True, "mode": "reduce-overhead"}),
    "all slots graph": ("100%", {"prefetch": False, "mode": "reduce-overhead"}),
}


def reference_model(dtype: torch.dtype) -> Any:
    """The trained checkpoint of the repository."""
    model: Any = AutoModelForCausalLM.from_pretrained(CHECKPOINT_DIR, dtype=dtype)
    return model.cuda().eval()


def qwen3_slice(dtype: torch.dtype) -> Any:
    """Four layers of the shape of Qwen3-30B-A3B with random weights; routing is random too."""
    config = Qwen3MoeConfig(  # type: ignore[call-arg]  # head_dim is declared nowhere
        vocab_size=32768,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


MODELS = {"reference": reference_model, "Qwen3-30B-A3B, 4 layers": qwen3_slice}


def prompts(batch: int, vocabulary: int) -> Tensor:
    """Token ids, [B, PROMPT_TOKENS], on the GPU."""
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(
        32, min(120, vocabulary), (batch, PROMPT_TOKENS), generator=generator
    ).cuda()


def generate(model: Any, ids: Tensor) -> Tensor:
    """Greedy continuation, [B, PROMPT_TOKENS + NEW_TOKENS]."""
    tokens: Tensor = model.generate(
        ids,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        cache_implementation="static",
    )
    return tokens


def decode_steps(model: Any, config: Any, ids: Tensor, steps: int) -> Iterator[int]:
    """Prefill, then decode with the host never reading a value; yields before each step.

    Gradients must be off.
    """
    cache = StaticCache(config=config, max_cache_len=PROMPT_TOKENS + steps + 1)
    kept = cache_argument(model, cache)
    token = model(ids, **kept).logits[:, -1:].argmax(-1)
    for step in range(steps):
        _mark_static(cache)
        yield step
        token = model(token, **kept).logits[:, -1:].argmax(-1).clone()


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Raise where PyTorch makes the host wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def profile_steps(
    compiled: Any, config: Any, ids: Tensor, *, host_waits: bool = False
) -> dict[str, Any]:
    """Synchronisations, device-to-host copies and times of decode steps after a warm-up.

    With `host_waits` the steps may synchronise, as those of transfer `copy` do.
    """
    steps = decode_steps(compiled, config, ids, WARM_UP_STEPS + PROFILED_STEPS + TIMED_STEPS + 1)
    for _ in range(WARM_UP_STEPS):
        next(steps)
    times: list[float] = []
    for _ in range(TIMED_STEPS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        with nullcontext() if host_waits else no_synchronisation():
            next(steps)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - started) * 1e3)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED_STEPS):
            next(steps)
    torch.cuda.synchronize()
    names: dict[str, int] = {}
    for event in profiler.events():
        names[event.name] = names.get(event.name, 0) + 1
    return {
        "step_ms": statistics.median(times),
        "graph_launches": names.get("cudaGraphLaunch", 0),
        "device_to_host_copies": sum(n for name, n in names.items() if "DtoH" in name),
        "stream_synchronisations": names.get("cudaStreamSynchronize", 0),
        "profiled_steps": PROFILED_STEPS,
    }


def measure_decode(
    dtype: torch.dtype = torch.float32,
    *,
    arms: Sequence[str] = tuple(ARMS),
    models: Sequence[str] = tuple(MODELS),
) -> list[dict[str, Any]]:
    """Arms on models: tokens against the unmodified model, and decode steps."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_grad_enabled(False)
    rows: list[dict[str, Any]] = []
    for name in models:
        rows += _measure_model(name, dtype, arms)
    return rows


def _measure_model(name: str, dtype: torch.dtype, arms: Sequence[str]) -> list[dict[str, Any]]:
    build = MODELS[name]
    plain = build(dtype)
    ids = prompts(1, plain.config.vocab_size)
    want = generate(plain, ids)
    top_k, layers = plain.config.num_experts_per_tok, plain.config.num_hidden_layers
    rows: list[dict[str, Any]] = []
    for arm in arms:
        cache, options = ARMS[arm]
        torch._dynamo.reset()
        # Offloading takes the model apart: every arm has its own, of the same seed.
        model = build(dtype)
        if cache == "least":
            cache = f"{100 * top_k / plain.config.num_experts:.6f}%"
        specmoe_compile.offload(
            model, device="cuda", store="ram", expert_cache=cache, progress=False
        )
        session: Any = session_of(model)
        for bank in session.engine.cache.banks:
            bank.fill_(
                255
            )  # NaN in every float type: a slot that is read before it is filled shows
        compiled = torch.compile(model, backend="specmoe", options=options)
        got = generate(compiled, ids)
        session.reset_stats()
        torch.cuda.synchronize()
        started = time.perf_counter()
        again = generate(compiled, ids)
        torch.cuda.synchronize()
        token_ms = (time.perf_counter() - started) / NEW_TOKENS * 1e3
        total = specmoe_compile.stats(model).total
        row = {
            "model": name,
            "dtype": str(dtype),
            "arm": arm,
            "transfer": session.engine.transfer,
            "transfer_rates": str(session.engine.transfer_rates)
            if session.engine.transfer_rates
            else None,
            "slots": session.engine.cache.slots[0],
            "differing_tokens": int((got != want).sum() + (again != want).sum()),
            "generate_ms_per_token": token_ms,
            "hit_rate": total.hits / max(1, total.hits + total.misses),
            "demand_bytes_per_step": total.demand_bytes * layers / max(1, total.steps),
            "speculative_bytes_per_step": total.speculative_bytes * layers / max(1, total.steps),
            **profile_steps(
                compiled, model.config, ids, host_waits=session.engine.transfer == "copy"
            ),
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
        specmoe_compile.close(model)
        del model, compiled, session
        torch.cuda.empty_cache()
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print rows; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu_decode",
        description=__doc__.splitlines()[0],
    )
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("this benchmark needs a CUDA device and found none", file=sys.stderr)
        return 2
    warnings.simplefilter("ignore")
    rows = measure_decode(arms=args.arms, models=args.models)
    if args.out is not None:
        result = {
            "schema": 1,
            **provenance(),
            "device": torch.cuda.get_device_name(),
            "seed": 0,
            "decode": rows,
        }
        write_json(args.out, result)
    return 0
