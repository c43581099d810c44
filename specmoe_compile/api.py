"""Loading a model with its experts offloaded: `from_pretrained` and `offload`.

The experts go to an expert store (in RAM or on disk), everything else stays an ordinary Hugging
Face model, and a `Session` ties them together.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from typing import Any, get_args

import torch
from transformers import PreTrainedModel

from specmoe_compile.errors import UnsupportedModelError
from specmoe_compile.hf.attach import attach_session, session_of
from specmoe_compile.hf.guards import refuse_adapted_experts
from specmoe_compile.hf.local_weights import keep_local_weights
from specmoe_compile.hf.missing_weights import MissingWeights
from specmoe_compile.hf.model_loader import checked_dtype, load_without_experts
from specmoe_compile.hf.offload_options import (
    OffloadOptions,
    StoreKind,
    check_choice,
    checked_options,
)
from specmoe_compile.hf.placing import Placed, fill_store, place_experts
from specmoe_compile.hf.ranks import (
    device_of_rank,
    join_ranks,
    ranks_of_or_none,
)
from specmoe_compile.hf.run_ahead import generation_stats, reset_generation_stats
from specmoe_compile.hf.tier_sizes import choose_cache_bytes, choose_store
from specmoe_compile.runtime.cache.eviction import DEFAULT_POLICY, Policy
from specmoe_compile.runtime.cache.statistics import Stats
from specmoe_compile.runtime.cpu.engine import open_session
from specmoe_compile.runtime.experts.module import (
    ExpertsLayer,
    find_experts_layers,
    find_top_k,
    release_experts,
)
from specmoe_compile.runtime.store.base import ExpertStore, RecordSource, total_bytes_of
from specmoe_compile.runtime.store.module_source import (
    ModuleSource,
    expert_devices,
    move_to_ram,
    restore_experts,
)
from specmoe_compile.runtime.store.quantising_source import QuantisingSource
from specmoe_compile.system.progress import phase, progress_lines


def from_pretrained(
    path_or_id: str | os.PathLike[str],
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype | str = "auto",
    quantize: str | None = None,
    store: StoreKind = "auto",
    expert_cache: int | str | None = None,
    store_dir: str | os.PathLike[str] | None = None,
    cache_policy: Policy = DEFAULT_POLICY,
    reader_threads: int = 4,
    verify: bool = False,
    progress: bool = True,
    missing_weights: MissingWeights = "error",
    adapter: str | os.PathLike[str] | None = None,
    **hf_kwargs: Any,
) -> PreTrainedModel:
    """Load a Mixture-of-Experts model with its experts offloaded.

    With `store="disk"` the experts are never all in RAM, not while loading or packing either.

    Args:
        path_or_id: a local folder, or a model's name on the Hugging Face hub; safetensors.
        device: where the model computes: "cpu", "cuda", or "auto" for CUDA where there is one.
        dtype: a torch dtype or its name; "auto" is the checkpoint's. Experts are cast when packed.
        quantize: "int4", "mxfp4", "fp8" or "int8": experts are quantised when they are packed,
            which approximates them (docs/formats.md). None keeps the checkpoint's own numbers.
        store: "ram" or "disk"; "auto" is RAM if the experts fit in 60 % of what is free beside
            the rest of the model, limits of control groups included.
        expert_cache: size of the expert cache in the fast tier: bytes, "2GiB", or "25%" of all
            expert bytes. By default 25 %, less where RAM is short, and at least one token's
            experts. 0 is no cache:
            every expert is fetched when it is used. Experts in RAM that compute on the CPU need
            none, since they are in the fast tier already; the option has no effect then.
        store_dir: folder of the store on disk; by default one under the user's cache folder, named
            after the model and its weights, and used again by the next load. With experts in
            RAM, they are read from it if it holds this model's store, and nothing is written.
        cache_policy: which expert leaves a full cache: "adaptive" (counts that forget, or recency,
            whichever would have missed less lately; on a CPU a missing expert that is worth less
            than all that is there is not kept), "lfu" or "lru".
        reader_threads: threads that read from disk.
        verify: compare all checksums of a store on disk before using it, not only on reading.
        progress: say on standard error what takes longer than two seconds.
        missing_weights: what becomes of weights that the checkpoint lacks: "error", or "random",
            which draws them as transformers does and warns.
        adapter: folder or hub name of a LoRA adapter (PEFT) to merge: into the experts as they are
            packed, into everything else as it is loaded.
        hf_kwargs: options of the Hugging Face loader (`revision`, `cache_dir`, `token`,
            `local_files_only`, `trust_remote_code`, `attn_implementation`, ...) and fields of the
            model's configuration.

    Returns:
        the model in eval mode, frozen, ready for `generate` and `torch.compile`.

    Raises:
        ValueError, TypeError: an option is unknown or not valid, or the cache is too small.
        CheckpointError: files are missing or damaged, or lack weights.
        StoreError: the store cannot be written, or holds something else.
        UnsupportedModelError: the model has no experts that can be offloaded.
    """
    options = checked_options(
        device,
        quantize,
        store,
        expert_cache,
        store_dir,
        cache_policy,
        reader_threads,
        verify,
        progress,
    )
    check_choice("missing_weights", missing_weights, get_args(MissingWeights))
    options = _join_ranks(options, hf_kwargs)
    placed: list[Placed] = []
    try:
        with progress_lines(enabled=progress), phase("loading the model"):
            model = load_without_experts(
                path_or_id,
                dtype=checked_dtype(dtype),
                device=options.device,
                hf_options=hf_kwargs,
                place_experts=lambda skeleton: placed.append(place_experts(skeleton, options)),
                missing_weights=missing_weights,
                quantize=options.quantize,
                adapter=adapter,
            )
            _to_device(model, options.device)
            if ranks_of_or_none(model) is not None:
                keep_local_weights(model)
            _attach(model, placed[0], options)
    except BaseException:
        for one in placed:
            one.store.close()
        raise
    return model


def offload(
    model: PreTrainedModel,
    *,
    device: str | torch.device = "auto",
    quantize: str | None = None,
    store: StoreKind = "auto",
    expert_cache: int | str | None = None,
    store_dir: str | os.PathLike[str] | None = None,
    cache_policy: Policy = DEFAULT_POLICY,
    reader_threads: int = 4,
    verify: bool = False,
    progress: bool = True,
) -> PreTrainedModel:
    """Offload the experts of a model that is already loaded, in place.

    With `store="ram"` each layer's parameters are freed as they are copied; with `store="disk"` all
    at the end, so that a full disk loses nothing. "auto" counts the memory of the parameters, which
    is given back, as free. Arguments, result and errors are those of `from_pretrained`. With
    `quantize=` all parameters are freed at the end in either case. Of a
    `PeftModel` whose adapters leave the experts alone, the base model is offloaded.
    """
    options = checked_options(
        device,
        quantize,
        store,
        expert_cache,
        store_dir,
        cache_policy,
        reader_threads,
        verify,
        progress,
    )
    if type(model).__module__.partition(".")[0] == "peft":
        adapted: Any = model
        _offload(adapted.get_base_model(), options)
        adapted.eval()
    else:
        _offload(model, options)
    return model


def _offload(model: PreTrainedModel, options: OffloadOptions) -> None:
    """Move a loaded model's experts to a store, and tie it to a session."""
    layers = _layers_in_memory(model)
    top_k = find_top_k(model, layers)
    plain = ModuleSource(layers, name=type(model).__name__, top_k=top_k)
    source: RecordSource = plain
    if options.quantize is not None:
        quantising = QuantisingSource(plain, layers, options.quantize)
        source, layers = quantising, list(quantising.experts_layers)
    cache_bytes: int | None = choose_cache_bytes(options, source.layers, top_k)
    total_bytes = total_bytes_of(source.layers)
    in_ram = total_bytes_of(plain.layers) if all(plain.on_cpu) and source is plain else 0
    kind = choose_store(options, total_bytes, freed_bytes=in_ram)
    devices = expert_devices(layers)
    expert_store: ExpertStore
    if kind == "ram" and options.device.type == "cpu":
        cache_bytes = None
    if kind == "ram" and source is plain:
        expert_store = move_to_ram(plain, layers, options.device, progress=options.progress)
    else:
        expert_store = fill_store(source, kind, options)
        for layer in layers:
            release_experts(layer, options.device)
    placed = Placed(layers=layers, top_k=top_k, store=expert_store, cache_bytes=cache_bytes)
    try:
        _to_device(model, options.device)
        _attach(model, placed, options)
    except BaseException:
        with contextlib.closing(expert_store):
            restore_experts(layers, expert_store, devices)
        raise


def _layers_in_memory(model: PreTrainedModel) -> list[ExpertsLayer]:
    """A loaded model's MoE layers; raises `UnsupportedModelError` where their weights are not."""
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if len(places) > 1:
        raise UnsupportedModelError(
            f"The model is spread over {', '.join(sorted(places))} by device_map; load it with "
            "specmoe_compile.from_pretrained instead."
        )
    layers = find_experts_layers(model)
    refuse_adapted_experts(model, layers)
    for layer in layers:
        if any(getattr(layer.module, spec.name).is_meta for spec in layer.layout.tensors):
            raise UnsupportedModelError(
                f"The experts of {layer.name} are not in memory (device_map put them on disk); "
                "load the model with specmoe_compile.from_pretrained instead."
            )
    return layers


def stats(model: torch.nn.Module, *, all_ranks: bool = False) -> Stats:
    """Return what an offloaded model's session did so far.

    Args:
        model: offloaded.
        all_ranks: add up what all ranks did, of a model that is split over several processes. All
            of them must ask, and each gets the sum.

    Raises:
        SpecMoEError: the model is not offloaded, or its session is closed.
    """
    session = session_of(model)
    found = session.stats
    found.generation = generation_stats(session)
    ranks = ranks_of_or_none(model) if all_ranks else None
    return found if ranks is None else Stats.over_ranks(ranks.gather(found))


def reset_stats(model: torch.nn.Module) -> None:
    """Set an offloaded model's counters to zero; the cache keeps what it holds.

    Raises:
        SpecMoEError: the model is not offloaded, or its session is closed.
    """
    session = session_of(model)
    session.reset_stats()
    reset_generation_stats(session)


def close(model: torch.nn.Module) -> None:
    """Close the model's session: reader threads, cache memory, files. The model cannot run then."""
    session_of(model).close()


def _join_ranks(options: OffloadOptions, hf_kwargs: dict[str, Any]) -> OffloadOptions:
    """Join the other processes where the load is split over several: this rank's own options."""
    if hf_kwargs.get("distributed_config") is None:
        return options
    options = replace(options, device=device_of_rank(options.device))
    if options.device.type == "cuda":
        torch.cuda.set_device(options.device)
    hf_kwargs["distributed_config"] = join_ranks(hf_kwargs["distributed_config"], options.device)
    return options


def _to_device(model: torch.nn.Module, device: torch.device) -> None:
    model.to(device)


def _attach(model: PreTrainedModel, placed: Placed, options: OffloadOptions) -> None:
    """Create the session that owns the store, and tie it to the model."""
    if options.device.type == "cuda":
        from specmoe_compile.runtime.cuda.opening import open_device_session

        assert placed.cache_bytes is not None, "only experts that stay on the CPU need no cache"
        session = open_device_session(
            model,
            placed.layers,
            placed.store,
            expert_cache_bytes=placed.cache_bytes,
            cache_policy=options.cache_policy,
            top_k=placed.top_k,
            reader_threads=options.reader_threads,
        )
    else:
        session = open_session(
            placed.layers,
            placed.store,
            expert_cache_bytes=placed.cache_bytes,
            cache_policy=options.cache_policy,
            reader_threads=options.reader_threads,
            top_k=placed.top_k,
        )
    session.compiling_bytes = placed.compiling_bytes
    attach_session(model, session)
