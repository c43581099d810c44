"""Slots by layer within one budget: given one by one to the layer that gains most hits by it.

A budget is learned from the first half of a text and measured on the second half, the cache
filled by the first in either case.

Shape letters: L MoE layers, E experts, K top-k.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from multiprocessing.pool import Pool
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.simulation.fast_replay import hits

Stream = Sequence[Sequence[int]]
SIZES = (6, 8, 16, 24)
"""Slots per layer on average. With as many as a token has experts there is nothing to give."""
SOURCES = ("own", "joined", "python")
"""Whose first half says how many slots a layer gets; `own` is of each text for itself."""


def share_slots(gains: Sequence[Sequence[int]], least: int, total: int) -> list[int]:
    """Slots of each layer.

    Args:
        gains: by layer, the hits with `least` slots, `least` + 1, and so on.
        least: slots that every layer gets.
        total: slots of all layers together.
    """
    slots = [least] * len(gains)
    queue = [(hits[0] - hits[1], layer) for layer, hits in enumerate(gains) if len(hits) > 1]
    heapq.heapify(queue)
    for _ in range(total - least * len(gains)):
        _, layer = heapq.heappop(queue)
        slots[layer] += 1
        place, own = slots[layer] - least, gains[layer]
        if place + 1 < len(own):
            heapq.heappush(queue, (own[place] - own[place + 1], layer))
    return slots


def halves(job: tuple[Stream, int, Mapping[str, Any]]) -> list[list[int]]:
    """Hits of one layer in the first and the second half, by slots from K to E: [2][E - K + 1]."""
    stream, experts, arm = job
    half = len(stream) // 2
    found = [hits(stream, experts, slots, **arm) for slots in range(len(stream[0]), experts + 1)]
    return [[sum(own[:half]) for own in found], [sum(own[half:]) for own in found]]


def try_budgets(
    streams: Mapping[str, Sequence[Stream]],
    experts: int,
    arms: Mapping[str, Mapping[str, Any]],
    pool: Pool,
) -> list[dict[str, Any]]:
    """Points of hits that a budget by layer gains, by arm, size and source."""
    top_k = len(next(iter(streams.values()))[0][0])
    jobs = [
        (stream, experts, arm)
        for arm in arms.values()
        for layers in streams.values()
        for stream in layers
    ]
    counts = np.array(pool.map(halves, jobs, chunksize=1))
    counts = counts.reshape(len(arms), len(streams), -1, 2, experts - top_k + 1)
    rows = []
    for arm, by_text in zip(arms, counts, strict=True):
        tables = dict(zip(streams, by_text, strict=True))
        for slots in SIZES:
            for source in SOURCES:
                points = {
                    text: 100
                    * _gain(tables[text if source == "own" else source], table, top_k, slots)
                    / _choices(streams[text])
                    for text, table in tables.items()
                    if text != source
                }
                rows.append(
                    {
                        "policy": arm,
                        "slots": slots,
                        "learned_on": source,
                        "points": points,
                        "mean_points": sum(points.values()) / len(points),
                        "worst_points": min(points.values()),
                    }
                )
    return rows


def _gain(learned: NDArray[Any], measured: NDArray[Any], least: int, slots: int) -> int:
    """Hits more than with equal slots, of the second half; [L, 2, E - K + 1] each."""
    shared = share_slots(learned[:, 0].tolist(), least, slots * len(learned))
    layers = np.arange(len(measured))
    own = measured[layers, 1, np.array(shared) - least].sum()
    return int(own - measured[:, 1, slots - least].sum())


def _choices(layers: Sequence[Stream]) -> int:
    """Experts that the second half of a text asks for."""
    return sum(len(wanted) for stream in layers for wanted in stream[len(stream) // 2 :])
