"""Op `plan_cache`: which experts of a layer are in the cache, and which are to be fetched to where.

On CUDA it is one launch that never waits for the device, so that a decode step with its cache can
be one CUDA graph.

Shape letters: T tokens, K top-k, E experts, S slots, D decays, N = min(T * K, E).
"""

from __future__ import annotations

from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from specmoe_compile.kernels.checks import INDEX_DTYPES, check_tensor, require_triton
from specmoe_compile.kernels.common_torch import LIBRARY, implement
from specmoe_compile.kernels.plan_cache.reference import plan_cache_reference
from specmoe_compile.runtime.cache.eviction import CANDIDATES, Policy

_NAME = "plan_cache"
LIBRARY.define(
    f"{_NAME}(Tensor ids, Tensor(a!) slot_of, Tensor(b!) expert_of, Tensor(c!) last_use,"
    " Tensor(d!) scores, Tensor(e!) pending, Tensor(f!) unused, Tensor(g!) clock,"
    " Tensor(i!) regret, Tensor(h!) counters, *, str policy,"
    " bool speculative=False, int max_fills=256, Tensor? fill_limit=None, int spare=0,"
    " int spare_from=0)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)

MAX_EXPERTS = 512
MAX_CHOICES = 256

COUNTERS = (
    "steps",
    "hits",
    "late_prefetches",
    "misses",
    "bypassed",
    "evicted",
    "prefetches",
    "useful_prefetches",
    "wasted_prefetches",
)


class CacheTables(NamedTuple):
    """Cache tables of one layer, contiguous and on one device; may be rows of [L, ...] tensors.

    Attributes:
        slot_of: [E] int32, slot of each expert or -1.
        expert_of: [S] int32, expert of each slot or -1; E or more: the slot is out of use.
        last_use: [S] int64, plan in which the slot was last used or filled; 0 is never.
        scores: [D + 1, E] int64, what each expert is worth (`runtime.cache.eviction.Scores`).
        pending: [S] int32, 1 while a speculative transfer into the slot may be in flight.
        unused: [S] int32, 1 for a speculative fill that no demand plan has used yet.
        clock: [1] int64, plans so far.
        regret: [D + 2] int64, misses of each candidate of policy "adaptive", and the one followed.
        counters: [len(COUNTERS)] int64, added to. `steps`, `hits`, `late_prefetches`, `misses`
            (fills and bypassed), `bypassed` and `useful_prefetches` are of demand plans,
            `prefetches` of speculative fills, `evicted` and `wasted_prefetches` of both.
    """

    slot_of: Tensor
    expert_of: Tensor
    last_use: Tensor
    scores: Tensor
    pending: Tensor
    unused: Tensor
    clock: Tensor
    regret: Tensor
    counters: Tensor


class PlanOptions(NamedTuple):
    """Arguments of `plan_cache` besides tensors, with the defaults of the op's schema."""

    policy: str
    speculative: bool = False
    max_fills: int = MAX_CHOICES
    fill_limit: Tensor | None = None
    spare: int = 0
    spare_from: int = 0


class CachePlanTensors(NamedTuple):
    """What one plan decided; the tables say so already.

    Attributes:
        present: [T, K] int32, slot of each choice whose record is there now, else -1.
        late: [T, K] int32, slot or spare place of each choice that arrives by this or by a pending
            transfer, else -1.
        fill_experts: [N] int32, experts to be copied, in order; -1 after the count.
        fill_slots: [N] int32, their slots or spare places; -1 after the count.
        fill_count: [1] int32.
    """

    present: Tensor
    late: Tensor
    fill_experts: Tensor
    fill_slots: Tensor
    fill_count: Tensor


def plan_cache(
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
    """Find or give slots to the experts of a step, and update the tables.

    The decisions are those of `runtime.cache.slot_table.ExpertCache.plan` on the ids row by row, to
    the bit, with the slots of pending transfers pinned. A demand plan ends by clearing `pending`:
    the caller waits for the layer's transfers before it reads the slots in `late`.

    Args:
        ids: [T, K] int32 or int64, contiguous, T * K from 1 to 256: experts by choice; negative for
            none, and E, which stands for an expert of another rank. On CUDA so do larger ones.
        tables: of the layer, on the device of `ids`; E and S at most 512. Changed in place.
        policy: "lru", "lfu" or "adaptive".
        speculative: the ids are a guess: hits are not uses, and fills become pending and unused.
        max_fills: slots that a guess may fill, those of the first choices; the rest is left out.
        fill_limit: [1] int32, the same, read on the device when the plan runs; the smaller counts.
        spare: places besides the slots that a demand plan of policy "adaptive" may send missing
            experts to, see `ExpertCache`; no table says what they hold.
        spare_from: the number that stands for the first of them in `late` and `fill_slots`, S or
            more.

    Returns:
        New tensors on the device of `ids`; every element is written.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device or layout, or a size
            is too large; on the CPU also an id of more than E.
        SpecMoEError: CUDA tensors without Triton.
    """
    options = PlanOptions(policy, speculative, max_fills, fill_limit, spare, spare_from)
    op = torch.ops.specmoe_kernels.plan_cache
    return CachePlanTensors(*op(ids, *tables, **options._asdict()))


def _check(ids: Tensor, tables: CacheTables, options: PlanOptions) -> None:
    policy, speculative, max_fills, fill_limit, spare, spare_from = options
    check_tensor(_NAME, "ids", ids, ("T", "K"), INDEX_DTYPES)
    check_tensor(_NAME, "slot_of", tables.slot_of, ("E",), (torch.int32,), like=ids)
    check_tensor(_NAME, "expert_of", tables.expert_of, ("S",), (torch.int32,), like=ids)
    experts, slots = tables.slot_of.shape[0], tables.expert_of.shape[0]
    check_tensor(_NAME, "last_use", tables.last_use, (slots,), (torch.int64,), like=ids)
    check_tensor(_NAME, "scores", tables.scores, (CANDIDATES, experts), (torch.int64,), like=ids)
    check_tensor(_NAME, "regret", tables.regret, (CANDIDATES + 1,), (torch.int64,), like=ids)
    check_tensor(_NAME, "pending", tables.pending, (slots,), (torch.int32,), like=ids)
    check_tensor(_NAME, "unused", tables.unused, (slots,), (torch.int32,), like=ids)
    check_tensor(_NAME, "clock", tables.clock, (1,), (torch.int64,), like=ids)
    check_tensor(_NAME, "counters", tables.counters, (len(COUNTERS),), (torch.int64,), like=ids)
    if not 1 <= ids.numel() <= MAX_CHOICES:
        raise ValueError(
            f"specmoe_kernels::{_NAME}: ids has {ids.numel()} choices, expected 1 to {MAX_CHOICES};"
            " a longer prompt passes by the cache"
        )
    for name, table in (("slot_of", tables.slot_of), ("expert_of", tables.expert_of)):
        if not 1 <= table.shape[0] <= MAX_EXPERTS:
            raise ValueError(
                f"specmoe_kernels::{_NAME}: {name} has {table.shape[0]} entries, expected 1 to"
                f" {MAX_EXPERTS}"
            )
    if policy not in get_args(Policy):
        names = ", ".join(map(repr, get_args(Policy)))
        raise ValueError(f"specmoe_kernels::{_NAME}: policy is {policy!r}, expected one of {names}")
    if not 0 <= max_fills <= MAX_CHOICES or (max_fills < MAX_CHOICES and not speculative):
        raise ValueError(
            f"specmoe_kernels::{_NAME}: max_fills is {max_fills}, expected 0 to {MAX_CHOICES},"
            f" and {MAX_CHOICES} if the plan is not speculative: what a step needs is not left out"
        )
    if spare < 0 or (spare > 0 and spare_from < slots):
        raise ValueError(
            f"specmoe_kernels::{_NAME}: spare is {spare} and spare_from {spare_from}, expected 0 or"
            f" more places numbered from {slots} or more, since {slots} are slots"
        )
    if fill_limit is not None:
        check_tensor(_NAME, "fill_limit", fill_limit, (1,), (torch.int32,), like=ids)
        if not speculative:
            raise ValueError(
                f"specmoe_kernels::{_NAME}: fill_limit is given, expected None if the plan is not"
                " speculative: what a step needs is not left out"
            )


def _new_plan(ids: Tensor, tables: CacheTables) -> CachePlanTensors:
    """Uninitialised results."""
    fills = min(ids.numel(), tables.slot_of.shape[0])
    return CachePlanTensors(
        present=ids.new_empty(ids.shape, dtype=torch.int32),
        late=ids.new_empty(ids.shape, dtype=torch.int32),
        fill_experts=ids.new_empty((fills,), dtype=torch.int32),
        fill_slots=ids.new_empty((fills,), dtype=torch.int32),
        fill_count=ids.new_empty((1,), dtype=torch.int32),
    )


def _fake(ids: Tensor, *tables: Tensor, **options: Any) -> tuple[Tensor, ...]:
    named = CacheTables(*tables)
    _check(ids, named, PlanOptions(**options))
    return tuple(_new_plan(ids, named))


def _cpu(ids: Tensor, *tables: Tensor, **options: Any) -> tuple[Tensor, ...]:
    given = PlanOptions(**options)
    _check(ids, CacheTables(*tables), given)
    return plan_cache_reference(ids, *tables, **given._asdict())


def _cuda(ids: Tensor, *tables: Tensor, **options: Any) -> tuple[Tensor, ...]:
    require_triton(_NAME)
    from specmoe_compile.kernels.plan_cache.kernel import launch_plan

    named, given = CacheTables(*tables), PlanOptions(**options)
    _check(ids, named, given)
    plan = _new_plan(ids, named)
    with torch.cuda.device(ids.device):
        launch_plan(ids, *named, *plan, **given._asdict())
    return tuple(plan)


implement(_NAME, cpu=_cpu, cuda=_cuda, fake=_fake)
