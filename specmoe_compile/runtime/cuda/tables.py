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
        tables: of each layer, views of the common tensors.
        counters: [L, len(COUNTERS)] int64.
        skipped: [L] int64, misses that got a default vector.
        total_bytes: size of the slots.
    """

    def __init__(
        self,
        layouts: Sequence[ExpertLayout],
        num_experts: Sequence[int],
        slots: Sequence[int],
        device: torch.device,
    ) -> None:
        """Reserve device memory for empty slots."""
        layers, max_experts, max_slots = len(slots), max(num_experts), max(slots)
        self.slots = tuple(slots)
        self.banks = [
            torch.zeros(count, layout.record_bytes, dtype=torch.uint8, device=device)
            for layout, count in zip(layouts, slots, strict=True)
        ]
        self.total_bytes = sum(bank.numel() for bank in self.banks)

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
