"""Which expert each slot of the expert cache holds, and who has to leave: pure Python.

Integers only, so that a kernel which keeps the same tables on a device can be equal to the bit.
LRU gives up the slot that was used longest ago, ties go to the lowest. `lfu` and `adaptive` give up
the expert that is worth least (`runtime.cache.eviction`). Slots that hold nothing go first. Under
`adaptive` a missing expert that is worth less still is bypassed, if there is a spare place to
compute it from.

Shape letters: E experts, L MoE layers, S slots per layer, T tokens, K top-k.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from specmoe_compile.runtime.cache.eviction import (
    LFU_CANDIDATE,
    PROMPT_TOKENS,
    Ids,
    Policy,
    Scores,
    check_policy,
    followed,
)
from specmoe_compile.runtime.experts.layout import ExpertLayout

NOBODY = -1


@dataclass(slots=True)
class CachePlan:
    """What one plan decided; the tables say so already.

    Attributes:
        hits: (expert, slot) of experts that are there.
        fills: (expert, slot) to be read now.
        bypassed: experts that get no slot in this plan; the first of them have the spare places.
        evicted: experts that lost their slot.
    """

    hits: list[tuple[int, int]] = field(default_factory=list)
    fills: list[tuple[int, int]] = field(default_factory=list)
    bypassed: list[int] = field(default_factory=list)
    evicted: list[int] = field(default_factory=list)


class ExpertCache:
    """Slots of every layer and their replacement.

    The tables are arrays of int64 in place, which the engine in C++ shares.

    Attributes:
        slot_of: slot of each expert or -1, [L][E].
        expert_of: expert of each slot or -1, [L][S]; E or more: the slot is out of use.
        last_use: plan of the layer in which each slot was last used or filled, [L][S]; 0 is never.
        scores: what each layer's experts are worth, [L]; not kept by "lru".
        clock: plans of each layer so far, [L].
        spare: places besides the slots for a step's missing experts.
    """

    def __init__(
        self,
        *,
        num_experts: Sequence[int],
        slots: Sequence[int],
        policy: Policy = "lru",
        spare: int = 0,
    ) -> None:
        """Start empty.

        Args:
            num_experts: E of each layer.
            slots: S of each layer.
            policy: "lru", "lfu" or "adaptive".
            spare: places besides the slots that a step may compute missing experts from; only
                "adaptive" uses them.

        Raises:
            ValueError: an unknown policy, a layer without slots, or fewer than no spare places.
        """
        check_policy(policy)
        if spare < 0:
            raise ValueError(f"spare={spare} must be 0 or more places")
        if len(num_experts) != len(slots) or any(count < 1 for count in slots):
            raise ValueError(
                f"each of {len(num_experts)} layers needs at least one slot, got {list(slots)}"
            )
        self.policy = policy
        self.spare = spare if policy == "adaptive" else 0
        self.slot_of = [array("q", [NOBODY] * experts) for experts in num_experts]
        self.expert_of = [array("q", [NOBODY] * count) for count in slots]
        self.last_use = [array("q", [0] * count) for count in slots]
        self.scores = [Scores(experts) for experts in num_experts]
        self.clock = array("q", [0] * len(slots))
        # Of slots that a guess got: the expert before, and its last use.
        self._before: list[dict[int, tuple[int, int]]] = [{} for _ in slots]

    def followed(self) -> tuple[str, ...]:
        """What decides who leaves, of each layer, in words."""
        return tuple(followed(self.policy, scores.candidate) for scores in self.scores)

    def slot(self, layer: int, expert: int) -> int:
        """Return the expert's slot, or -1."""
        return self.slot_of[layer][expert]

    def forget(self, layer: int, expert: int) -> None:
        """Free an expert's slot, after a read that failed."""
        slot = self.slot_of[layer][expert]
        if slot != NOBODY:
            self.slot_of[layer][expert] = NOBODY
            self.expert_of[layer][slot] = NOBODY
            self.last_use[layer][slot] = 0
            self._before[layer].pop(slot, None)

    def take_back(self, layer: int, expert: int) -> int:
        """Undo a speculative fill that nothing was read for.

        Returns:
            The expert that has its slot again, -1 if there is none.
        """
        slot = self.slot_of[layer][expert]
        previous, last_use = self._before[layer].get(slot, (NOBODY, 0))
        self.forget(layer, expert)
        if previous == NOBODY or self.slot_of[layer][previous] != NOBODY:
            return NOBODY
        self.slot_of[layer][previous] = slot
        self.expert_of[layer][slot] = previous
        self.last_use[layer][slot] = last_use
        return previous

    def plan(
        self,
        layer: int,
        experts: Sequence[int],
        *,
        pinned_slots: Collection[int] = (),
        bypass: bool = False,
        speculative: bool = False,
    ) -> CachePlan:
        """Find or give slots to experts.

        Args:
            layer: MoE layer ordinal.
            experts: expert numbers in order of preference; duplicates are folded.
            pinned_slots: slots that must keep their experts (in use, or being read).
            bypass: prefill; only slots that hold nothing are filled, nothing is evicted.
            speculative: a guess; hits are not counted as uses.

        Returns:
            The plan. Slots of this plan's experts are never evicted by it.
        """
        slot_of, expert_of = self.slot_of[layer], self.expert_of[layer]
        last_use = self.last_use[layer]
        self.clock[layer] = now = self.clock[layer] + 1
        plan = CachePlan()
        missing: list[int] = []
        taken = set(pinned_slots)
        wanted = list(dict.fromkeys(experts))
        if self.policy != "lru" and not speculative:
            choose = self.policy == "adaptive"
            self.scores[layer].note(wanted, now, len(expert_of), choose=choose)
        for expert in wanted:
            slot = slot_of[expert]
            if slot == NOBODY:
                missing.append(expert)
                continue
            plan.hits.append((expert, slot))
            taken.add(slot)
            if not speculative:
                last_use[slot] = now
        if not missing:
            return plan
        keys = self._keys_or_none(layer)
        places = iter(self._fillable(layer, taken, keys, empty_only=bypass))
        spare = 0 if bypass or speculative else self.spare
        before = self._before[layer]
        slot = next(places, NOBODY)
        for expert in missing:
            previous = expert_of[slot] if slot != NOBODY else NOBODY
            if slot == NOBODY or (
                len(plan.bypassed) < spare
                and keys is not None
                and previous != NOBODY
                and keys[expert] < keys[previous]
            ):
                plan.bypassed.append(expert)
                continue
            before.pop(slot, None)
            if speculative:
                before[slot] = (previous, last_use[slot])
            if previous != NOBODY:
                slot_of[previous] = NOBODY
                plan.evicted.append(previous)
            expert_of[slot], slot_of[expert] = expert, slot
            last_use[slot] = now
            plan.fills.append((expert, slot))
            slot = next(places, NOBODY)
        return plan

    def plan_prompt(
        self,
        layer: int,
        experts: Sequence[int],
        ids: Ids,
        *,
        pinned_slots: Collection[int] = (),
    ) -> CachePlan:
        """Find or give slots to the experts of a prefill, see `plan(bypass=True)`.

        Under "adaptive" its tokens are counted first, and what is worth most fills slots first.

        Args:
            layer: MoE layer ordinal.
            experts: expert numbers in order of preference.
            ids: [T, K], what each token chose, in order.
            pinned_slots: slots that must keep their experts.
        """
        if self.policy == "adaptive":
            self.note_prompt(layer, ids)
            keys = self._keys_or_none(layer)
            assert keys is not None, "counts rank the experts"
            experts = sorted(experts, key=keys.__getitem__, reverse=True)
        return self.plan(layer, experts, pinned_slots=pinned_slots, bypass=True)

    def note_prompt(self, layer: int, ids: Ids) -> None:
        """Count the last PROMPT_TOKENS tokens of a prompt, or of a piece of one, each as a step.

        Only under "adaptive", and no slot is touched. Several sequences count as one: of a batch
        these are the last tokens of the last ones.

        Args:
            layer: MoE layer ordinal.
            ids: [T, K]; outside of 0..E-1 they are nobody.
        """
        if self.policy == "adaptive":
            last = ids[-PROMPT_TOKENS:]
            self.scores[layer].note_tokens(last, self.clock[layer] + 1)
            self.clock[layer] += len(last)

    def _keys_or_none(self, layer: int) -> list[int] | None:
        """What each expert is worth, [E]; None where the slots' last uses decide."""
        if self.policy == "lru":
            return None
        scores = self.scores[layer]
        keys: list[int] = scores.keys(
            LFU_CANDIDATE if self.policy == "lfu" else scores.candidate
        ).tolist()
        return keys

    def _fillable(
        self, layer: int, taken: set[int], keys: list[int] | None, *, empty_only: bool
    ) -> list[int]:
        """Slots that may be filled, those to be given up first in front."""
        expert_of, last_use = self.expert_of[layer], self.last_use[layer]
        experts = len(self.slot_of[layer])
        free = [s for s, held in enumerate(expert_of) if s not in taken and held < experts]
        if empty_only:
            return [slot for slot in free if expert_of[slot] == NOBODY]
        if keys is None:
            return sorted(free, key=lambda s: (expert_of[s] != NOBODY, last_use[s], s))
        return sorted(free, key=lambda s: (expert_of[s] != NOBODY, keys[expert_of[s]], s))


def belady_hits(requests: Sequence[Sequence[int]], slots: int, *, may_bypass: bool = False) -> int:
    """Hits of the best possible replacement of one layer's cache, known only afterwards.

    The expert that is needed again last leaves (L. A. Belady, "A study of replacement algorithms
    for a virtual-storage computer", 1966).

    Args:
        requests: distinct experts of each step, in time order.
        slots: S.
        may_bypass: a step's experts may be computed without a slot, and the S that are needed
            soonest are kept. Else they must all be there at once, as far as the slots go.
    """
    uses: dict[int, list[int]] = {}
    for step, experts in enumerate(requests):
        for expert in dict.fromkeys(experts):
            uses.setdefault(expert, []).append(step)
    for steps in uses.values():
        steps.reverse()
    never = len(requests)
    held: set[int] = set()
    hits = 0
    for experts in requests:
        wanted = list(dict.fromkeys(experts))
        for expert in wanted:
            uses[expert].pop()
            hits += expert in held
        if may_bypass:
            held.update(wanted)
            while len(held) > slots:
                held.remove(max(held, key=lambda e: (uses[e][-1] if uses[e] else never, e)))
            continue
        for expert in wanted:
            if expert in held:
                continue
            if len(held) >= slots:
                others = held.difference(wanted)
                if not others:
                    continue
                held.remove(max(others, key=lambda e: (uses[e][-1] if uses[e] else never, e)))
            held.add(expert)
    return hits


def slots_per_layer(
    expert_cache_bytes: int, layouts: Sequence[ExpertLayout], num_experts: Sequence[int], top_k: int
) -> tuple[int, ...]:
    """Return S of each layer that a byte budget pays for, the same for all up to their E.

    Raises:
        ValueError: the budget does not hold one token's experts in every layer.
    """
    bytes_per_slot = sum(layout.record_bytes for layout in layouts)
    slots = expert_cache_bytes // bytes_per_slot
    for layer, experts in enumerate(num_experts):
        needed = min(top_k, experts)
        if slots < needed:
            raise ValueError(
                f"expert_cache of {expert_cache_bytes} bytes holds {slots} experts per layer, but a"
                f" token uses {needed} in MoE layer {layer}: give at least"
                f" {needed * bytes_per_slot} bytes ({needed} x {bytes_per_slot} for"
                f" {len(layouts)} layers)."
            )
    return tuple(min(slots, experts) for experts in num_experts)
