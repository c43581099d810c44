"""Loading a model with its experts offloaded: `from_pretrained` and `offload`.

The experts go to an expert store (in RAM or on disk), everything else stays an ordinary Hugging
Face model, and a `Session` ties them together.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from transformers import PreTrainedModel

from specmoe_compile.errors import UnsupportedModelError
from specmoe_compile.hf.attach import attach_session
from specmoe_compile.hf.guards import refuse_adapted_experts
from specmoe_compile.hf.missing_weights import MissingWeights
from specmoe_compile.hf.model_loader import (
    Skeleton,
    checked_dtype,
    load_without_experts,
)
from specmoe_compile.hf.offload_options import (
    OffloadOptions,
    StoreKind,
    check_choice,
    checked_options,
)
from specmoe_compile.hf.packing import pack_source
from specmoe_compile.hf.ranks import (
    Ranks,
    device_of_rank,
    join_ranks,
    keep_local_weights,
    ranks_of_or_none,
)
from specmoe_compile.hf.run_ahead import generation_stats, reset_generation_stats
from specmoe_compile.hf.tier_sizes import (
    check_ram,
    check_room,
    choose_cache_bytes,
    choose_store,
    rest_bytes_of,
    total_bytes_of,
)
from specmoe_compile.runtime.cache.eviction import DEFAULT_POLICY, Policy
from specmoe_compile.runtime.cache.statistics import Stats
from specmoe_compile.runtime.cpu.engine import open_session
from specmoe_compile.runtime.experts.layout import StoreLayer
from specmoe_compile.runtime.experts.module import (
    ExpertsLayer,
    find_experts_layers,
    find_top_k,
    release_experts,
)
from specmoe_compile.runtime.session import session_of
from specmoe_compile.runtime.store.base import ExpertStore, RecordSource
from specmoe_compile.runtime.store.header import HEADER_NAME
from specmoe_compile.runtime.store.matching import open_matching, open_packed
from specmoe_compile.runtime.store.module_source import (
    ModuleSource,
    expert_devices,
    move_to_ram,
    restore_experts,
)
from specmoe_compile.runtime.store.quantising_source import QuantisingSource
from specmoe_compile.runtime.store.ram import RamStore
from specmoe_compile.runtime.store.slice import SliceSource, SliceStore
from specmoe_compile.system.compilers import COMPILING_BYTES
from specmoe_compile.system.numa import gpu_node_or_none
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
    if hf_kwargs.get("distributed_config") is not None:
        options = replace(options, device=device_of_rank(options.device))
        if options.device.type == "cuda":
            torch.cuda.set_device(options.device)
        hf_kwargs["distributed_config"] = join_ranks(
            hf_kwargs["distributed_config"], options.device
        )
    placed: list[tuple[Skeleton, ExpertStore, int | None]] = []
    compiling_bytes = 0

    def place_experts(skeleton: Skeleton) -> None:
        ranks = ranks_of_or_none(skeleton.model)
        if ranks is None:
            place(skeleton, None)
            return
        layers = [ranks.own_layer(layer) for layer in skeleton.layers]
        sliced = replace(skeleton, layers=layers)
        with ranks.together("packing the experts"):
            place(sliced, ranks)
        ranks.check_same_store(placed[0][1])

    def place(skeleton: Skeleton, ranks: Ranks | None) -> None:
        nonlocal compiling_bytes
        layers: Sequence[StoreLayer] = [layer.store_layer for layer in skeleton.layers]
        here = 1 if ranks is None else ranks.on_machine  # they share its RAM
        rest_bytes = here * rest_bytes_of(skeleton, options)
        cache_bytes: int | None = choose_cache_bytes(options, layers, skeleton.top_k, rest_bytes)
        kind = choose_store(options, here * total_bytes_of(layers), rest_bytes=rest_bytes)
        if options.device.type == "cpu":
            if kind == "ram":
                cache_bytes = None
            elif options.store == "auto":
                check_room(cache_bytes, rest_bytes)
                compiling_bytes = COMPILING_BYTES
        store_of = _fill_store(skeleton.source, kind, options, ranks)
        placed.append((skeleton, store_of, cache_bytes))

    try:
        with progress_lines(enabled=progress), phase("loading the model"):
            model = load_without_experts(
                path_or_id,
                dtype=checked_dtype(dtype),
                device=options.device,
                hf_options=hf_kwargs,
                place_experts=place_experts,
                missing_weights=missing_weights,
                quantize=options.quantize,
                adapter=adapter,
            )
            _to_device(model, options.device)
            if ranks_of_or_none(model) is not None:
                keep_local_weights(model)
            skeleton, expert_store, cache_bytes = placed[0]
            _attach(model, skeleton.layers, expert_store, cache_bytes, skeleton.top_k, options)
            session_of(model).compiling_bytes = compiling_bytes
    except BaseException:
        for _, opened, _ in placed:
            opened.close()
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
    if type(model).__module__.partition(".")[0] == "peft":
        base: Any = model
        offload(
            base.get_base_model(),
            device=device,
            quantize=quantize,
            store=store,
            expert_cache=expert_cache,
            store_dir=store_dir,
            cache_policy=cache_policy,
            reader_threads=reader_threads,
            verify=verify,
            progress=progress,
        )
        base.eval()
        return model
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
        expert_store = _fill_store(source, kind, options)
        for layer in layers:
            release_experts(layer, options.device)
    try:
        _to_device(model, options.device)
        _attach(model, layers, expert_store, cache_bytes, top_k, options)
    except BaseException:
        with contextlib.closing(expert_store):
            restore_experts(layers, expert_store, devices)
        raise
    return model


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


def _to_device(model: torch.nn.Module, device: torch.device) -> None:
    model.to(device)


def _attach(
    model: PreTrainedModel,
    layers: Sequence[ExpertsLayer],
    store: ExpertStore,
    cache_bytes: int | None,
    top_k: int,
    options: OffloadOptions,
) -> None:
    """Create the session that owns the store, and tie it to the model."""
    if options.device.type == "cuda":
        from specmoe_compile.runtime.cuda.opening import open_device_session

        assert cache_bytes is not None, "only experts that stay on the CPU need no cache"
        session = open_device_session(
            model,
            layers,
            store,
            expert_cache_bytes=cache_bytes,
            cache_policy=options.cache_policy,
            top_k=top_k,
            reader_threads=options.reader_threads,
        )
    else:
        session = open_session(
            layers,
            store,
            expert_cache_bytes=cache_bytes,
            cache_policy=options.cache_policy,
            reader_threads=options.reader_threads,
            top_k=top_k,
        )
    attach_session(model, session)


def _fill_store(
    source: RecordSource,
    kind: Literal["ram", "disk"],
    options: OffloadOptions,
    ranks: Ranks | None = None,
) -> ExpertStore:
    """Open or make the store of a model's experts; with `ranks`, of the part that is this rank's.

    With `kind="ram"` a folder that the caller named is read if it holds this store, never written.
    """
    if kind == "disk":
        report = pack_source(source, options.store_dir, progress=options.progress)
        packed = open_packed(source, report.path, verify=options.verify)
        return packed if ranks is None else SliceStore(packed, ranks.rank, ranks.size)
    whole = source
    if ranks is not None:
        source = SliceSource(whole, ranks.rank, ranks.size)
    check_ram(total_bytes_of(source.layers))
    node = gpu_node_or_none(options.device)
    if options.store_dir is not None and (options.store_dir / HEADER_NAME).exists():
        found: ExpertStore = open_matching(
            whole, options.store_dir, verify=options.verify, progress=options.progress
        )
        if ranks is not None:
            found = SliceStore(found, ranks.rank, ranks.size)
        with contextlib.closing(found):
            return RamStore.from_store(found, progress=options.progress, numa_node=node)
    return RamStore.from_source(source, progress=options.progress, numa_node=node)
