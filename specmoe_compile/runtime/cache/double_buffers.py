"""No cache: the slots of a bank serve one layer step and are then given up.

With B banks, layer l uses bank l % B; while it computes, the bank of the next layer is filled. It
answers like `ExpertCache`, so that the rest of the runtime need not know which one it has.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from specmoe_compile.runtime.cache.eviction import Ids
from specmoe_compile.runtime.cache.slot_table import CachePlan

_NOBODY = -1


class DoubleBuffers:
    """Which expert each slot of each bank holds, until its layer's step is over."""

    def __init__(self, *, bank_of: Sequence[int], slots: Sequence[int]) -> None:
        """Start empty.

        Args:
            bank_of: bank of each layer, [L].
            slots: slots that each layer has in its bank, [L].
        """
        self._bank_of = tuple(bank_of)
        self._slots = tuple(slots)
        banks = max(bank_of) + 1
        self._owner = [_NOBODY] * banks
        self._slot_of: list[dict[int, int]] = [{} for _ in range(banks)]

    def plan(
        self,
        layer: int,
        experts: Sequence[int],
        *,
        pinned_slots: Collection[int] = (),
        bypass: bool = False,
        speculative: bool = False,
    ) -> CachePlan:
        """Find or give slots, see `ExpertCache.plan`.

        A speculative plan gets nothing while another layer owns the bank, and evicts nothing. A
        demand plan takes the bank over: only a step that was abandoned can have left it owned.
        """
        bank = self._bank_of[layer]
        table = self._slot_of[bank]
        wanted = dict.fromkeys(experts)
        if self._owner[bank] != layer:
            if speculative and self._owner[bank] != _NOBODY:
                return CachePlan(hits=[], fills=[], bypassed=list(wanted), evicted=[])
            table.clear()
            self._owner[bank] = layer
        hits = [(expert, table[expert]) for expert in wanted if expert in table]
        taken = {*table.values(), *pinned_slots}
        free = [slot for slot in range(self._slots[layer]) if slot not in taken]
        # A wrong prediction that is there already makes room for a true expert.
        spare = [
            expert
            for expert, slot in table.items()
            if not (speculative or bypass or expert in wanted or slot in pinned_slots)
        ]
        fills: list[tuple[int, int]] = []
        bypassed: list[int] = []
        evicted: list[int] = []
        for expert in wanted:
            if expert in table:
                continue
            if free:
                slot = free.pop(0)
            elif spare:
                evicted.append(spare.pop(0))
                slot = table.pop(evicted[-1])
            else:
                bypassed.append(expert)
                continue
            table[expert] = slot
            fills.append((expert, slot))
        return CachePlan(hits=hits, fills=fills, bypassed=bypassed, evicted=evicted)

    def plan_prompt(
        self,
        layer: int,
        experts: Sequence[int],
        ids: Ids,
        *,
        pinned_slots: Collection[int] = (),
    ) -> CachePlan:
        """Plan a prefill, see `ExpertCache.plan_prompt`; nothing is counted here."""
        return self.plan(layer, experts, pinned_slots=pinned_slots, bypass=True)

    def slot(self, layer: int, expert: int) -> int:
        """Return the slot that holds an expert, -1 if none does."""
        bank = self._bank_of[layer]
        return self._slot_of[bank].get(expert, -1) if self._owner[bank] == layer else -1

    def forget(self, layer: int, expert: int) -> None:
        """Drop an expert whose read failed or was cancelled."""
        bank = self._bank_of[layer]
        if self._owner[bank] == layer:
            self._slot_of[bank].pop(expert, None)

    def take_back(self, layer: int, expert: int) -> int:
        """Undo a speculative fill; nobody had its slot before, see `ExpertCache.take_back`."""
        self.forget(layer, expert)
        return _NOBODY

    def release(self, layer: int) -> None:
        """Give the layer's bank up after its step."""
        bank = self._bank_of[layer]
        if self._owner[bank] == layer:
            self._owner[bank] = _NOBODY
            self._slot_of[bank].clear()
