"""The arms of the full-size benchmark, and the sessions they run in.

Shape letters: E experts, K top-k, N trace tokens, L MoE layers, S slots.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.full_size.memory import attended_bytes, slots_in_memory
from benchmarks.full_size.model import (
    InlineStreams,
    RandomStore,
    Shape,
    build_skeleton,
    random_tokens,
)
from benchmarks.full_size.routing import TracedRouting, install_routing
from specmoe_compile.hf.attach import attach_session
from specmoe_compile.runtime.cache.eviction import DEFAULT_POLICY, Policy
from specmoe_compile.runtime.cuda.decode_gather import waits_for_prefetch
from specmoe_compile.runtime.cuda.engine import CudaEngine
from specmoe_compile.runtime.cuda.opening import open_session as open_cuda_session
from specmoe_compile.runtime.experts.module import ExpertsLayer
from specmoe_compile.runtime.session import Session

Routing = Literal["trace", "router"]
Mode = Literal["graph", "compiled", "eager"]
ROUTINGS: tuple[Routing, ...] = ("trace", "router")
MODES: tuple[Mode, ...] = ("graph", "compiled", "eager")
"""CUDA graphs; compiled without them; not compiled at all, which no speculation is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way of running the experts.

    Attributes:
        summary: one line for the report.
        slots: S per layer, from E and K.
        options: of the backend; they say whether to prefetch, which is not to hang on the slots.
        keeps: whether slots keep what they hold from one token to the next.
        full: every expert has its slot, which a session of that size sees to.
        ahead: records that are fetched ahead for a layer at most; None: what `auto_off` finds.
        cache_policy: which expert leaves a full cache.
        memory_bytes: of a GPU whose memory says how many slots there are, at most `slots`.
    """

    summary: str
    slots: Callable[[int, int], int]
    options: Mapping[str, Any]
    keeps: bool = True
    full: bool = False
    ahead: int | None = None
    cache_policy: Policy = DEFAULT_POLICY
    memory_bytes: int | None = None

    @property
    def tries(self) -> bool:
        """Whether the session finds out how many records to fetch ahead."""
        return self.speculates and self.ahead is None and "policy" not in self.options

    @property
    def speculates(self) -> bool:
        return bool(self.options["prefetch"])

    def graph_options(self, record_bytes: int) -> dict[str, Any]:
        """Options of the backend, with what the arm may fetch ahead."""
        if self.ahead is None:
            return dict(self.options)
        return {**self.options, "prefetch_budget_bytes": self.ahead * record_bytes}


def _share(share: float) -> Callable[[int, int], int]:
    return lambda experts, top_k: max(top_k, math.floor(share * experts))


_ALONE: Mapping[str, Any] = {"prefetch": False}
_AHEAD: Mapping[str, Any] = {"prefetch": True}
ARMS: Mapping[str, Arm] = {
    "resident": Arm(
        summary="all experts in GPU memory", slots=lambda e, k: e, options=_ALONE, full=True
    ),
    "resident_again": Arm(
        summary="the same once more: whether the same arm repeats its tokens",
        slots=lambda e, k: e,
        options=_ALONE,
        full=True,
    ),
    "on_demand": Arm(
        summary="no cache: every expert of every token is fetched when its router has spoken",
        slots=lambda e, k: k,
        options=_ALONE,
        keeps=False,
    ),
    "prefetch_no_cache": Arm(
        summary="no cache; the next layer's predicted experts are fetched ahead, misses as well",
        slots=lambda e, k: 2 * k,
        options=_AHEAD,
        keeps=False,
    ),
    **{
        f"prefetch_no_cache_most_{most}": Arm(
            summary=f"the same, at most {most} experts ahead: what the layer's compute can hide",
            slots=lambda e, k: 2 * k,
            options=_AHEAD,
            keeps=False,
            ahead=most,
        )
        for most in (1, 4)
    },
    "commit_no_cache": Arm(
        summary="no cache; predicted experts are fetched ahead and executed (the paper's mode)",
        slots=lambda e, k: 2 * k,
        options={**_AHEAD, "policy": "commit"},
        keeps=False,
    ),
    "cache_50": Arm(summary="cache of 50 %", slots=_share(0.5), options=_ALONE),
    "specmoe_50": Arm(
        summary="cache of 50 % and prefetch, exact", slots=_share(0.5), options=_AHEAD
    ),
    # What FreeToken was measured with (docs/results/peers_gpu.md): 14.5 and 9.6 GB in 4 bits.
    "cache_88": Arm(summary="cache of 88.4 %", slots=_share(0.884), options=_ALONE),
    "cache_94": Arm(summary="cache of 94 %", slots=_share(0.94), options=_ALONE),
    "cache_25": Arm(summary="cache of 25 %", slots=_share(0.25), options=_ALONE),
    "specmoe_25": Arm(
        summary="cache of 25 % and prefetch, exact", slots=_share(0.25), options=_AHEAD
    ),
    **{
        f"lru_{share}": Arm(
            summary=f"cache of {share} %; who was not used for longest leaves",
            slots=_share(share / 100),
            options=_ALONE,
            cache_policy="lru",
        )
        for share in (25, 50)
    },
    "default_vector_25": Arm(
        summary="the same; light misses get default vectors (approximate)",
        slots=_share(0.25),
        options={**_AHEAD, "policy": "default_vector"},
    ),
    "commit_25": Arm(
        summary="the same; predicted experts are executed (approximate)",
        slots=_share(0.25),
        options={**_AHEAD, "policy": "commit"},
    ),
    **{
        f"specmoe_{share}_most_{most}": Arm(
            summary=f"cache of {share} % and prefetch of at most {most} experts, exact",
            slots=_share(share / 100),
            options=_AHEAD,
            ahead=most,
        )
        for share in (10, 25, 50)
        for most in (1, 4)
    },
    **{
        f"{name}_{size}gb": Arm(
            summary=f"what {size} GiB of GPU memory leave, {how}",
            slots=lambda e, k: e,
            options=options,
            memory_bytes=size << 30,
        )
        for size in (8, 16, 24)
        for name, how, options in (
            ("cache", "cache alone", _ALONE),
            ("specmoe", "with prefetch", _AHEAD),
        )
    },
    "cache_10": Arm(summary="cache of 10 %, at least K", slots=_share(0.1), options=_ALONE),
    "specmoe_10": Arm(
        summary="cache of 10 %, at least K, and prefetch", slots=_share(0.1), options=_AHEAD
    ),
}


def sharing_groups(
    names: Sequence[str],
    mode: Mode,
    *,
    experts: int,
    top_k: int,
    slots_of: Callable[[Arm], int] | None = None,
) -> list[list[str]]:
    """Arms that one compiled graph serves: those with the same options, with CUDA graphs.

    Elsewhere the host keeps the tables, and each arm has a session of its own. So have arms with
    all experts, whose steps plan nothing, and an arm that
    speculates with so few slots that a session of that size waits for a prefetch before it plans
    what is demanded: the graph of a larger session does not wait, and would take slots that are not
    the arm's.
    """
    if mode != "graph":
        return [[name] for name in names]
    groups: dict[str, list[str]] = {}
    for name in names:
        arm = ARMS[name]
        slots = arm.slots(experts, top_k) if slots_of is None else slots_of(arm)
        whole = arm.full or (arm.memory_bytes is not None and slots == experts)
        waits = whole or (arm.speculates and waits_for_prefetch(slots, top_k, top_k, experts))
        alone = slots if waits else None
        shared = (sorted(arm.options.items()), arm.ahead, arm.cache_policy, alone)
        groups.setdefault(repr(shared), []).append(name)
    return list(groups.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """How many steps a run has; together at most the trace's N."""

    warm_up: int
    timed: int
    profiled: int

    @property
    def total(self) -> int:
        return self.warm_up + self.timed + self.profiled


@dataclass(slots=True)
class Bench:
    """What the arms of one model share.

    Attributes:
        shape, device: what runs where.
        store: all experts.
        tables: mapped trace, [L, N, 2, E] on the device.
        steps: of every run.
        lowering: of the backend.
        layers: number of layers, None for the model's own.
        vectors: default vectors of every layer; None while they are learned.
        other_bytes: of GPU memory that a run takes besides the slots, for arms of `memory_bytes`.
        turns: file by which several processes of one host measure in turn; None for one process.
    """

    shape: Shape
    device: torch.device
    store: RandomStore
    tables: Tensor
    steps: Steps
    lowering: str = "inductor"
    layers: int | None = None
    vectors: list[Tensor] | None = None
    other_bytes: int = 0
    turns: Path | None = None

    def build(self) -> tuple[Any, list[ExpertsLayer]]:
        """A random model, and the MoE layers that the store is of."""
        return build_skeleton(self.shape, self.device, layers=self.layers)

    @contextmanager
    def opened(
        self, slots: int, *, cache_policy: Policy = DEFAULT_POLICY
    ) -> Iterator[tuple[Any, Session, TracedRouting]]:
        """A model of its own with so many slots per layer; gives all back afterwards."""
        # On the CPU all fetches are over when they are issued, which needs no side streams.
        streams = InlineStreams() if self.device.type == "cpu" else None
        model, layers = self.build()
        session = open_cuda_session(
            layers,
            self.store,
            device=self.device,
            expert_cache_bytes=slots * sum(layer.layout.record_bytes for layer in layers),
            cache_policy=cache_policy,
            top_k=self.store.top_k,
            streams=streams,
        )
        try:
            attach_session(model, session)
            if self.vectors is not None:
                session.default_vectors.load(self.vectors)
            routing = install_routing(model, layers, self.tables)
            yield model, session, routing
        finally:
            session.close()
            del model, session
            torch._dynamo.reset()
            free_memory(self.device)

    def slots(self, arm: Arm) -> int:
        """S per layer of an arm.

        Raises:
            ValueError: its GPU memory does not leave room for K.
        """
        experts, top_k = self.store.num_experts[0], self.store.top_k
        if arm.memory_bytes is None:
            return arm.slots(experts, top_k)
        slot_bytes = sum(layout.record_bytes for layout in self.store.layouts)
        left = arm.memory_bytes - self.other_bytes
        return slots_in_memory(left, slot_bytes, experts=experts, top_k=top_k)

    def fits(self, arm: Arm, context: int) -> str | None:
        """Why an arm does not fit in device memory; None if it does, or nobody can say."""
        if self.device.type != "cuda":
            return None
        free, _ = torch.cuda.mem_get_info(self.device)
        config = self.shape.configured(self.layers)
        tokens = context + self.steps.total
        cached = attended_bytes(config, tokens, self.shape.dtype.itemsize)
        experts = self.slots(arm) * sum(layout.record_bytes for layout in self.store.layouts)
        experts += 2 * max(layer.total_bytes for layer in self.store.layers)  # prefill buffers
        # Weights outside the experts, and scores and expanded keys of one attention.
        rest = 2 * config.vocab_size * config.hidden_size * 2 + (6 << 30)
        if experts + cached + rest > free:
            return (
                f"needs about {(experts + cached + rest) / 1e9:.0f} GB of GPU memory, "
                f"{free / 1e9:.0f} GB are free"
            )
        return None


def free_memory(device: torch.device) -> None:
    """Give back what nobody refers to."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def cuda_engine(session: Session) -> CudaEngine:
    """The engine of a session that `Bench.opened` opened."""
    assert isinstance(session.engine, CudaEngine), "opened by open_cuda_session"
    return session.engine


class SlotLimit:
    """How many slots of a session's an arm may use, and how to empty them between two steps.

    Arms with the same options share a compiled graph: the session has the slots of the largest,
    and the tables say of the rest that they hold an expert that does not exist: out of use.
    """

    def __init__(self, session: Session, slots: int) -> None:
        """Allow the first `slots` of each layer; with transfer `copy` those are all."""
        self._session = session
        tables = cuda_engine(session).cache.tables[0]
        # The tables of a layer are rows of tensors of all layers: one launch each.
        expert_of = tables.expert_of._base
        assert expert_of is not None, "rows of a common tensor"
        self._rest = expert_of[:, slots:]
        self._no_expert = max(session.store.num_experts)

    def empty(self) -> None:
        """Forget what the slots hold: what a machine without a cache does after each token."""
        cuda_engine(self._session).forget_slots()
        if self._rest.numel():
            self._rest.fill_(self._no_expert)


@torch.no_grad()
def learn_vectors(bench: Bench, tokens: int) -> None:
    """Learn default vectors as a session does, from a prefill of random tokens."""
    with bench.opened(bench.store.top_k) as (model, session, routing):
        routing.start(False)
        model(random_tokens(model.config.vocab_size, tokens, bench.device), use_cache=False)
        bench.vectors = [table.clone() for table in session.default_vectors.tables]
