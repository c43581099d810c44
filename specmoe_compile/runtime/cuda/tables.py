"""The device's half of the expert cache: slots, and tables that kernels read and write.

Tables of all layers are rows of a few [L, ...] tensors, so that their addresses are stable and
statistics come back in one copy. A layer with fewer experts or slots uses the front of its row.

Shape letters: L MoE layers, E experts, S slots, D decays.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specmoe_compile.kernels.plan_cache.op import COUNTERS, CacheTables
from specmoe_compile.runtime.cache.eviction import CANDIDATES, LFU_CANDIDATE, Policy, followed
from specmoe_compile.runtime.experts.layout import ExpertLayout


class DeviceCache:
    """Slots and tables of every layer.

    Attributes:
        slots: S of each layer.
        banks: records of a layer's slots, [S, record_bytes] uint8.
        places: the same memory and what lies behind it up to the spare places, which all layers
            with records of that size share, [.., record_bytes].
        spare: spare places, which hold a step's experts that get no slot.
        spare_from: of each layer, the number of the first one in `places`.
        tables: of each layer, views of the common tensors.
        counters: [L, len(COUNTERS)] int64.
        skipped: [L] int64, misses that got a default vector.
        total_bytes: size of the slots and spare places.
    """

    def __init__(
        self,
        layouts: Sequence[ExpertLayout],
        num_experts: Sequence[int],
        slots: Sequence[int],
        device: torch.device,
        *,
        spare: int = 0,
    ) -> None:
        """Reserve device memory for empty slots, and for spare places of each size of records."""
        layers, max_experts, max_slots = len(slots), max(num_experts), max(slots)
        self.slots = tuple(slots)
        self.spare = spare
        record_bytes = [layout.record_bytes for layout in layouts]
        self.places = _reserve(record_bytes, slots, spare, device)
        pairs = zip(self.places, slots, strict=True)
        self.banks = [places[:own] for places, own in pairs]
        self.spare_from = [len(places) - spare for places in self.places]
        self.total_bytes = sum(bank.numel() for bank in self.banks)
        self.total_bytes += spare * sum(set(record_bytes))

        def rows(width: int, fill: int, dtype: torch.dtype) -> Tensor:
            return torch.full((layers, width), fill, dtype=dtype, device=device)

        slot_of = rows(max_experts, -1, torch.int32)
        expert_of = rows(max_slots, -1, torch.int32)
        # What is emptied together lies together: one launch each. A layer's [D + 1, E] table of
        # scores is the front of a flat row, so that it is contiguous.
        flags = rows(2 * max_slots, 0, torch.int32)
        pending, unused = flags[:, :max_slots], flags[:, max_slots:]
        end = max_slots + CANDIDATES * max_experts
        worth = rows(end + CANDIDATES + 1, 0, torch.int64)
        last_use, scores, regret = worth[:, :max_slots], worth[:, max_slots:end], worth[:, end:]
        regret[:, -1] = LFU_CANDIDATE
        self._regret = regret
        clock = rows(1, 0, torch.int64)
        # A layer with a slot for every expert holds them, in their order, and keeps them.
        for layer, (experts, own) in enumerate(zip(num_experts, slots, strict=True)):
            if own >= experts:
                slot_of[layer, :experts] = torch.arange(experts, device=device)
                expert_of[layer, :experts] = torch.arange(experts, device=device)
        self._empty = ((slot_of, slot_of.clone()), (expert_of, expert_of.clone()))
        self._emptied_to = (
            ((flags, worth), 0),
            ((regret[:, -1:],), LFU_CANDIDATE),
        )
        self.counters = rows(len(COUNTERS), 0, torch.int64)
        self.skipped = rows(1, 0, torch.int64)[:, 0]
        self.tables = [
            CacheTables(
                slot_of=slot_of[layer, :experts],
                expert_of=expert_of[layer, :own],
                last_use=last_use[layer, :own],
                scores=scores[layer, : CANDIDATES * experts].view(CANDIDATES, experts),
                pending=pending[layer, :own],
                unused=unused[layer, :own],
                clock=clock[layer],
                regret=regret[layer],
                counters=self.counters[layer],
            )
            for layer, (experts, own) in enumerate(zip(num_experts, slots, strict=True))
        ]

    def followed(self, policy: Policy) -> tuple[str, ...]:
        """What decides who leaves, of each layer, in words; waits for the device."""
        candidates: list[int] = self._regret[:, -1].tolist()
        return tuple(followed(policy, candidate) for candidate in candidates)

    def forget(self) -> None:
        """Drop what the slots hold, and what experts were worth; statistics stay.

        Layers with a slot for every expert keep them.
        """
        for table, empty in self._empty:
            table.copy_(empty)
        for tables, value in self._emptied_to:
            for table in tables:
                table.fill_(value)  # all layers in one launch

    def reset_counters(self) -> None:
        """Set the statistics to zero; slots keep what they hold."""
        self.counters.zero_()
        self.skipped.zero_()


def _reserve(
    record_bytes: Sequence[int], slots: Sequence[int], spare: int, device: torch.device
) -> list[Tensor]:
    """Zeros for the slots of each layer and, behind them, spare places, [.., record_bytes] uint8.

    Layers with records of one size lie in one region, whose end they share: a kernel reaches a
    spare place from each layer's first slot, by a number like a slot's.
    """
    if spare == 0:
        return [
            torch.zeros(own, size, dtype=torch.uint8, device=device)
            for own, size in zip(slots, record_bytes, strict=True)
        ]
    left = dict.fromkeys(record_bytes, spare)
    for own, size in zip(slots, record_bytes, strict=True):
        left[size] += own
    regions = {
        size: torch.zeros(rows, size, dtype=torch.uint8, device=device)
        for size, rows in left.items()
    }
    places: list[Tensor] = []
    for own, size in zip(slots, record_bytes, strict=True):
        places.append(regions[size][-left[size] :])
        left[size] -= own
    return places
