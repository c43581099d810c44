"""Getting a layer's experts into the fast tier: what is there, on its way, or missing.

A `Step` is one run of one layer. All its misses are read at once, so that the store is busy while
the experts that are there are computed; then each is taken as it arrives.

Shape letters: E experts, T tokens, K top-k, L MoE layers.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Sequence

from torch import Tensor

from specmoe_compile.runtime.cache.statistics import LayerStats
from specmoe_compile.runtime.cpu.experts import ExpertRunner
from specmoe_compile.runtime.experts.formats.expert_format import ExpertTensors
from specmoe_compile.runtime.store.base import ExpertStore
from specmoe_compile.runtime.transfer.base import NOTHING_ISSUED, Issued, Read, Ticket


class Step:
    """One run of one layer, from `begin` to `finish`.

    Attributes:
        ready: experts that are there, not computed yet, with their weights.
        waiting: experts that are being read.
        deferred: experts that wait for a staging buffer.
        places: slot of an expert that is being read.
        staged: buffer and ticket of an expert that is being read into the staging ring.
        reused: buffers that still had a record.
    """

    __slots__ = ("deferred", "layer", "places", "ready", "reused", "staged", "waiting")

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.ready: list[tuple[int, ExpertTensors]] = []
        self.waiting: dict[int, Read] = {}
        self.deferred: deque[int] = deque()
        self.places: dict[int, int] = {}
        self.staged: dict[int, tuple[int, Ticket]] = {}
        self.reused: list[int] = []


class Residency(ABC):
    """Where the experts of a session are computed from."""

    fast_tier_bytes: int

    def now_s(self) -> float:
        """Return the time by the clock that reads are timed with, in seconds."""
        return time.perf_counter()

    @abstractmethod
    def begin(self, layer: int, experts: Sequence[int], *, prompt: Tensor | None = None) -> Step:
        """Start a step that needs `experts` (distinct); issues reads, never blocks.

        Args:
            layer: MoE layer ordinal.
            experts: expert numbers.
            prompt: of a prefill, what each token chose, [T, K]: it leaves the slots of decode
                alone, see `ExpertCache.plan_prompt`.

        Raises:
            TransferError: the session is closed.
        """

    @abstractmethod
    def next_or_none(self, step: Step, *, block: bool) -> tuple[int, ExpertTensors] | None:
        """Return the next expert of a step that arrived, with its weights.

        The weights are valid until the next call with the same step. None when nothing is left,
        or, with `block=False`, nothing more has arrived yet.

        Raises:
            TransferError: a read failed; the expert is forgotten and the step must be abandoned.
        """

    @abstractmethod
    def finish(self, step: Step) -> None:
        """End a step, complete or abandoned."""

    @abstractmethod
    def absent(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Return those experts that are neither there nor on their way."""

    @abstractmethod
    def prefetch(
        self,
        layer: int,
        experts: Sequence[int],
        *,
        predicted: Sequence[int],
        budget_bytes: int | None,
    ) -> Issued:
        """Start speculative reads of what is not there, in order, within a budget; never blocks.

        Args:
            layer: MoE layer ordinal.
            experts: what to read.
            predicted: these and all others that are thought to be needed; none makes room.
            budget_bytes: most bytes to read; None: no limit.
        """

    @abstractmethod
    def settle(self, layer: int, wanted: Collection[int]) -> None:
        """Make a layer's reads follow what is wanted: promote those, cancel the others."""

    @abstractmethod
    def address(self, layer: int) -> int:
        """Return where a layer's first record lies: slot 0's, or expert 0's in place."""

    @abstractmethod
    def is_busy(self, layer: int) -> bool:
        """Whether reads of a layer are under way, or have to be looked at in its next step."""

    @abstractmethod
    def marks(self, layer: int) -> tuple[bytearray, bytearray]:
        """Return a byte per expert each: prefetched and not used yet, and pushed out in vain."""

    @abstractmethod
    def note_pushed_out(self, layer: int, experts: Sequence[int]) -> None:
        """Count it in `LayerStats.pushed_out_bytes` when such experts have to be read again.

        Args:
            layer: MoE layer ordinal.
            experts: what useless guesses pushed out of their slots.
        """


class InPlaceResidency(Residency):
    """Every expert is in the store's own memory and is computed from there."""

    def __init__(
        self, store: ExpertStore, runners: Sequence[ExpertRunner], stats: Sequence[LayerStats]
    ) -> None:
        self.fast_tier_bytes = store.total_bytes
        self._store = store
        self._runners = runners
        self._stats = stats
        self._weights: list[list[ExpertTensors | None]] = [
            [None] * experts for experts in store.num_experts
        ]

    def begin(self, layer: int, experts: Sequence[int], *, prompt: Tensor | None = None) -> Step:
        step = Step(layer)
        table = self._weights[layer]
        for expert in experts:
            weights = table[expert]
            if weights is None:
                weights = self._runners[layer].weights(self._store.record(layer, expert))
                table[expert] = weights
            step.ready.append((expert, weights))
        stats = self._stats[layer]
        stats.steps += 1
        stats.hits += len(experts)
        return step

    def next_or_none(self, step: Step, *, block: bool) -> tuple[int, ExpertTensors] | None:
        return None

    def finish(self, step: Step) -> None:
        pass

    def absent(self, layer: int, experts: Sequence[int]) -> list[int]:
        return []

    def prefetch(
        self,
        layer: int,
        experts: Sequence[int],
        *,
        predicted: Sequence[int],
        budget_bytes: int | None,
    ) -> Issued:
        return NOTHING_ISSUED

    def settle(self, layer: int, wanted: Collection[int]) -> None:
        pass

    def address(self, layer: int) -> int:
        return self._store.record(layer, 0).data_ptr()

    def is_busy(self, layer: int) -> bool:
        return False

    def marks(self, layer: int) -> tuple[bytearray, bytearray]:
        experts = self._store.num_experts[layer]
        return bytearray(experts), bytearray(experts)

    def note_pushed_out(self, layer: int, experts: Sequence[int]) -> None:
        pass
