"""How much goes where: the tier of a model's experts, and the size of its expert cache.

Both are choices by default, from the RAM that is free beside the rest of the model; what cannot
fit is refused before anything is written.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Literal

from specmoe_compile.errors import StoreError
from specmoe_compile.hf.model_loader import Skeleton
from specmoe_compile.hf.offload_options import OffloadOptions
from specmoe_compile.runtime.experts.layout import StoreLayer
from specmoe_compile.runtime.store.base import total_bytes_of
from specmoe_compile.system.compilers import COMPILING_BYTES
from specmoe_compile.system.machine import available_ram_bytes
from specmoe_compile.system.sizes import format_bytes, parse_size

logger = logging.getLogger(__name__)

_DEFAULT_CACHE = "25%"
_RAM_SHARE = 0.6  # of the RAM that is free: the rest is for everything else, and for the cache


def check_ram(total_bytes: int) -> None:
    """Raise `StoreError` where experts of so many bytes do not fit the RAM that is free."""
    available = available_ram_bytes()
    if total_bytes > available:
        raise StoreError(
            f"The experts need {format_bytes(total_bytes)} of RAM, {format_bytes(available)} are "
            "free. Use store='disk'."
        )


def rest_bytes_of(skeleton: Skeleton, options: OffloadOptions) -> int:
    """Bytes of RAM that the parameters other than experts will take."""
    if options.device.type != "cpu":
        return 0
    experts = total_bytes_of(skeleton.source.layers)
    every = sum(p.numel() * p.element_size() for p in skeleton.model.parameters())
    return max(every - experts, 0)


def check_room(cache_bytes: int | None, rest_bytes: int) -> None:
    """Raise `StoreError` where not even a store on disk leaves enough RAM for the model.

    Where it leaves too little to compile, that is a warning: the model runs without.
    """
    cache_bytes = cache_bytes or 0
    available = available_ram_bytes()
    needs = (
        f"The model needs {format_bytes(rest_bytes)} of RAM besides its experts,"
        f" {format_bytes(cache_bytes)} for the expert cache and"
        f" {format_bytes(COMPILING_BYTES)} to compile, {format_bytes(available)} are free."
        " Free some RAM, raise the memory limit, give a smaller expert_cache, or try it all the"
        " same with store='disk'."
    )
    if rest_bytes + cache_bytes > available:
        raise StoreError(needs)
    if rest_bytes + cache_bytes + COMPILING_BYTES > available:
        logger.warning("%s Without torch.compile it runs as it is.", needs)


def choose_store(
    options: OffloadOptions, total_bytes: int, *, rest_bytes: int = 0, freed_bytes: int = 0
) -> Literal["ram", "disk"]:
    """Choose the slow tier; "auto" says which one it took.

    Args:
        options: of the load.
        total_bytes: of the experts.
        rest_bytes: RAM that the rest of the model has yet to take.
        freed_bytes: RAM that is given back as the experts move.
    """
    if options.store != "auto":
        return options.store
    taken = rest_bytes + (COMPILING_BYTES if options.device.type == "cpu" else 0)
    available = max(available_ram_bytes() + freed_bytes - taken, 0)
    kind: Literal["ram", "disk"] = "ram" if total_bytes <= _RAM_SHARE * available else "disk"
    logger.info(
        "store='auto' puts %s of experts on %s: %s of RAM are left for them.",
        format_bytes(total_bytes),
        kind,
        format_bytes(available),
    )
    return kind


def choose_cache_bytes(
    options: OffloadOptions, layers: Sequence[StoreLayer], top_k: int, rest_bytes: int = 0
) -> int:
    """Return the expert cache's size; raises `ValueError` if one token's experts do not fit.

    The default is 25 %, less where the cache is in RAM and `_RAM_SHARE` of what `rest_bytes` leave
    free there is less.
    """
    total_bytes = total_bytes_of(layers)
    # A session gives every layer the same number of slots, or as many as it has experts.
    slot_bytes = sum(layer.layout.record_bytes for layer in layers)
    needed = min(top_k, max(layer.num_experts for layer in layers)) * slot_bytes
    if options.expert_cache is None:
        default = parse_size(_DEFAULT_CACHE, total_bytes=total_bytes)
        if options.device.type == "cpu":
            free = available_ram_bytes() - rest_bytes - COMPILING_BYTES
            default = min(default, int(_RAM_SHARE * free))
        return max(needed, default)
    size_bytes = parse_size(options.expert_cache, total_bytes=total_bytes)
    if size_bytes == 0:
        return 0
    if size_bytes >= total_bytes:
        return max(layer.num_experts for layer in layers) * slot_bytes
    if size_bytes < needed:
        percent = math.ceil(1000 * needed / total_bytes) / 10
        raise ValueError(
            f"expert_cache={options.expert_cache!r} is {format_bytes(size_bytes)}, but one token "
            f"uses {top_k} experts in each of {len(layers)} layers, {format_bytes(needed)} in all. "
            f"Give at least {needed} bytes ({percent}% of the experts)."
        )
    return size_bytes
