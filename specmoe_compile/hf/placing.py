"""Where a model's experts go as it is loaded: the tier, the size of the cache, the filled store."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from specmoe_compile.hf.model_loader import Skeleton
from specmoe_compile.hf.offload_options import OffloadOptions
from specmoe_compile.hf.packing import pack_source
from specmoe_compile.hf.ranks import Ranks, ranks_of_or_none
from specmoe_compile.hf.tier_sizes import (
    check_ram,
    check_room,
    choose_cache_bytes,
    choose_store,
    rest_bytes_of,
)
from specmoe_compile.runtime.experts.module import ExpertsLayer
from specmoe_compile.runtime.store.base import ExpertStore, RecordSource, total_bytes_of
from specmoe_compile.runtime.store.header import HEADER_NAME
from specmoe_compile.runtime.store.matching import open_matching, open_packed
from specmoe_compile.runtime.store.ram import RamStore
from specmoe_compile.runtime.store.slice import SliceSource, SliceStore
from specmoe_compile.system.compilers import COMPILING_BYTES
from specmoe_compile.system.numa import gpu_node_or_none


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """What a session is opened with.

    Attributes:
        layers: the MoE layers; where several ranks share the experts, this rank's part of them.
        top_k: K, the most experts of a token.
        store: holds the experts of `layers`. Whoever has this object closes it.
        cache_bytes: of the expert cache; None where experts are computed where they lie.
        compiling_bytes: RAM that has to be free when the model is compiled, as `Session` has it.
    """

    layers: Sequence[ExpertsLayer]
    top_k: int
    store: ExpertStore
    cache_bytes: int | None
    compiling_bytes: int = 0


def place_experts(skeleton: Skeleton, options: OffloadOptions) -> Placed:
    """Move the experts of a model whose other weights are still to be read into a store.

    Raises:
        ValueError: the cache is too small.
        StoreError: the store cannot be written or holds something else, or the experts do not fit.
        SpecMoEError: another rank failed.
    """
    ranks = ranks_of_or_none(skeleton.model)
    if ranks is None:
        return _place(skeleton, options, None)
    own = replace(skeleton, layers=[ranks.own_layer(layer) for layer in skeleton.layers])
    with ranks.together("packing the experts"):
        placed = _place(own, options, ranks)
    try:
        ranks.check_same_store(placed.store)
    except BaseException:
        placed.store.close()
        raise
    return placed


def _place(skeleton: Skeleton, options: OffloadOptions, ranks: Ranks | None) -> Placed:
    layers = [layer.store_layer for layer in skeleton.layers]
    here = 1 if ranks is None else ranks.on_machine  # they share its RAM
    rest_bytes = here * rest_bytes_of(skeleton, options)
    cache_bytes: int | None = choose_cache_bytes(options, layers, skeleton.top_k, rest_bytes)
    kind = choose_store(options, here * total_bytes_of(layers), rest_bytes=rest_bytes)
    compiling_bytes = 0
    if options.device.type == "cpu":
        if kind == "ram":
            cache_bytes = None
        elif options.store == "auto":
            check_room(cache_bytes, rest_bytes)
            compiling_bytes = COMPILING_BYTES
    return Placed(
        layers=skeleton.layers,
        top_k=skeleton.top_k,
        store=fill_store(skeleton.source, kind, options, ranks),
        cache_bytes=cache_bytes,
        compiling_bytes=compiling_bytes,
    )


def fill_store(
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
