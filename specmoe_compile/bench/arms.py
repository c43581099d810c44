"""The ways of running a model that `specmoe bench` compares.

Each arm loads the same checkpoint in its own way and hands back a model whose `generate` is then
timed. Arms without specmoe run Hugging Face as it comes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specmoe_compile.bench.arm import Arm, LoadedArm
from specmoe_compile.bench.cuda_graphs import fetched_from, with_cuda_graphs
from specmoe_compile.bench.hf_arms import (
    device_of,
    load_accelerate,
    load_accelerate_auto,
    load_accelerate_cpu,
    load_eager,
    load_eager_loop,
    load_mmap,
)
from specmoe_compile.bench.llama_cpp_arm import load_llama_cpp
from specmoe_compile.bench.records import ArmJob
from specmoe_compile.system.launched import split_of_ranks

_NO_PREFETCH: Mapping[str, Any] = {"prefetch": False}


def _load_specmoe(job: ArmJob, arm: Arm, expert_cache: str | int, store: str) -> LoadedArm:
    import torch

    import specmoe_compile
    from specmoe_compile.hf.ranks import device_of_rank, join_named_group

    # options that are not valid should fail before minutes of loading
    options = {**(arm.options or {}), **job.options}
    specmoe_compile.CompileOptions.from_kwargs(options)
    split: dict[str, Any] = {}
    if job.group is not None:
        split = split_of_ranks()
        join_named_group(job.group, device_of_rank(torch.device(device_of(job))))
    inner = specmoe_compile.from_pretrained(
        job.model,
        device=job.device,
        dtype=job.dtype,
        quantize=job.quantize,
        store=job.store or store,  # type: ignore[arg-type]
        expert_cache=expert_cache,
        store_dir=job.store_dir,
        missing_weights=job.missing_weights,  # type: ignore[arg-type]
        progress=False,
        **split,
    )
    stats = specmoe_compile.stats(inner)
    options = with_cuda_graphs(
        options, device=inner.device, store=fetched_from(inner), kv_cache=job.kv_cache
    )
    model: Any = torch.compile(inner, backend="specmoe", options=options)
    kept = stats.store_bytes if expert_cache == "100%" else stats.fast_tier_bytes
    return LoadedArm(
        model=model,
        inner=inner,
        fast_tier_bytes=kept,
        read_stats=lambda: specmoe_compile.stats(inner, all_ranks=True),
        notes=[f"store on {stats.store}, {stats.store_bytes} bytes; options {options}"],
    )


def _load_on_demand(job: ArmJob, arm: Arm) -> LoadedArm:
    loaded = _load_specmoe(job, arm, 0, "disk" if device_of(job) == "cpu" else "ram")
    loaded.notes.append("no expert cache: every expert is fetched for every token")
    return loaded


def _load_cache(job: ArmJob, arm: Arm) -> LoadedArm:
    return _load_specmoe(job, arm, job.expert_cache, "disk" if device_of(job) == "cpu" else "ram")


def _load_resident(job: ArmJob, arm: Arm) -> LoadedArm:
    return _load_specmoe(job, arm, "100%", "ram")


ARMS: Mapping[str, Arm] = {
    "eager": Arm(
        capped=False,
        load=load_eager,
    ),
    "eager_loop": Arm(
        capped=False,
        load=load_eager_loop,
    ),
    "accelerate": Arm(
        load=load_accelerate,
    ),
    "accelerate_auto": Arm(
        load=load_accelerate_auto,
    ),
    "accelerate_cpu": Arm(
        capped=False,
        load=load_accelerate_cpu,
    ),
    "mmap": Arm(
        load=load_mmap,
    ),
    "llama_cpp": Arm(
        load=load_llama_cpp,
        uses_torch=False,
    ),
    "on_demand": Arm(
        policy="exact",
        load=_load_on_demand,
        options=_NO_PREFETCH,
    ),
    "cache": Arm(
        policy="exact",
        load=_load_cache,
        options=_NO_PREFETCH,
    ),
    "prefetch": Arm(
        policy="exact",
        load=_load_on_demand,
        options={"prefetch": True},
    ),
    "specmoe": Arm(
        policy="exact",
        load=_load_cache,
        options={},
    ),
    "default_vector": Arm(
        policy="default_vector",
        load=_load_cache,
        options={"policy": "default_vector"},
    ),
    "commit": Arm(
        policy="commit",
        load=_load_cache,
        options={"policy": "commit"},
    ),
    "resident": Arm(
        policy="exact",
        capped=False,
        load=_load_resident,
        options=_NO_PREFETCH,
    ),
}


def checked_arms(names: str) -> list[str]:
    """Split a comma-separated list of arms; raises `ValueError` naming the valid ones."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise ValueError(f"--arms names no arm: choose from {', '.join(ARMS)}.")
    for name in wanted:
        if name not in ARMS:
            raise ValueError(f"There is no arm {name!r}: choose from {', '.join(ARMS)}.")
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"--arms={names!r} names an arm twice.")
    return wanted
