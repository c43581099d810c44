"""Experts in slots of the fast tier: hits are computed at once, misses are read meanwhile.

Shape letters: E experts, L MoE layers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from typing import NamedTuple

from torch import Tensor

from specmoe_compile.runtime.cache.double_buffers import DoubleBuffers
from specmoe_compile.runtime.cache.marks import ExpertMarks
from specmoe_compile.runtime.cache.slot_table import CachePlan, ExpertCache
from specmoe_compile.runtime.cache.statistics import LayerStats
from specmoe_compile.runtime.cpu.experts import ExpertRunner
from specmoe_compile.runtime.cpu.memory import SlotMemory, StagingRing
from specmoe_compile.runtime.cpu.residency import Residency, Step
from specmoe_compile.runtime.experts.formats.expert_format import ExpertTensors
from specmoe_compile.runtime.store.base import ExpertStore
from specmoe_compile.runtime.transfer.base import (
    CANCELLED,
    DONE,
    NOTHING_ISSUED,
    Issued,
    Read,
    Ticket,
    Transfer,
)
from specmoe_compile.runtime.transfer.disk import raise_unless_done
from specmoe_compile.system.nvtx import layer_range

_STALLS_KEPT = 32


class _InFlight(NamedTuple):
    """A read into a slot that nobody has waited for yet."""

    read: Read
    ticket: Ticket
    speculative: bool


class CachedResidency(Residency):
    """Experts in slots, filled by a transfer; those without a slot go through a staging ring."""

    def __init__(
        self,
        store: ExpertStore,
        table: ExpertCache | DoubleBuffers,
        memory: SlotMemory,
        staging: StagingRing,
        transfer: Transfer,
        runners: Sequence[ExpertRunner],
        stats: Sequence[LayerStats],
    ) -> None:
        """Tie the parts together; none is owned."""
        self.fast_tier_bytes = memory.total_bytes + staging.total_bytes
        self.table = table
        self.transfer = transfer
        self._memory = memory
        self.staging = staging
        # Records that a plan bypasses stay in the ring for a while.
        self._reuses = isinstance(table, ExpertCache) and table.spare > 0
        self._runners = runners
        self._stats = stats
        self._record_bytes = [layout.record_bytes for layout in store.layouts]
        # By bank and slot: no slot is given away while something reads into it, and layers that
        # share a bank share its slots.
        self._in_flight: list[dict[int, _InFlight]] = [{} for _ in range(max(memory.bank_of) + 1)]
        # Prefetched experts that no step has used yet.
        self._unused = [ExpertMarks(experts) for experts in store.num_experts]
        # Experts that a useless guess pushed out, until they are read again.
        self._pushed_out = [ExpertMarks(experts) for experts in store.num_experts]
        # Begin and end of the last waits, as far back as a prediction may have begun.
        self._stalls: deque[tuple[float, float]] = deque(maxlen=_STALLS_KEPT)

    def now_s(self) -> float:
        return self.transfer.now_s()

    def address(self, layer: int) -> int:
        return self._memory.address(layer)

    def is_busy(self, layer: int) -> bool:
        return bool(self._in_flight[self._memory.bank_of[layer]])

    def marks(self, layer: int) -> tuple[bytearray, bytearray]:
        return self._unused[layer].flags, self._pushed_out[layer].flags

    def set_poison(self, on: bool) -> None:
        """Fill every slot and buffer with NaNs before it is given to another expert; for tests."""
        self._memory.poison = on
        self.staging.poison = on

    def begin(self, layer: int, experts: Sequence[int], *, prompt: Tensor | None = None) -> Step:
        stats = self._stats[layer]
        in_flight = self._in_flight[self._memory.bank_of[layer]]
        if in_flight:
            self.settle(layer, set(experts))
        pinned = in_flight.keys()
        if prompt is None:
            plan = self.table.plan(layer, experts, pinned_slots=pinned)
        else:
            plan = self.table.plan_prompt(layer, experts, prompt.numpy(), pinned_slots=pinned)
        step = Step(layer)
        if self._unused[layer]:
            self._count_use(layer, plan)
        for expert, slot in plan.hits:
            entry = in_flight.get(slot)
            if entry is None:
                step.ready.append((expert, self._memory.weights(layer, slot)))
            else:
                step.waiting[expert] = entry.read
                step.places[expert] = slot
                stats.late_prefetches += entry.speculative
        bypassed = self._not_held(step, plan.bypassed)
        stats.steps += 1
        stats.hits += len(plan.hits) + len(step.reused)
        if plan.fills or bypassed:
            misses = len(plan.fills) + len(bypassed)
            stats.misses += misses
            stats.demand_bytes += misses * self._record_bytes[layer]
            if self._pushed_out[layer]:
                read = {*bypassed, *(expert for expert, _ in plan.fills)}
                self._count_pushed_out(layer, read)
            with layer_range(layer, "fetch"):
                self._fill(step, plan.fills)
                step.deferred.extend(bypassed)
                self._stage(step)
        return step

    def next_or_none(self, step: Step, *, block: bool) -> tuple[int, ExpertTensors] | None:
        self._release_consumed(step)
        if not step.waiting:
            return None
        read = self._arrived_or_none(step) if not block else None
        if read is None:
            if not block:
                return None
            started_s = self.now_s()
            read = self.transfer.wait_any(step.waiting.values())
            ended_s = self.now_s()
            self._stats[step.layer].stall_ms += (ended_s - started_s) * 1e3
            self._stalls.append((started_s, ended_s))
        expert = read.expert
        del step.waiting[expert]
        self._stats[step.layer].stall_bytes += self._stalled_bytes(read)
        slot = step.places.pop(expert, None)
        if slot is None:
            raise_unless_done(read)
            return expert, self._runners[step.layer].weights(read.destination)
        self._in_flight[self._memory.bank_of[step.layer]].pop(slot, None)
        if read.state != DONE:
            self.table.forget(step.layer, expert)
            raise_unless_done(read)
        return expert, self._memory.weights(step.layer, slot)

    def finish(self, step: Step) -> None:
        for expert, (buffer, ticket) in step.staged.items():
            self.transfer.cancel(ticket, (expert,))
            self.staging.abandon(buffer)
        step.staged.clear()
        self._release_reused(step)
        step.waiting.clear()
        step.deferred.clear()
        step.ready.clear()
        if isinstance(self.table, DoubleBuffers):
            self.table.release(step.layer)
            wasted = len(self._unused[step.layer]) * self._record_bytes[step.layer]
            self._stats[step.layer].wasted_speculative_bytes += wasted
            self._unused[step.layer].clear()

    def absent(self, layer: int, experts: Sequence[int]) -> list[int]:
        return [expert for expert in experts if self.table.slot(layer, expert) < 0]

    def prefetch(
        self,
        layer: int,
        experts: Sequence[int],
        *,
        predicted: Sequence[int],
        budget_bytes: int | None,
    ) -> Issued:
        in_flight = self._in_flight[self._memory.bank_of[layer]]
        if in_flight:
            self.settle(layer, set(predicted))
        missing = [expert for expert in experts if not self._has(layer, expert)]
        size_bytes = self._record_bytes[layer]
        if budget_bytes is not None:
            missing = missing[: budget_bytes // size_bytes]
        if not missing:
            return NOTHING_ISSUED
        # The predicted experts that are there must not make room for those that are not.
        pinned = {*in_flight, *(self.table.slot(layer, expert) for expert in predicted)}
        plan = self.table.plan(layer, missing, pinned_slots=pinned, speculative=True)
        if self._unused[layer]:
            self._count_use(layer, plan)
        if not plan.fills:
            return Issued({}, plan.evicted)
        if self._pushed_out[layer]:
            self._count_pushed_out(layer, {expert for expert, _ in plan.fills})
        requests = [(e, self._memory.record(layer, slot)) for e, slot in plan.fills]
        ticket = self.transfer.start(layer, requests, speculative=True)
        for expert, slot in plan.fills:
            in_flight[slot] = _InFlight(ticket.reads[expert], ticket, True)
            self._unused[layer].add(expert)
        stats = self._stats[layer]
        stats.prefetches += len(plan.fills)
        stats.speculative_bytes += len(plan.fills) * size_bytes
        return Issued(ticket.reads, plan.evicted)

    def _has(self, layer: int, expert: int) -> bool:
        """Whether a step that wants the expert now reads nothing for it."""
        if self.table.slot(layer, expert) >= 0:
            return True
        return self._reuses and self.staging.places.find(layer, expert) >= 0

    def _stalled_s(self, start_s: float, end_s: float) -> float:
        """Return for how much of a time the caller had nothing to do but wait."""
        stalled_s = 0.0
        for start, end in reversed(self._stalls):  # in order of time
            if end <= start_s:
                break
            stalled_s += max(0.0, min(end_s, end) - max(start_s, start))
        return stalled_s

    def note_pushed_out(self, layer: int, experts: Sequence[int]) -> None:
        self._pushed_out[layer].update(experts)

    def settle(self, layer: int, wanted: Collection[int]) -> None:
        in_flight = self._in_flight[self._memory.bank_of[layer]]
        for slot, entry in list(in_flight.items()):
            read = entry.read
            if not read.final:
                if read.layer == layer and read.expert in wanted:
                    self.transfer.promote(read)
                else:
                    self.transfer.cancel(entry.ticket, (read.expert,))
            if read.final:
                del in_flight[slot]
                if read.state != DONE:
                    self._drop(slot, entry)

    def _drop(self, slot: int, entry: _InFlight) -> None:
        """Forget an expert whose read brought nothing, and take its bytes off the books."""
        layer, expert = entry.read.layer, entry.read.expert
        if self.table.slot(layer, expert) == slot:
            # A read that never began left the slot as it was, unless it was poisoned.
            if entry.read.state == CANCELLED and entry.speculative and not self._memory.poison:
                self._pushed_out[layer].discard(self.table.take_back(layer, expert))
            else:
                self.table.forget(layer, expert)
        stats = self._stats[layer]
        if entry.speculative:
            self._unused[layer].discard(expert)
            stats.speculative_bytes -= self._record_bytes[layer]
            stats.cancelled_prefetches += entry.read.state == CANCELLED
        else:
            stats.demand_bytes -= self._record_bytes[layer]

    def _count_use(self, layer: int, plan: CachePlan) -> None:
        """Book prefetched experts that a step uses, and those that lose their slot unused."""
        stats, unused, size_bytes = (
            self._stats[layer],
            self._unused[layer],
            self._record_bytes[layer],
        )
        for expert, _ in plan.hits:
            if expert in unused:
                unused.remove(expert)
                stats.useful_speculative_bytes += size_bytes
        for expert in plan.evicted:
            if expert in unused:
                unused.remove(expert)
                stats.wasted_speculative_bytes += size_bytes

    def _count_pushed_out(self, layer: int, experts: set[int]) -> None:
        """Book those of the experts, which are read now, that useless guesses had pushed out."""
        again = self._pushed_out[layer] & experts
        self._pushed_out[layer] -= again
        self._stats[layer].pushed_out_bytes += len(again) * self._record_bytes[layer]

    def _stalled_bytes(self, read: Read) -> int:
        """Bytes of a read that came while the caller waited, as if it had run evenly."""
        duration_s = read.finished_s - read.started_s
        if read.state != DONE or duration_s <= 0:
            return 0
        stalled_s = self._stalled_s(read.started_s, read.finished_s)
        return round(read.destination.numel() * stalled_s / duration_s)

    def _fill(self, step: Step, fills: Sequence[tuple[int, int]]) -> None:
        """Read misses into their slots."""
        if not fills:
            return
        layer = step.layer
        requests = [(expert, self._memory.record(layer, slot)) for expert, slot in fills]
        try:
            ticket = self.transfer.start(layer, requests)
        except BaseException:
            # The table already says that they are there.
            for expert, _ in fills:
                self.table.forget(layer, expert)
            raise
        in_flight = self._in_flight[self._memory.bank_of[layer]]
        for expert, slot in fills:
            read = ticket.reads[expert]
            in_flight[slot] = _InFlight(read, ticket, False)
            step.waiting[expert] = read
            step.places[expert] = slot

    def _not_held(self, step: Step, bypassed: Sequence[int]) -> list[int]:
        """Make those ready that the ring holds from an earlier step; return the others."""
        if not self._reuses:
            return list(bypassed)
        missing: list[int] = []
        for expert in bypassed:
            held = self.staging.held_or_none(step.layer, expert)
            if held is None:
                missing.append(expert)
                continue
            buffer, record = held
            step.reused.append(buffer)
            step.ready.append((expert, self._runners[step.layer].weights(record)))
        return missing

    def _stage(self, step: Step) -> None:
        """Read experts that got no slot into staging buffers, as many as there are."""
        while step.deferred:
            taken = self.staging.acquire_or_none(step.layer, step.deferred[0])
            if taken is None:
                if not step.waiting and not step.staged and not step.reused:
                    self._wait_for_staging()
                    continue
                return
            buffer, record = taken
            expert = step.deferred.popleft()
            try:
                ticket = self.transfer.start(step.layer, [(expert, record)])
            except BaseException:
                self.staging.abandon(buffer)
                raise
            self.staging.lend(buffer, ticket.reads[expert])
            step.staged[expert] = (buffer, ticket)
            step.waiting[expert] = ticket.reads[expert]

    def _wait_for_staging(self) -> None:
        """Block until a buffer that an abandoned step left behind is free."""
        self.transfer.wait_any(self.staging.busy_reads())

    def _release_consumed(self, step: Step) -> None:
        """Give back the staging buffers whose experts were taken, and read the next ones."""
        if not step.staged and not step.reused:
            return
        self._release_reused(step)
        for expert in [expert for expert in step.staged if expert not in step.waiting]:
            self.staging.release(step.staged.pop(expert)[0])
        self._stage(step)

    def _release_reused(self, step: Step) -> None:
        for buffer in step.reused:
            self.staging.release(buffer)
        step.reused.clear()

    def _arrived_or_none(self, step: Step) -> Read | None:
        return next((read for read in step.waiting.values() if read.final), None)
