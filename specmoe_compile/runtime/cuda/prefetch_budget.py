"""How many records a prefetch on a device may bring.

A record that a GPU reads itself cannot be cancelled: what compute does not hide delays the step.
How much it hides depends on the model, the length of the text, the link and the predictions, so
transfer `gather` tries amounts and keeps the one with which steps are fastest, on the device.
With `copy` the host copies as long as nothing is demanded, which takes the host's time: it tries
all or nothing.

Shape letters: A amounts that are tried, E experts, S slots per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from specmoe_compile.kernels.plan_cache.op import MAX_CHOICES
from specmoe_compile.kernels.tune_prefetch.op import tune_prefetch
from specmoe_compile.kernels.tune_prefetch.reference import HOLDS, LAST, MAX_AMOUNTS, STATE_WORDS
from specmoe_compile.options import SessionOptions
from specmoe_compile.runtime.cuda.host_trial import HostTrial
from specmoe_compile.runtime.cuda.streams import Streams
from specmoe_compile.runtime.store.base import ExpertStore

UNTUNED_RECORDS = 1
"""Records that `gather` fetches ahead where nothing is tried: with all that are predicted, decoding
may be slower than without a prefetch, with one it seldom is (docs/results/log/full_size.md)."""

PAYS_BELOW_SHARE = 0.5
"""Share of a layer's experts that have slots, below which predicting its experts pays.

Predicting takes 19 us of a layer, whatever comes of it, and a fetch hides behind 45 us of attention
and router at most: it pays where a layer misses in about four of ten tokens, which a cache of half
of the experts does not (docs/results/peers_gpu.md#prefetching, on an H200 at 1024 tokens)."""


def prefetch_pays(slots: Sequence[int], num_experts: Sequence[int]) -> bool:
    """Whether some layer's S are few enough of its E that fetching ahead pays."""
    pairs = zip(slots, num_experts, strict=True)
    return any(own < PAYS_BELOW_SHARE * experts for own, experts in pairs)


class PrefetchBudget:
    """Answers for every layer, and watches the steps.

    Attributes:
        limit: [1] int32 on the device, the amount of this step; None where a number says all.
    """

    def __init__(
        self,
        store: ExpertStore,
        top_k: int,
        streams: Streams,
        device: torch.device,
        lacked_bytes: Callable[[], int],
    ) -> None:
        """Reserve the tensors of the trials.

        Args:
            store: says how large and how many the records of a layer are.
            top_k: K, the most of the amounts.
            streams: the trials run on its `compute`.
            device: of the session.
            lacked_bytes: what was needed so far and had to be copied; asked with `copy` only.
        """
        self.limit: Tensor | None = None
        self._host_trial: HostTrial | None = None
        self._lacked_bytes = lacked_bytes
        self._store = store
        self._streams = streams
        self._config = SessionOptions()
        self._transfer: Literal["copy", "gather"] = "gather"
        amounts = amounts_to_try(top_k)
        self._amounts = torch.tensor(amounts, dtype=torch.int32, device=device)
        self._state = torch.zeros(STATE_WORDS, dtype=torch.int64, device=device)
        self._limit = torch.full((1,), amounts[0], dtype=torch.int32, device=device)
        self._last_layer = len(store.layouts)

    @property
    def records(self) -> int | None:
        """The amount in use by the trials; None where nothing is tried. Waits for the device."""
        return None if self.limit is None else int(self.limit)

    @property
    def found(self) -> bool:
        """Whether a trial has ended, or none is made; one on the device is waited for."""
        if self._host_trial is not None:
            return not self._host_trial.is_trying
        return self.limit is None or int(self._state[HOLDS]) > 1

    @property
    def tries_on_host(self) -> bool:
        """Whether the host knows in front of a step if anything is fetched ahead in it."""
        return self._host_trial is not None

    def use(self, config: SessionOptions, transfer: Literal["copy", "gather"]) -> None:
        """Take the options and the transfer from now on; trials begin again.

        With policy `default_vector` what is there decides what is computed, which must not depend
        on times: nothing is tried.
        """
        self._config, self._transfer = config, transfer
        tries = (
            config.auto_off and config.policy == "exact" and config.prefetch_budget_bytes is None
        )
        self.limit = self._limit if tries and transfer == "gather" else None
        on_host = tries and transfer == "copy"
        self._host_trial = HostTrial(self._lacked_bytes) if on_host else None
        self.restart()

    def restart(self) -> None:
        """Begin the trials again."""
        if self._host_trial is not None:
            self._host_trial = HostTrial(self._lacked_bytes)
        with self._streams.on("compute"):
            self._state.zero_()

    def begin_layer(self, layer: int, *, prefill: bool) -> None:
        """Take note that a layer's prefetch is next; the first one of a step chooses the amount.

        Args:
            layer: MoE layer ordinal; steps go through them in order.
            prefill: nothing will be fetched, and the time until the next step is no step's.
        """
        begins_step, self._last_layer = layer <= self._last_layer, layer
        if begins_step:
            self._begin_step(prefill)

    def plan_step(self, *, prefill: bool) -> bool:
        """Begin a step that asks in front of its layers; returns whether they may predict."""
        self._last_layer = -1  # no layer of this step begins another
        self._begin_step(prefill)
        return self._host_trial is None or (self._host_trial.predicts and not prefill)

    def _begin_step(self, prefill: bool) -> None:
        if self._host_trial is not None:
            if prefill:
                self._host_trial.pause()
            else:
                self._host_trial.begin_step()
        if self.limit is None:
            return
        with self._streams.on("compute"):
            if prefill:
                self._state[LAST : LAST + 1].zero_()
            else:
                tune_prefetch(self._state, self.limit, self._amounts)

    def max_records(self, layer: int) -> int:
        """Records that a prefetch of the layer may bring, if `limit` allows them."""
        budget = self._config.prefetch_budget_bytes
        if budget is not None:
            return budget // self._store.layouts[layer].record_bytes
        if self._transfer == "copy" or self._config.policy == "commit":
            # Of `copy` the rest can be cancelled; what is committed to is needed.
            if self._host_trial is not None and not self._host_trial.predicts:
                return 0
            return self._store.num_experts[layer]
        return UNTUNED_RECORDS if self.limit is None else MAX_CHOICES


def amounts_to_try(top_k: int) -> list[int]:
    """One, then doubled up to K, then none: the first is what decoding begins with."""
    amounts = [1]
    while amounts[-1] < top_k and len(amounts) < MAX_AMOUNTS - 1:
        amounts.append(min(2 * amounts[-1], top_k))
    return [*amounts, 0]
