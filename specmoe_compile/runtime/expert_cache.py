"""Which expert each slot of the expert cache holds, and who has to leave: pure Python.

Shape letters: E experts, L MoE layers, S slots per layer.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal


@dataclass(slots=True)
class CachePlan:
    """What one plan decided; the tables say so already.

    hits: (expert, slot) of experts that are there. fills: (expert, slot) to be read now.
    bypassed: experts that get no slot. evicted: experts that lost theirs.
    """

    hits: list[tuple[int, int]] = field(default_factory=list)
    fills: list[tuple[int, int]] = field(default_factory=list)
    bypassed: list[int] = field(default_factory=list)
    evicted: list[int] = field(default_factory=list)


class ExpertCache:
    """Slots of every layer and their replacement."""

    def __init__(
        self,
        *,
        num_experts: Sequence[int],
        slots: Sequence[int],
        policy: Literal["lru", "lfu"] = "lru",
    ) -> None:
        self.slot_of = [[-1] * e for e in num_experts]
        self.expert_of = [[-1] * s for s in slots]
        self.last_use = [[0] * s for s in slots]
        self._clock = [0] * len(slots)
        self.policy = policy

    def slot(self, layer: int, expert: int) -> int:
        """Return the expert's slot, or -1."""
        return self.slot_of[layer][expert]

    def forget(self, layer: int, expert: int) -> None:
        """Free an expert's slot, after a read that failed."""
        slot = self.slot_of[layer][expert]
        if slot >= 0:
            self.slot_of[layer][expert] = -1
            self.expert_of[layer][slot] = -1
            self.last_use[layer][slot] = 0

    def plan(
        self,
        layer: int,
        experts: Sequence[int],
        *,
        pinned_slots: Collection[int] = (),
        bypass: bool = False,
        speculative: bool = False,
    ) -> CachePlan:
        """Find or give slots to `experts`, duplicates folded."""
        slot_of, expert_of, last_use = (
            self.slot_of[layer],
            self.expert_of[layer],
            self.last_use[layer],
        )
        self._clock[layer] += 1
        now = self._clock[layer]
        plan = CachePlan()
        missing: list[int] = []
        taken = set(pinned_slots)
        for expert in dict.fromkeys(experts):
            slot = slot_of[expert]
            if slot < 0:
                missing.append(expert)
                continue
            plan.hits.append((expert, slot))
            taken.add(slot)
            if not speculative:
                last_use[slot] = now
        if not missing:
            return plan
        candidates = sorted(
            (s for s in range(len(expert_of)) if s not in taken), key=lambda s: (last_use[s], s)
        )
        for expert in missing:
            if not candidates or (bypass and expert_of[candidates[0]] >= 0):
                plan.bypassed.append(expert)
                continue
            slot = candidates.pop(0)
            old = expert_of[slot]
            if old >= 0:
                slot_of[old] = -1
                plan.evicted.append(old)
            expert_of[slot], slot_of[expert], last_use[slot] = expert, slot, now
            plan.fills.append((expert, slot))
        return plan
