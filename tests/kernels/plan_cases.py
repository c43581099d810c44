"""Cache tables, streams of ids, and what `plan_cache` must make of them by the Python policy.

`ExpectedCache` keeps `ExpertCache` and the books around it on its own from the first plan on; it
never reads the tensors that it is compared with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specmoe_compile.kernels.plan_cache.kernel import launch_plan
from specmoe_compile.kernels.plan_cache.op import (
    COUNTERS,
    MAX_CHOICES,
    CachePlanTensors,
    CacheTables,
)
from specmoe_compile.runtime.cache.eviction import CANDIDATES, LFU_CANDIDATE
from specmoe_compile.runtime.cache.slot_table import ExpertCache
from tests.kernels.expert_cases import DEVICE

POISON = -77
SPARE_FROM = 1000


@dataclass(frozen=True, kw_only=True)
class Step:
    """One plan: ids as rows of equal length, and its kind; `by_tensor`: how its budget is given."""

    ids: list[list[int]]
    speculative: bool = False
    max_fills: int = MAX_CHOICES
    by_tensor: bool = False
    spare: int = 0

    def options(self, device: torch.device) -> dict[str, Any]:
        if self.by_tensor:
            limit = torch.tensor([self.max_fills], dtype=torch.int32, device=device)
            budget: dict[str, Any] = {"fill_limit": limit}
        else:
            budget = {"max_fills": self.max_fills}
        return {
            "speculative": self.speculative,
            **budget,
            "spare": self.spare,
            "spare_from": SPARE_FROM,
        }


class ExpectedCache:
    """The Python policy with the books of `CacheTables`, in sets and dictionaries."""

    def __init__(self, experts: int, slots: int, *, start: int = 0, **policy: Any) -> None:
        self.cache = ExpertCache(num_experts=[experts], slots=[slots], **policy)
        self.cache.clock[0] = start
        self.experts, self.slots = experts, slots
        self.pending: set[int] = set()
        self.unused: set[int] = set()
        self.counters = dict.fromkeys(COUNTERS, 0)

    def plan(self, step: Step) -> dict[str, list[Any]]:
        """Plan and return the expected results by their names in `CachePlanTensors`."""
        flat = [expert for row in step.ids for expert in row]
        is_adaptive = self.cache.policy == "adaptive"
        self.cache.spare = step.spare if is_adaptive else 0
        plan = self.cache.plan(
            0,
            self._afforded(flat, step.max_fills),
            pinned_slots=set(self.pending),
            speculative=step.speculative,
        )
        hits, fills = dict(plan.hits), dict(plan.fills)
        arriving = {expert: slot for expert, slot in hits.items() if slot in self.pending} | fills
        there = {expert: slot for expert, slot in hits.items() if expert not in arriving}
        self.counters["evicted"] += len(plan.evicted)
        self.counters["wasted_prefetches"] += len(self.unused & set(fills.values()))
        self.unused -= set(fills.values())
        if step.speculative:
            self.counters["prefetches"] += len(fills)
            self.pending |= set(fills.values())
            self.unused |= set(fills.values())
        else:
            used = set(hits.values())
            self.counters["steps"] += 1
            self.counters["hits"] += len(hits)
            self.counters["late_prefetches"] += len(used & self.pending)
            self.counters["misses"] += len(fills) + len(plan.bypassed)
            self.counters["bypassed"] += len(plan.bypassed)
            self.counters["useful_prefetches"] += len(used & self.unused)
            self.unused -= used
            self.pending.clear()
        copied = dict(fills)
        if is_adaptive and not step.speculative:
            for place, expert in enumerate(plan.bypassed[: step.spare]):
                copied[expert] = arriving[expert] = SPARE_FROM + place
        order = [expert for expert in dict.fromkeys(flat) if expert in copied]
        rest = [-1] * (min(len(flat), self.experts) - len(order))
        return {
            "present": [[there.get(expert, -1) for expert in row] for row in step.ids],
            "late": [[arriving.get(expert, -1) for expert in row] for row in step.ids],
            "fill_experts": [*order, *rest],
            "fill_slots": [*(copied[expert] for expert in order), *rest],
            "fill_count": [len(order)],
        }

    def _afforded(self, choices: list[int], max_fills: int) -> list[int]:
        afforded: list[int] = []
        for expert in choices:
            if expert >= 0 and expert not in afforded:
                missing = self.cache.slot(0, expert) < 0
                if missing and max_fills == 0:
                    continue
                max_fills -= missing
                afforded.append(expert)
        return afforded

    def tables(self) -> dict[str, list[int]]:
        """The expected tables by their names in `CacheTables`."""
        return {
            "slot_of": list(self.cache.slot_of[0]),
            "expert_of": list(self.cache.expert_of[0]),
            "last_use": list(self.cache.last_use[0]),
            "scores": self.cache.scores[0].table.tolist(),
            "regret": self.cache.scores[0].regret.tolist(),
            "pending": [int(slot in self.pending) for slot in range(self.slots)],
            "unused": [int(slot in self.unused) for slot in range(self.slots)],
            "clock": list(self.cache.clock),
            "counters": list(self.counters.values()),
        }


class LayerTables:
    """The middle one of three layers' tables; the layers beside it hold poison."""

    def __init__(
        self, experts: int, slots: int, *, start: int = 0, device: torch.device = DEVICE
    ) -> None:
        def rows(width: int, value: int, dtype: torch.dtype = torch.int32) -> Tensor:
            table = torch.full((3, width), POISON, dtype=dtype, device=device)
            table[1] = value
            return table

        self.all = CacheTables(
            slot_of=rows(experts, -1),
            expert_of=rows(slots, -1),
            last_use=rows(slots, 0, torch.int64),
            scores=rows(CANDIDATES * experts, 0, torch.int64).view(3, CANDIDATES, experts),
            pending=rows(slots, 0),
            unused=rows(slots, 0),
            clock=rows(1, start, torch.int64),
            regret=rows(CANDIDATES + 1, 0, torch.int64),
            counters=rows(len(COUNTERS), 0, torch.int64),
        )
        self.all.regret[1, -1] = LFU_CANDIDATE
        self.layer = CacheTables(*(table[1] for table in self.all))

    def assert_others_untouched(self) -> None:
        assert all(bool((table[[0, 2]] == POISON).all()) for table in self.all)


def poisoned_plan(ids: Tensor, experts: int) -> CachePlanTensors:
    """Results of which every element must be written."""
    fills = min(ids.numel(), experts)
    shapes = (ids.shape, ids.shape, (fills,), (fills,), (1,))
    return CachePlanTensors(
        *(torch.full(shape, POISON, dtype=torch.int32, device=ids.device) for shape in shapes)
    )


def plan_by_kernel(
    ids: Tensor,
    tables: CacheTables,
    *,
    policy: str,
    speculative: bool = False,
    max_fills: int = MAX_CHOICES,
    fill_limit: Tensor | None = None,
    spare: int = 0,
    spare_from: int = 0,
) -> CachePlanTensors:
    """`plan_cache` by its launch, on poisoned buffers."""
    plan = poisoned_plan(ids, tables.slot_of.shape[0])
    launch_plan(
        ids,
        *tables,
        *plan,
        policy=policy,
        speculative=speculative,
        max_fills=max_fills,
        fill_limit=fill_limit,
        spare=spare,
        spare_from=spare_from,
    )
    return plan


def as_lists(tensors: CacheTables | CachePlanTensors) -> dict[str, list[Any]]:
    """Values by name."""
    return {name: tensor.tolist() for name, tensor in tensors._asdict().items()}
