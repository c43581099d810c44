"""Statistics of a device session, read back from the device in two copies."""

from __future__ import annotations

from collections.abc import Sequence

from specmoe_compile.kernels.plan_cache.op import COUNTERS
from specmoe_compile.runtime.cache.statistics import LayerStats
from specmoe_compile.runtime.cuda.tables import DeviceCache


def layer_stats(cache: DeviceCache, record_bytes: Sequence[int]) -> tuple[LayerStats, ...]:
    """Return each layer's counters; waits for the device. Prefill is not counted."""
    rows: list[list[int]] = cache.counters.tolist()
    skipped: list[int] = cache.skipped.tolist()
    layers: list[LayerStats] = []
    for row, left_out, size_bytes in zip(rows, skipped, record_bytes, strict=True):
        count = dict(zip(COUNTERS, row, strict=True))
        layers.append(
            LayerStats(
                steps=count["steps"],
                hits=count["hits"],
                misses=count["misses"],
                demand_bytes=count["misses"] * size_bytes,
                speculative_bytes=count["prefetches"] * size_bytes,
                useful_speculative_bytes=count["useful_prefetches"] * size_bytes,
                wasted_speculative_bytes=count["wasted_prefetches"] * size_bytes,
                prefetches=count["prefetches"],
                late_prefetches=count["late_prefetches"],
                skipped_experts=left_out,
            )
        )
    return tuple(layers)
