"""Decode with transfer `copy`: the host reads the ids, plans, and hands records to the copy engine.

This is how the paper fetches ("Speculating Experts", arXiv 2603.19289). The host waits for the true
ids of each layer, so a CUDA graph cannot hold the step. A record is one copy with an event of its
own: the correction waits for its own misses only, and what has arrived meanwhile runs at once.

Predicted ids are not waited for. Their copies are issued a few at a time, whenever the host comes
by and while it waits for true ids, and only while no demanded copy is under way: what has not
started can be cancelled, and leaves no trace in the cache.

Shape letters: T tokens, K top-k, S slots.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from specmoe_compile.errors import SpecMoEError, TransferError
from specmoe_compile.kernels.plan_cache.op import MAX_CHOICES
from specmoe_compile.runtime.cache.eviction import Policy
from specmoe_compile.runtime.cache.slot_table import ExpertCache
from specmoe_compile.runtime.cache.statistics import LayerStats
from specmoe_compile.runtime.cuda.decoder import Decoder, DecodeStep
from specmoe_compile.runtime.cuda.guesses import Guesses
from specmoe_compile.runtime.cuda.parts import DecoderParts
from specmoe_compile.runtime.cuda.prompts import PromptsOnTheirWay
from specmoe_compile.runtime.cuda.supply import Request, Supply
from specmoe_compile.runtime.policy.misses import weak_misses_on_device
from specmoe_compile.system.nvtx import layer_range

GUESSES_IN_FLIGHT = 2
"""Predicted records on the link at once: one moves, the next is ready; no more, since a demanded
record has to wait for them."""


@dataclass(slots=True)
class _Arrival:
    """An expert on its way into a slot.

    Attributes:
        layer, expert, slot: what goes where, a spare place included.
        is_spared: whether that is a spare place, which no table knows.
        stream: that carries it.
        request: of its record.
        event: of its copy; None while the record is being read.
        error: why it could not be read.
    """

    layer: int
    expert: int
    slot: int
    stream: Literal["demand", "prefetch"]
    request: Request
    is_spared: bool = False
    event: Any = None
    error: TransferError | None = None


class CopyDecoder(Decoder):
    """Decodes with the host in the loop."""

    def __init__(self, parts: DecoderParts, supply: Supply, *, policy: Policy) -> None:
        """Tie the parts together, with empty slots.

        Args:
            parts: see `Decoder`.
            supply: where records come from.
            policy: which expert leaves a full cache.
        """
        super().__init__(parts)
        self._supply = supply
        self._new_table: Callable[[], ExpertCache] = lambda: ExpertCache(
            num_experts=parts.num_experts,
            slots=parts.cache.slots,
            policy=policy,
            spare=parts.cache.spare,
        )
        self._table = self._new_table()
        layers = range(len(parts.layouts))
        self._counters = [LayerStats() for _ in layers]
        # Experts on their way into a layer's slots.
        self._in_flight: list[dict[int, _Arrival]] = [{} for _ in layers]
        # Those among them whose records the host does not have yet, in the order of asking.
        self._reading: list[_Arrival] = []
        # Experts that were copied on a guess and not used since.
        self._untouched: list[set[int]] = [set() for _ in layers]
        # Slots of a layer may be written after this event.
        self._last_read = [parts.streams.record("compute")] * len(layers)
        # Spare places may be written after this one.
        self._last_spare_read = self._last_read[0]
        self._prompts = PromptsOnTheirWay(parts.streams)
        self._guesses = Guesses(parts.streams, parts.num_experts)
        self._guesses_in_flight: list[_Arrival] = []
        self._urgent: _Arrival | None = None

    def prefetch(self, layer: int, ids: Tensor, max_records: int = MAX_CHOICES) -> None:
        self._refuse_capture()
        self._cancel(layer)
        self._guesses.add(layer, ids, max_records)
        self.issue_guesses()

    def demand(
        self, layer: int, ids: Tensor, weights: Tensor | None = None, threshold: float = 0.0
    ) -> DecodeStep:
        """Wait for the ids on the host; otherwise as `Decoder.demand`.

        Raises:
            SpecMoEError: a CUDA graph is being captured.
        """
        self._refuse_capture()
        on_host = self._streams.to_host(ids)
        shares = None if weights is None else self._streams.to_host(weights)
        with layer_range(layer, "ids"):
            self._await(self._streams.record("compute"))
        self._prompts.note(self._table, layer, waited=True)
        self._cancel(layer)
        skipped = None
        if shares is not None:
            slot_of = torch.tensor(self._table.slot_of[layer], dtype=torch.int32)
            on_host, left_out, number = weak_misses_on_device(on_host, shares, slot_of, threshold)
            self._counters[layer].skipped_experts += int(number)
            skipped = self._streams.to_device(left_out, ids.device)
        experts = self._num_experts[layer]
        choices = [e if e < experts else -1 for e in on_host.reshape(-1).tolist()]
        awaited = self._plan_demand(layer, choices)
        in_flight, slot_of_expert = self._in_flight[layer], self._table.slot_of[layer]
        spared = {arrival.expert: arrival.slot for arrival in awaited if arrival.is_spared}
        slots = [
            spared.get(expert, slot_of_expert[expert]) if expert >= 0 else -1 for expert in choices
        ]
        is_late = [expert in in_flight or expert in spared for expert in choices]
        places = torch.tensor(
            [
                [-1 if late else slot for slot, late in zip(slots, is_late, strict=True)],
                [slot if late else -1 for slot, late in zip(slots, is_late, strict=True)],
            ],
            dtype=torch.int32,
        )
        present, late = self._streams.to_device(places, ids.device).view(2, *ids.shape).unbind(0)
        return DecodeStep(present, late, skipped, arrivals=awaited)

    def note_prompt(self, layer: int, ids: Tensor) -> None:
        if self._table.policy == "adaptive":
            self._prompts.note(self._table, layer)
            self._prompts.send(layer, ids)

    def wait(self, layer: int, step: DecodeStep) -> None:
        for arrival in step.arrivals:
            self._streams.wait("compute", self._settle(arrival))

    def join(self, layer: int) -> None:
        in_flight = self._in_flight[layer]
        self._copy_what_was_read()
        while self._reading:
            self._supply.block()
            self._copy_what_was_read()
        for arrival in in_flight.values():
            self._streams.wait("compute", arrival.event)
        in_flight.clear()
        self._last_read[layer] = self._streams.record("compute")

    def stats(self) -> tuple[LayerStats, ...]:
        return tuple(counters.copy() for counters in self._counters)

    def followed(self) -> tuple[str, ...]:
        return self._table.followed()

    def reset_stats(self) -> None:
        for counters in self._counters:
            counters.reset()

    def forget(self) -> None:
        for layer in range(len(self._in_flight)):
            self._cancel(layer)
            self.join(layer)
            self._untouched[layer].clear()
        self._prompts.forget()
        self._table = self._new_table()

    def lacked_bytes(self) -> int:
        """What was needed so far and had to be copied, on demand or ahead; host counters."""
        return sum(counters.lacked_bytes for counters in self._counters)

    def issue_guesses(self) -> None:
        """Start copies of predicted records, as far as they are known and the link is free."""
        self._copy_what_was_read()
        while self._guesses and self._link_is_free():
            found = self._guesses.next_or_none()
            if found is None:
                return
            guess, expert = found
            guess.max_records -= self._issue_guess(guess.layer, expert)

    def _slots_were_read(self, layer: int) -> None:
        self._last_read[layer] = self._last_spare_read = self._streams.record("compute")
        self.issue_guesses()

    def _link_is_free(self) -> bool:
        if self._urgent is not None:
            if not self._has_arrived(self._urgent):
                return False
            self._urgent = None
        self._guesses_in_flight = [
            arrival for arrival in self._guesses_in_flight if not self._has_arrived(arrival)
        ]
        return len(self._guesses_in_flight) < GUESSES_IN_FLIGHT

    def _issue_guess(self, layer: int, expert: int) -> int:
        """Start the copy of an expert, if it is absent; returns the number of copies."""
        self._prompts.note(self._table, layer)
        plan = self._table.plan(
            layer, [expert], pinned_slots=self._pinned_slots(layer), speculative=True
        )
        self._count_wasted(layer, plan.evicted)
        for copied, slot in plan.fills:
            self._untouched[layer].add(copied)
            self._guesses_in_flight.append(self._fetch("prefetch", layer, copied, slot))
            self._counters[layer].prefetches += 1
            self._counters[layer].speculative_bytes += self._record_bytes[layer]
        return len(plan.fills)

    def _plan_demand(self, layer: int, choices: Sequence[int]) -> tuple[_Arrival, ...]:
        """Give slots to the experts of a step, and start copying those that are missing.

        Returns:
            Those that are on their way.
        """
        self._take_arrived(layer)
        in_flight, counters = self._in_flight[layer], self._counters[layer]
        wanted = [expert for expert in dict.fromkeys(choices) if expert >= 0]
        if self._cache.slots[layer] < len(set(wanted).union(in_flight)):
            # Slots under transfer are not evicted, and the others would not do.
            self.join(layer)
        awaited = [in_flight[expert] for expert in wanted if expert in in_flight]
        counters.late_prefetches += len(awaited)
        self._table.spare = self._spare_places(layer)
        if self._table.spare:
            self._abandon_spared()
        plan = self._table.plan(layer, wanted, pinned_slots=self._pinned_slots(layer))
        assert len(plan.bypassed) <= self._table.spare, "fits() promises a slot for every choice"
        self._count_wasted(layer, plan.evicted)
        used = self._untouched[layer].intersection(wanted)
        self._untouched[layer] -= used
        with layer_range(layer, "fetch"):
            for expert, slot in plan.fills:
                self._urgent = self._fetch("demand", layer, expert, slot)
                awaited.append(self._urgent)
            for place, expert in enumerate(plan.bypassed, self._cache.spare_from[layer]):
                self._urgent = self._fetch("demand", layer, expert, place, is_spared=True)
                awaited.append(self._urgent)
        record_bytes = self._record_bytes[layer]
        misses = len(plan.fills) + len(plan.bypassed)
        counters.steps += 1
        counters.hits += len(plan.hits)
        counters.misses += misses
        counters.demand_bytes += misses * record_bytes
        counters.useful_speculative_bytes += len(used) * record_bytes
        return tuple(awaited)

    def _abandon_spared(self) -> None:
        """Let no record of a step that was never corrected come to a spare place any more."""
        for arrival in [one for one in self._reading if one.is_spared]:
            self._reading.remove(arrival)
            arrival.request.abandon()
            if self._urgent is arrival:
                self._urgent = None

    def _fetch(
        self,
        stream: Literal["demand", "prefetch"],
        layer: int,
        expert: int,
        slot: int,
        *,
        is_spared: bool = False,
    ) -> _Arrival:
        """Ask for a record that goes to a slot, and start copying it if the host has it."""
        request = self._supply.request(layer, expert, speculative=stream == "prefetch")
        arrival = _Arrival(layer, expert, slot, stream, request, is_spared)
        if not is_spared:
            self._in_flight[layer][expert] = arrival
        self._reading.append(arrival)
        self._copy_what_was_read()
        return arrival

    def _copy_what_was_read(self) -> None:
        """Start the copies of records that the host has, once their slots have no reader."""
        for arrival in list(self._reading):
            record = self._record_or_none(arrival)
            if record is None:
                continue
            self._reading.remove(arrival)
            last_read = self._last_read[arrival.layer]
            self._streams.wait(
                arrival.stream, self._last_spare_read if arrival.is_spared else last_read
            )
            slot = self._cache.places[arrival.layer][arrival.slot]
            with self._streams.on(arrival.stream):
                slot.copy_(record, non_blocking=True)
            arrival.event = self._streams.record(arrival.stream)
            arrival.request.copied(arrival.event)

    def _record_or_none(self, arrival: _Arrival) -> Tensor | None:
        """Return a record that was read; one that could not be is kept for who needs it."""
        try:
            return arrival.request.record_or_none()
        except TransferError as error:
            self._reading.remove(arrival)
            if not arrival.is_spared:
                del self._in_flight[arrival.layer][arrival.expert]
                self._untouched[arrival.layer].discard(arrival.expert)
                self._table.forget(arrival.layer, arrival.expert)
            arrival.error = error
            return None

    def _settle(self, arrival: _Arrival) -> Any:
        """Hold the host back until an expert's copy was started; returns its event."""
        while arrival.event is None:
            if arrival.error is not None:
                raise TransferError(str(arrival.error)) from arrival.error
            self._copy_what_was_read()
            if arrival.event is None and arrival.error is None:
                self._supply.block()
        return arrival.event

    def _has_arrived(self, arrival: _Arrival) -> bool:
        if arrival.error is not None:
            return True  # nothing is on its way any more
        return arrival.event is not None and self._streams.reached(arrival.event)

    def _take_arrived(self, layer: int) -> None:
        """Count experts whose copies have ended among those that are there."""
        in_flight = self._in_flight[layer]
        for arrival in list(in_flight.values()):
            if self._has_arrived(arrival):
                self._streams.wait("compute", in_flight.pop(arrival.expert).event)

    def _await(self, event: Any) -> None:
        """Wait on the host, starting guesses meanwhile."""
        while not self._streams.reached(event):
            if not self._guesses:
                self._streams.synchronize(event)
                return
            self.issue_guesses()
            time.sleep(0)  # lets reader threads run

    def _cancel(self, layer: int) -> None:
        """Drop a layer's guesses that have not started."""
        slot_of = self._table.slot_of[layer]
        absent = [expert for expert in self._guesses.drop(layer) if slot_of[expert] < 0]
        self._counters[layer].cancelled_prefetches += len(absent)

    def _pinned_slots(self, layer: int) -> list[int]:
        slot_of = self._table.slot_of[layer]
        return [slot_of[expert] for expert in self._in_flight[layer]]

    def _count_wasted(self, layer: int, evicted: Iterable[int]) -> None:
        wasted = self._untouched[layer].intersection(evicted)
        self._untouched[layer] -= wasted
        size_bytes = len(wasted) * self._record_bytes[layer]
        self._counters[layer].wasted_speculative_bytes += size_bytes

    def _refuse_capture(self) -> None:
        if self._streams.capturing:
            raise SpecMoEError(
                "transfer='copy' reads expert ids on the host, and a CUDA graph cannot hold that:"
                " compile with transfer='gather', or without CUDA graphs."
            )
